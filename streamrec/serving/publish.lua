-- Publish lists, compare-and-set: one computed from n events never overwrites one from more.
-- KEYS: recommendation key and sequence key of each user.  ARGV: ttl_s; then n and the JSON of each user.
-- Returns for each user: 1 if it was written, the value of the list before, '' where there was none.
local reply = {}

local function refused(found)
  return type(found) == 'table' and string.sub(found.err, 1, 9) ~= 'WRONGTYPE'
end

for i = 1, #KEYS, 2 do
  local n = tonumber(ARGV[i + 1])
  local stored = redis.pcall('GET', KEYS[i])
  if refused(stored) then return stored end
  local stored_n = type(stored) == 'string' and tonumber(string.match(stored, '"n":(%d+)}$')) or 0
  local newer = stored_n > n
  if newer then
    -- a list that counts more events than its sequence has is left over from a sequence that expired
    local head = redis.pcall('GETRANGE', KEYS[i + 1], 0, 63)
    if refused(head) then return head end
    local sequence_n = type(head) == 'string' and tonumber(string.match(head, '^%d+ (%d+) '))
    newer = sequence_n and stored_n <= sequence_n
  end
  if not newer then
    redis.call('SET', KEYS[i], ARGV[i + 2], 'EX', ARGV[1])
  end
  reply[#reply + 1] = newer and 0 or 1
  reply[#reply + 1] = type(stored) == 'string' and stored or ''
end
return reply
