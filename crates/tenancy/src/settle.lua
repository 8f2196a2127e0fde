-- Gives back what was reserved and not used, and tells how many answers are in flight here.
-- KEYS: rpm, input_tpm, output_tpm buckets, in-flight hash, tokens used in the budget's period.  ARGV: three times unused
-- us, replica, version, in flight here, lease us, unused tokens of the budget.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
for i = 1, 3 do
  local unused = tonumber(ARGV[i])
  local full_at = unused > 0 and redis.call('GET', KEYS[i])
  if full_at then
    local lag = tonumber(full_at) - unused - now
    if lag > 0 then
      redis.call('SET', KEYS[i], string.format('%.0f', now + lag), 'PX', math.ceil(lag / 1000) + 1)
    else
      redis.call('DEL', KEYS[i])
    end
  end
end
-- A key that has expired is not made again: it would never expire.
if ARGV[8] ~= '0' and redis.call('EXISTS', KEYS[5]) == 1 then redis.call('DECRBY', KEYS[5], ARGV[8]) end
announce(KEYS[4], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), now)
return 0
