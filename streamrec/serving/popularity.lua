-- Add clicks to the time-decayed popularity (forward decay: Cormode et al., ICDE 2009) and return the top items.
-- KEYS: the ZSET.  ARGV: half_life_ms, ttl_s, top (items to return), max_items (items to store),
-- only_if_missing (0 or 1), reference_ms; then pairs of item and weight, the weights as of reference_ms.
-- Scores are weights as of the landmark. The landmark is the score of a member that no item id can equal.
-- Returns item, weight, item, weight, ... as of the newest reference_ms, the most popular first.
local key, landmark_member = KEYS[1], '\0landmark'
local half_life_ms, top, max_items = tonumber(ARGV[1]), tonumber(ARGV[3]), tonumber(ARGV[4])
local reference = tonumber(ARGV[6])
local exists = redis.call('EXISTS', key) == 1
local landmark = tonumber(redis.call('ZSCORE', key, landmark_member) or reference)

if #ARGV > 6 and not (exists and ARGV[5] == '1') then
  if (reference - landmark) / half_life_ms > 60 then
    -- move the landmark before the exponents overflow
    redis.call('ZREM', key, landmark_member)
    redis.call('ZUNIONSTORE', key, 1, key, 'WEIGHTS', string.format('%.17g', 2 ^ ((landmark - reference) / half_life_ms)))
    landmark = reference
  end
  local factor = 2 ^ ((reference - landmark) / half_life_ms)
  for i = 7, #ARGV, 2 do
    redis.call('ZINCRBY', key, string.format('%.17g', tonumber(ARGV[i + 1]) * factor), ARGV[i])
  end
  redis.call('ZREM', key, landmark_member)
  redis.call('ZREMRANGEBYRANK', key, 0, -(max_items + 1))
  redis.call('ZADD', key, string.format('%.17g', landmark), landmark_member)
  redis.call('EXPIRE', key, ARGV[2])
end

local factor = 2 ^ ((landmark - math.max(landmark, reference)) / half_life_ms)
local reply = {}
local members = redis.call('ZREVRANGE', key, 0, top, 'WITHSCORES')
for i = 1, #members, 2 do
  if members[i] ~= landmark_member and #reply < 2 * top then
    reply[#reply + 1] = members[i]
    reply[#reply + 1] = string.format('%.6g', tonumber(members[i + 1]) * factor)
  end
end
return reply
