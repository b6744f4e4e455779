-- Replace values, compare-and-set: only values that have not changed since they were read.
-- KEYS: the keys.  ARGV: for each key the expected value ('' for none), the new value and its ttl_s; if the old value
-- would live longer, its TTL is used.
-- Returns for each key 1 if the value was replaced, 0 if another process changed it first.
local reply = {}
for i = 1, #KEYS do
  local expected, value, ttl_s = ARGV[3 * i - 2], ARGV[3 * i - 1], tonumber(ARGV[3 * i])
  local stored = redis.pcall('GET', KEYS[i])
  if type(stored) == 'table' and string.sub(stored.err, 1, 9) ~= 'WRONGTYPE' then return stored end
  if type(stored) ~= 'string' then stored = '' end  -- no value, or one of another type, which counts as none
  if stored == expected then
    ttl_s = math.max(ttl_s, redis.call('TTL', KEYS[i]))
    redis.call('SET', KEYS[i], value, 'EX', string.format('%.0f', ttl_s))
  end
  reply[i] = stored == expected and 1 or 0
end
return reply
