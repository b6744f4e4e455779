-- Take items out of the published lists of this server, for a slice of its keys. Other values remain as they are.
-- ARGV: cursor of SCAN, pattern of the keys, keys per SCAN, longest time in s, 1 to return the items of all lists (else
-- 0); then the items to take out, each as JSON text.
-- Returns the server's run id (a cursor is of one server only), the next cursor (0: the end), the number of lists that
-- were read and that were changed; and, if requested, the distinct items that the lists still have, as JSON text.
local started, cursor = os.clock(), ARGV[1]
local few = 8  -- up to this number of items, a search of the text costs less than its items
local gone, names = {}, {}
for i = 6, #ARGV do
  gone[ARGV[i]] = true
  names[#names + 1] = ARGV[i]
end
local report, listed, found, read, changed = ARGV[5] == '1', {}, {}, 0, 0

-- Return an iterator over the items of a list, each as JSON text.
local function items_of(text)
  if not string.find(text, '\\', 1, true) then return string.gmatch(text, '"[^"]*"') end
  local from = 1
  return function()
    local at = from + 1
    repeat  -- the end of a string is a quote that no backslash escapes
      at = string.find(text, '["\\]', at)
      if not at then return nil end
      local is_end = string.byte(text, at) == 34
      if not is_end then at = at + 2 end
    until is_end
    local item = string.sub(text, from, at)
    from = at + 2
    return item
  end
end

-- Return the items of a value, without brackets, and where they end; nil if it is no list as this version writes it.
local function items_in(value)
  local stop = string.sub(value, 1, 10) == '{"items":[' and string.find(value, '],"scores":[', 11, true)
  if stop then return string.sub(value, 11, stop - 1), stop end
end

-- Return whether a value may have an item to take out; note the other ones.
local function may_hold(value)
  if not report and #names <= few then
    for i = 1, #names do
      if string.find(value, names[i], 1, true) then return true end
    end
    return false
  end
  local holds, text = false, items_in(value)
  for item in items_of(text or '') do
    if gone[item] then
      holds = true
    elseif report and not listed[item] then
      listed[item] = true
      found[#found + 1] = item
    end
  end
  return holds
end

-- Return the list without the gone items; nil if it has none, or is no list as this version writes it.
local function without(value)
  local text, stop = items_in(value)
  local scores_end = text and string.find(value, ']', stop + 12, true)
  local rest = scores_end and string.sub(value, scores_end)
  if not rest or not string.find(rest, '^],"model":.*,"n":%d+}$') then return nil end
  local items, left, left_scores, place = {}, {}, {}, 0
  for item in items_of(text) do items[#items + 1] = item end
  for score in string.gmatch(string.sub(value, stop + 12, scores_end - 1), '[^,]+') do
    place = place + 1
    local item = items[place]
    if item and not gone[item] then
      left[#left + 1], left_scores[#left_scores + 1] = item, score
    end
  end
  if place ~= #items or #left == place or table.concat(items, ',') ~= text then return nil end
  return '{"items":[' .. table.concat(left, ',') .. '],"scores":[' .. table.concat(left_scores, ',') .. rest
end

repeat
  local page = redis.call('SCAN', cursor, 'MATCH', ARGV[2], 'COUNT', ARGV[3])
  cursor = page[1]
  for _, key in ipairs(page[2]) do
    local value = redis.pcall('GET', key)  -- not MGET, which saves nothing, and which a cluster refuses
    if type(value) == 'string' then
      read = read + 1
      local shorter = may_hold(value) and without(value)
      if shorter then
        redis.call('SET', key, shorter, 'KEEPTTL')
        changed = changed + 1
      end
    end
  end
until cursor == '0' or os.clock() - started > tonumber(ARGV[4]) or #found > 2000

local run_id = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
return {run_id, cursor, read, changed, found}
