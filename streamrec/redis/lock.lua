-- Take, renew or release a lock.
-- KEYS: the lock. ARGV: name of the worker, time to live in ms (0: release).
-- Returns the name of the holder; the worker's own name if it took, renewed or released the lock.
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  return holder
end
if ARGV[2] == '0' then
  redis.call('DEL', KEYS[1])
else
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
end
return ARGV[1]
