-- Takes one place in each of several pools, all or none; asking again renews what is held.
--
-- KEYS: one sorted set for each pool: holder -> the instant at which its place lapses, milliseconds.
-- ARGV: the holder, how long a place lasts (milliseconds), then for each pool how many places it has (-1: no end).
-- A place that lapsed is anybody's: its holder died, or could not renew in time. One that would last longer than a minute
-- was taken before the server's clock stepped back: from now on it lasts as long as any other, if its holder lives or not.
-- Returns 0 when all places are held now, otherwise the number of the first pool that is full and how many it holds.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local holder, lasts, LONGEST = ARGV[1], tonumber(ARGV[2]), 60000
for i, key in ipairs(KEYS) do
  local most = tonumber(ARGV[2 + i])
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  for _, before in ipairs(redis.call('ZRANGEBYSCORE', key, now + LONGEST, '+inf')) do
    redis.call('ZADD', key, now + lasts, before)
  end
  if most >= 0 and not redis.call('ZSCORE', key, holder) then
    local held = redis.call('ZCARD', key)
    if held >= most then return {i, held} end
  end
end
for _, key in ipairs(KEYS) do
  redis.call('ZADD', key, now + lasts, holder)
  -- The set goes with its last place, never before: it may hold places that last longer.
  if redis.call('PTTL', key) < lasts then redis.call('PEXPIRE', key, lasts) end
end
return {0, 0}
