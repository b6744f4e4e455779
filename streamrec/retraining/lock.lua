-- Take, keep or give back a lock.
-- KEYS: the lock. ARGV: who asks, how long it holds in ms (0: give it back).
-- Returns who holds it now: whoever asked, unless it is somebody else's.
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
