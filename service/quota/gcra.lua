-- Takes one token of each rate, all or none. GCRA in its "continuous-state leaky bucket" form (ITU-T I.371, annex A):
-- what was spent is a level that drains at the rate; a request conforms while the level leaves room for one more token.
--
-- KEYS: one bucket for each rate. ARGV: for each rate, its rate in thousandths of a token a second, then its burst.
-- Units are chosen so that everything is a whole number below 2^53: one token is 1e9 units, a rate of r thousandths
-- drains exactly r units in a microsecond, and a burst is a million tokens at most (limits.py).
-- Returns for each rate {room left in whole tokens, microseconds until one more token fits, 1 if it refused}.
local TOKEN = 1e9
local time = redis.call('TIME')
local now = time[1] * 1e6 + time[2]
local levels, changed, refused, answer = {}, {}, false, {}
for i, key in ipairs(KEYS) do
  local rate, burst = tonumber(ARGV[2 * i - 1]), tonumber(ARGV[2 * i])
  local bucket = redis.call('HMGET', key, 'level', 'at', 'rate')
  local level, at = tonumber(bucket[1]) or 0, tonumber(bucket[2]) or now
  local before = tonumber(bucket[3]) or rate
  -- From the last token under one rate to the first request under another, the bucket drains at the faster of both:
  -- nobody knows here at which moment the rate changed, and a client that kept to either must not be refused for it.
  -- A clock that stepped back drains nothing and fills nothing.
  level = math.max(0, level - math.max(0, now - at) * math.max(rate, before))
  -- Under a smaller burst a bucket is full at most: its debt of yesterday is not to be paid at today's rate.
  local full = level > burst * TOKEN
  if full then level = burst * TOKEN end
  -- All of this is settled now, also when the request is refused: or the bucket would drain at the old rate for longer,
  -- and would refuse until the old time has come again.
  changed[i] = rate ~= before or at > now or full
  local over = level + TOKEN - burst * TOKEN
  levels[i] = level
  if over > 0 then refused = true end
  answer[i] = {0, 0, over > 0 and 1 or 0}
end
for i, key in ipairs(KEYS) do
  local rate, burst = tonumber(ARGV[2 * i - 1]), tonumber(ARGV[2 * i])
  local level = levels[i]
  if not refused then level = level + TOKEN end
  if not refused or changed[i] then
    redis.call('HSET', key, 'level', string.format('%.0f', level), 'at', string.format('%.0f', now), 'rate', ARGV[2 * i - 1])
    -- A drained bucket is the same as none. Rounded up, and one more for the millisecond that had begun.
    redis.call('PEXPIRE', key, math.ceil(level / rate / 1000) + 1)
  end
  answer[i][1] = math.floor(math.max(0, burst * TOKEN - level) / TOKEN)
  answer[i][2] = math.ceil(math.max(0, level + TOKEN - burst * TOKEN) / rate)
end
return answer
