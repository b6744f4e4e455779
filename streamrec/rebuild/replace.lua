-- Replace values that are still what they were: compare-and-set.
-- KEYS: the keys.  ARGV: for each key the value that is expected ('' for none), the new value, and its ttl_s; a longer
-- time that the old value has left to live stays.
-- Returns for each key 1 if it was replaced, 0 if somebody else was quicker.
local reply = {}
for i = 1, #KEYS do
  local expected, value, ttl_s = ARGV[3 * i - 2], ARGV[3 * i - 1], tonumber(ARGV[3 * i])
  local stored = redis.pcall('GET', KEYS[i])
  if type(stored) == 'table' and string.sub(stored.err, 1, 9) ~= 'WRONGTYPE' then return stored end  -- no right to read it
  if type(stored) ~= 'string' then stored = '' end  -- there is none, or one of another type, which nobody can read
  if stored == expected then
    ttl_s = math.max(ttl_s, redis.call('TTL', KEYS[i]))
    redis.call('SET', KEYS[i], value, 'EX', string.format('%.0f', ttl_s))
  end
  reply[i] = stored == expected and 1 or 0
end
return reply
