-- Publish lists, compare-and-set: a list computed from n events never overwrites one from more.
-- Nor does one that was computed before the user's exclusions changed last.
-- KEYS: for each user, recommendation key and sequence key; if a role excludes, also the key of the exclusions.
-- ARGV: ttl_s, keys of each user (2 or 3); then for each user n and the JSON; if a role excludes, also how often the
-- user's exclusions had changed.
-- Returns for each user: 1 if the list was written, and the previous value, '' if there was none.
local reply, keys_of_user = {}, tonumber(ARGV[2])

local function no_permission(answer)
  return type(answer) == 'table' and string.sub(answer.err, 1, 9) ~= 'WRONGTYPE'
end

for i = 1, #KEYS, keys_of_user do
  local n = tonumber(ARGV[i + 2])  -- a user has as many arguments as keys
  local stored = redis.pcall('GET', KEYS[i])
  if no_permission(stored) then return stored end
  local stored_n = type(stored) == 'string' and tonumber(string.match(stored, '"n":(%d+)}$')) or 0
  local newer = stored_n > n
  if newer then
    -- a list with a larger n than its sequence remains from a sequence that has expired: overwrite it
    local head = redis.pcall('GETRANGE', KEYS[i + 1], 0, 63)
    if no_permission(head) then return head end
    local sequence_n = type(head) == 'string' and tonumber(string.match(head, '^%d+ (%d+) '))
    newer = sequence_n and stored_n <= sequence_n
  end
  if keys_of_user == 3 and not newer then
    local changes = redis.pcall('ZSCORE', KEYS[i + 2], '\0changes')
    if no_permission(changes) then return changes end
    newer = type(changes) == 'string' and tonumber(changes) > tonumber(ARGV[i + 4])
  end
  if not newer then
    redis.call('SET', KEYS[i], ARGV[i + 3], 'EX', ARGV[1])
  end
  reply[#reply + 1] = newer and 0 or 1
  reply[#reply + 1] = type(stored) == 'string' and stored or ''
end
return reply
