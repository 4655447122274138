-- Takes tokens for the turns of one workspace, as many as there are, and queues the rest. GCRA as in gcra.lua, on the
-- same bucket, with a second level above the first: `level` is what was spent, `line` is that and what was promised to
-- turns that were delayed. Both drain at the rate. docs/rates.md says what follows from it.
--
-- KEYS: the bucket. ARGV: the rate in thousandths of a token a second, the burst, how many turns were delayed before and
-- come at the time that they were told, how many come for the first time. Units are those of gcra.lua; a line is never
-- longer than eight million tokens, so every number stays below 2^53.
-- Returns {turns admitted of the former, of the latter, room left in whole tokens for one that comes for the first time,
-- units by which the first turn that is delayed is too early (each further one is so by one token more), units by which
-- one that waited is too early by less than half a token, or -1: it keeps its place, and is not among those}.
local TOKEN, LONGEST = 1e9, 8e15
local time = redis.call('TIME')
local now = time[1] * 1e6 + time[2]
local rate, burst = tonumber(ARGV[1]), tonumber(ARGV[2]) * TOKEN
local returned, fresh = tonumber(ARGV[3]), tonumber(ARGV[4])
local bucket = redis.call('HMGET', KEYS[1], 'level', 'at', 'rate', 'line')
local level, at = tonumber(bucket[1]) or 0, tonumber(bucket[2]) or now
local before = tonumber(bucket[3]) or rate
local line = tonumber(bucket[4]) or level
-- A change of rate or burst is settled as in gcra.lua. What was promised under another rate is void.
local drained = math.max(0, now - at) * math.max(rate, before)
level = math.min(burst, math.max(0, level - drained))
line = math.max(level, line - drained)
if rate ~= before then line = level end
-- Who waited has been counted in the line already. Only the level, which is what was spent, decides for him.
local back = math.min(returned, math.floor((burst - level) / TOKEN))
level = level + back * TOKEN
line = math.max(line, level)
-- Who went before him may have come a little late: then he is a little early. Otherwise he goes to the end.
local short, queued = level + TOKEN - burst, returned - back
if queued > 0 and 2 * short < TOKEN then queued = queued - 1 else short = -1 end
-- Who comes for the first time goes behind all who wait.
local first = math.min(fresh, math.floor(math.max(0, burst - line) / TOKEN))
level = level + first * TOKEN
line = line + first * TOKEN
local early = math.max(0, line + TOKEN - burst)
local left = math.floor(math.max(0, burst - line) / TOKEN)
line = math.min(LONGEST, line + (queued + fresh - first) * TOKEN)
redis.call('HSET', KEYS[1], 'level', string.format('%.0f', level), 'at', string.format('%.0f', now), 'rate', ARGV[1],
  'line', string.format('%.0f', line))
redis.call('PEXPIRE', KEYS[1], math.ceil(line / rate / 1000) + 1)
return {back, first, left, early, short}
