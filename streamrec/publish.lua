-- Publish lists, compare-and-set: one computed from n events never overwrites one from more.
-- KEYS: recommendation key and sequence key of each user.  ARGV: ttl_s; then n and the JSON of each user.
-- Returns how many were written, then the value of each list before, '' where there was none.
local written, reply = 0, {0}
for i = 1, #KEYS, 2 do
  local n = tonumber(ARGV[i + 1])
  local stored = redis.pcall('GET', KEYS[i])
  reply[#reply + 1] = type(stored) == 'string' and stored or ''
  local stored_n = type(stored) == 'string' and tonumber(string.match(stored, '"n":(%d+)}$')) or 0
  local newer = stored_n > n
  if newer then
    -- a list that counts more events than its sequence has is left over from a sequence that expired
    local head = redis.pcall('GETRANGE', KEYS[i + 1], 0, 63)
    local sequence_n = type(head) == 'string' and tonumber(string.match(head, '^%d+ (%d+) '))
    newer = sequence_n and stored_n <= sequence_n
  end
  if not newer then
    redis.call('SET', KEYS[i], ARGV[i + 2], 'EX', ARGV[1])
    written = written + 1
  end
end
reply[1] = written
return reply
