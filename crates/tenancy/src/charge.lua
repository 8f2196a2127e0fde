-- Takes from up to three buckets and a budget, and checks answers in flight, all of it or nothing.
-- KEYS: rpm, input_tpm, output_tpm buckets, in-flight hash, tokens used in the budget's period.
-- ARGV: three times (cost us, burst us; burst 0 is no limit), then concurrency (0 is no limit), replica, version,
--       in flight here, lease us; tokens of the budget (0 is none), cost, whether it refuses, when its key expires.
-- Returns: which limit refuses (0: none, 1 to 3: a bucket, 4: concurrency, 5: budget), wait us, three times us until full,
--          tokens used of the budget, whether this request went beyond it.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local which, wait, lags, full_at = 0, 0, {0, 0, 0}, {}
for i = 1, 3 do
  local cost, burst = tonumber(ARGV[2 * i - 1]), tonumber(ARGV[2 * i])
  if burst > 0 then
    local lag = math.max((tonumber(redis.call('GET', KEYS[i]) or '0')) - now, 0)
    local needed = 0
    if lag > 0 then
      if cost > burst then needed = lag else needed = math.max(lag + cost - burst, 0) end
    end
    if needed > wait then which, wait = i, needed end
    lags[i] = lag
    full_at[i] = now + lag + cost
  end
end
local budget, spends, used, over = tonumber(ARGV[12]), tonumber(ARGV[13]), 0, 0
if budget > 0 then
  used = tonumber(redis.call('GET', KEYS[5]) or '0')
  if used + math.max(spends, 1) > budget then over = 1 end
  -- No wait is longer than a period's; how long it is, the replica knows.
  if over == 1 and ARGV[14] == '1' then which, wait = 5, 0 end
end
local concurrency, replica = tonumber(ARGV[7]), ARGV[8]
local version, here, lease = tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])
if which == 0 and concurrency > 0 then
  local total = here
  local fields = redis.call('HGETALL', KEYS[4])
  for i = 1, #fields, 2 do
    local count, _, expires = string.match(fields[i + 1], '(%d+) (%d+) (%d+)')
    if tonumber(expires) <= now then
      redis.call('HDEL', KEYS[4], fields[i])
    elseif fields[i] ~= replica then
      total = total + tonumber(count)
    end
  end
  if total > concurrency then which, wait = 4, 1000000 end
end
if which == 0 then
  for i = 1, 3 do
    if full_at[i] then
      redis.call('SET', KEYS[i], string.format('%.0f', full_at[i]), 'PX', math.ceil((full_at[i] - now) / 1000) + 1)
      lags[i] = full_at[i] - now
    end
  end
  if budget > 0 then
    used = redis.call('INCRBY', KEYS[5], ARGV[13])
    redis.call('EXPIREAT', KEYS[5], ARGV[15])
  end
  if concurrency > 0 then announce(KEYS[4], replica, version, here, lease, now) end
end
return {which, math.ceil(wait), math.ceil(lags[1]), math.ceil(lags[2]), math.ceil(lags[3]), used, over}
