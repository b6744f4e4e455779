-- Note a sweep. KEYS: HASH: `begun` is the number of sweeps begun; the field of an item is the number of the last finished
-- sweep that took it out, `*` that of the last one that compared all lists with the table.
-- ARGV: ttl_s, most fields. A sweep begins: nothing more; returns its number. It ends: its number, then the fields.
local number = ARGV[3]
if not number then
  number = redis.call('HINCRBY', KEYS[1], 'begun', 1)
elseif redis.call('HLEN', KEYS[1]) + #ARGV - 3 > tonumber(ARGV[2]) then
  local begun = redis.call('HGET', KEYS[1], 'begun')
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'begun', begun or number)
end
for i = 4, #ARGV do
  redis.call('HSET', KEYS[1], ARGV[i], number)
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return tonumber(number)
