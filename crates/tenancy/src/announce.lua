-- Answers in flight on one replica: "count version expires". An older version never replaces a newer one, and a replica
-- that is not heard of for a lease no longer counts.
local function announce(key, replica, version, here, lease, now)
  local known = redis.call('HGET', key, replica)
  if known then
    local _, last = string.match(known, '(%d+) (%d+) (%d+)')
    if tonumber(last) > version then return end
  end
  redis.call('HSET', key, replica, string.format('%d %d %.0f', here, version, now + lease))
  redis.call('PEXPIRE', key, math.ceil(lease / 1000))
end
