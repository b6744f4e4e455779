-- Append a batch of events to the sequences of its users; apply each event once.
-- KEYS: for each user, the sequence key; if a role excludes, also the key of the exclusions.
-- ARGV: max_len, ttl_s, session_gap_ms (0: none), topic_epoch, exclude_ttl_ms (0: no role excludes), now_ms;
--       then for each user the number of events, and for each event partition, offset, timestamp_ms, item_id; if a role
--       excludes, also 1 for a click, 2 for an exclusion, 3 for both. A further event of the record of the event before
--       has an empty partition: a record is applied whole or not at all.
-- Returns for each user: events applied, 1 if the stored value was damaged and discarded (else 0), the new value, nil
--       for none; for a value of a later format or topic epoch, which is not changed: -1, 0, the reason. If a role
--       excludes, also how often the user's exclusions have changed, and the items that are excluded now.
--
-- Value: "1 n session_n count last_event_ts_ms topic_epoch partition:offset,..." NUL, then each item and a NUL.
-- StoredSequence (sequences.py) reads the value, and calls the same values damaged.
-- last_event_ts_ms is the largest timestamp of the applied events: see event_times.py for the rule.
local max_len, ttl_s, gap_ms, epoch = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local exclude_ttl_ms, now_ms = tonumber(ARGV[5]), tonumber(ARGV[6])
local excludes = exclude_ttl_ms > 0
local keys_of_user, values_of_event = excludes and 2 or 1, excludes and 5 or 4
local changes_member, max_excluded = '\0changes', 1000  -- a member that no item id can equal
local header = '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) ([%d:,]*)%z(.*)$'
local reply, at = {}, 7

local function is_damaged(n, session_n, count, last_ts, stored_epoch)
  for _, number in ipairs({n, session_n, count, last_ts, stored_epoch}) do
    if #number > 16 then return true end  -- beyond what doubles count one by one
  end
  return tonumber(count) > tonumber(session_n) or tonumber(session_n) > tonumber(n)
end

