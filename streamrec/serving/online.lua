-- Add to the online figures of a model version.
-- KEYS: the version's hash.  ARGV: ttl_s; then field and amount pairs.
for i = 2, #ARGV, 2 do
  redis.call('HINCRBYFLOAT', KEYS[1], ARGV[i], ARGV[i + 1])
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