-- Note exclusions, pairs of timestamp and item; return how often they have changed, and the items excluded now.
-- Value: a ZSET of items by the timestamp of their newest exclusion. To note one again changes nothing.
local function exclude(key, exclusions)
  local changes = tonumber(redis.call('ZSCORE', key, changes_member) or 0)
  for _, exclusion in ipairs(exclusions) do
    local noted = redis.call('ZSCORE', key, exclusion[2])
    if not noted or tonumber(noted) < tonumber(exclusion[1]) then
      redis.call('ZADD', key, exclusion[1], exclusion[2])
      changes = changes + 1
    end
  end
  if #exclusions > 0 then
    redis.call('ZREM', key, changes_member)
    redis.call('ZREMRANGEBYRANK', key, 0, -(max_excluded + 1))
    redis.call('ZADD', key, changes, changes_member)
    redis.call('EXPIRE', key, string.format('%.0f', math.ceil(exclude_ttl_ms / 1000)))
  end
  local found = {string.format('%.0f', changes)}
  local members = redis.call('ZREVRANGE', key, 0, max_excluded, 'WITHSCORES')
  for i = 1, #members, 2 do
    if tonumber(members[i + 1]) <= now_ms - exclude_ttl_ms then break end
    if members[i] ~= changes_member then found[#found + 1] = members[i] end
  end
  return found
end

-- Returns the reply for a key and the exclusions among its events, or an error of Redis.
local function append(key)
  local value = redis.pcall('GET', key)
  if type(value) == 'table' then
    if string.sub(value.err, 1, 9) ~= 'WRONGTYPE' then return value end  -- no permission: not damaged
    value = 'another type'
  end
  local format, n, session_n, count, last_ts, stored_epoch, applied_offsets, items
  if value then
    format, n, session_n, count, last_ts, stored_epoch, applied_offsets, items = string.match(value, header)
    if format and format ~= '1' then
      at = at + 1 + values_of_event * tonumber(ARGV[at])
      return -1, 0, 'sequence format ' .. format .. ' in ' .. key
        .. ' was written by a newer streamrec; this one reads format 1: upgrade it'
    end
    if format and is_damaged(n, session_n, count, last_ts, stored_epoch) then format = nil end
    if format and tonumber(stored_epoch) > epoch then
      at = at + 1 + values_of_event * tonumber(ARGV[at])
      return -1, 0, 'topic epoch ' .. stored_epoch .. ' in ' .. key .. ' is later than this daemon\'s ' .. epoch
        .. ': set STREAMREC_KAFKA_TOPIC_EPOCH as the other daemons do'
    end
    if not format then n, session_n, count, last_ts, stored_epoch, applied_offsets, items = nil end
  end
  local damaged = (value and not format) and 1 or 0
  n, session_n, count = tonumber(n or 0), tonumber(session_n or 0), tonumber(count or 0)
  last_ts, stored_epoch, items = last_ts or '0', tonumber(stored_epoch or epoch), items or ''
  local offsets = {}
  if stored_epoch == epoch then
    for partition, offset in string.gmatch(applied_offsets or '', '(%d+):(%d+)') do
      offsets[partition] = tonumber(offset)
    end
  end

  local num_events, fresh, applied, is_new, exclusions = tonumber(ARGV[at]), {}, 0, false, {}
  at = at + 1
  for _ = 1, num_events do
    local partition, offset, ts, item = ARGV[at], tonumber(ARGV[at + 1]), ARGV[at + 2], ARGV[at + 3]
    local role = excludes and ARGV[at + 4] or '1'
    at = at + values_of_event
    if role ~= '1' then exclusions[#exclusions + 1] = {ts, item} end
    if role == '2' then
      is_new = false
    elseif partition ~= '' then
      is_new = not offsets[partition] or offset > offsets[partition]
      if is_new then offsets[partition] = offset end
    end
    if is_new then
      if gap_ms > 0 and session_n > 0 and tonumber(ts) - tonumber(last_ts) > gap_ms then
        session_n, count, items, fresh = 0, 0, '', {}
      end
      if tonumber(ts) > tonumber(last_ts) then last_ts = ts end
      n, session_n, count, applied = n + 1, session_n + 1, count + 1, applied + 1
      fresh[#fresh + 1] = item .. '\0'
    end
  end

  if applied > 0 then
    items = items .. table.concat(fresh)
    local cut = 0
    while count > max_len do
      cut = string.find(items, '\0', cut + 1, true)
      count = count - 1
      if not cut then items, count, cut = table.concat(fresh), #fresh, 0 end  -- the header claimed more
    end
    items = string.sub(items, cut + 1)
    local pairs_of = {}
    for partition, offset in pairs(offsets) do
      pairs_of[#pairs_of + 1] = string.format('%s:%.0f', partition, offset)
    end
    table.sort(pairs_of)
    value = string.format('1 %.0f %.0f %.0f %s %.0f %s', n, session_n, count, last_ts, epoch, table.concat(pairs_of, ','))
      .. '\0' .. items
    redis.call('SET', key, value, 'EX', ttl_s)
  elseif damaged == 1 then
    value = false  -- no click has replaced it
  elseif num_events > #exclusions then
    redis.call('EXPIRE', key, ttl_s)  -- a write: WAIT after a retry must cover this value too
  end
  return applied, damaged, value, exclusions
end

for i = 1, #KEYS, keys_of_user do
  local applied, damaged, value, exclusions = append(KEYS[i])
  if type(applied) == 'table' then return applied end
  reply[#reply + 1] = applied
  reply[#reply + 1] = damaged
  reply[#reply + 1] = value
  if excludes then reply[#reply + 1] = applied < 0 and {} or exclude(KEYS[i + 1], exclusions) end
end
return reply
