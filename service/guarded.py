"""The Redis client of a process: it gives up early, and once it has, nobody waits for Redis until Redis answers again.

A Redis that has ended refuses at once; one that hangs (a stopped process, a network that drops everything) costs each
asker its whole patience. So the first call that is not answered within `PATIENCE_S` opens a `breaker`: from then on
every call fails at once with `Away`, and a PING in the background, for which no request waits, finds out when Redis is
back.

Everything that asks Redis on a request's behalf does so here and can go on without it: rates (`quota.rates`), sockets'
places (`quota.socket_leases`), announcements (`announce`), tickets, figures. `Away` is a redis.ConnectionError: whoever
is prepared for a Redis that is down is prepared for this. An error that Redis itself answers with opens nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import redis.asyncio
import structlog
from redis.asyncio.client import Pipeline
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.breaker import Breaker
from service.rediswire import open_redis
from service.telemetry import REDIS_AWAY

log = structlog.get_logger()

Answer = TypeVar("Answer")

PATIENCE_S = 0.75
"""How long a call may take. A request is held up for this long once, when Redis begins to hang; a client that keeps to
the default rates is not refused for it afterwards, since the bursts make up for 0.97 s at least (`quota.limits`)."""

LATE_S = 0.05
"""A patience that ends so much later than it should, seconds, was not Redis' fault: the process itself stood still, and
the answer may lie in the socket."""

MOST_EXTENSIONS = 3
"""How often a patience that ended late is prolonged, each time by a third of it."""


LOOK_EVERY_S = 2.0
"""How often an idle process looks for a Redis that is away: its figure and its log would never tell otherwise."""


class Away(RedisConnectionError):
    """Redis did not answer a moment ago, so it was not asked."""


class _Patience:
    """Ends a timeout's scope when its time is over, unless the process itself stood still at that moment."""

    __slots__ = ("_extensions", "_loop", "_patience_s", "_scope", "_timer")

    def __init__(self, patience_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._patience_s = patience_s
        self._extensions = 0
        self._scope: asyncio.Timeout
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, scope: asyncio.Timeout) -> None:
        self._scope = scope
        self._wait(self._patience_s)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self, wait_s: float) -> None:
        due_at = self._loop.time() + wait_s
        self._timer = self._loop.call_at(due_at, self._end, due_at)

    def _end(self, due_at: float) -> None:
        if self._loop.time() - due_at > LATE_S and self._extensions < MOST_EXTENSIONS:
            self._extensions += 1
            self._wait(self._patience_s / 3)
        else:
            self._scope.reschedule(self._loop.time())


class Guard:
    """Makes calls through one breaker, and looks for Redis while it is open."""

    def __init__(
        self,
        ping: Callable[[], Awaitable[object]],
        patience_s: float = PATIENCE_S,
        monotonic: Callable[[], float] = time.monotonic,
        look_every_s: float = LOOK_EVERY_S,
    ) -> None:
        self.breaker = Breaker(monotonic)
        self._ping = ping
        self._patience_s = patience_s
        self._look_every_s = look_every_s
        self._watch: asyncio.TimerHandle | None = None
        self._probe: asyncio.Task[None] | None = None
        self._under_way = 0  # calls without an answer yet
        self._none_under_way = asyncio.Event()
        self._is_closed = False

    def is_away(self) -> bool:
        """Tell whether Redis is away, and have it looked for if so."""
        if self.breaker.admits:
            return False
        self._look_again()
        return True

    async def run(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """Make a call; raises Away without making it while Redis is away, and RedisError or OSError as it fails."""
        if self._is_closed:
            raise Away("the way to Redis is closed")
        if self.is_away():
            raise Away("Redis does not answer")
        self._under_way += 1
        try:
            return await self._in_time(call)
        except (RedisConnectionError, RedisTimeoutError, OSError) as fault:
            if self.breaker.fail():
                REDIS_AWAY.inc()
                log.warning("redis is away; going on without it", fault=str(fault))
                self._look_later()
            raise
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._none_under_way.set()

    async def close(self) -> None:
        """Turn away whoever comes now, wait for the answers under way (never long), and stop looking for Redis.

        A call after the pool was closed, or one that was just connecting, would open a connection that nobody closes.
        """
        self._is_closed = True
        self._none_under_way.clear()
        if self._under_way:
            await self._none_under_way.wait()
        if self._watch is not None:
            self._watch.cancel()
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        if not self.breaker.admits:
            REDIS_AWAY.dec()
            self.breaker.answer()

    async def _in_time(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        patience = _Patience(self._patience_s)
        try:
            async with asyncio.timeout(None) as scope:
                patience.begin(scope)
                return await call()
        except TimeoutError:
            raise RedisTimeoutError(f"no answer within {self._patience_s:g} s") from None
        finally:
            patience.stop()

    def _look_later(self) -> None:
        """Have Redis looked for though nobody may ask, for as long as it is away."""
        self._watch = asyncio.get_running_loop().call_later(self._look_every_s, self._look_though_nobody_asks)

    def _look_though_nobody_asks(self) -> None:
        if self.is_away():
            self._look_later()

    def _look_again(self) -> None:
        """Send a probe when its time has come; whoever asks makes it come sooner than the watch."""
        if self.breaker.take_probe():
            self._probe = asyncio.get_running_loop().create_task(self._look(), name="look for redis")

    async def _look(self) -> None:
        try:
            await self._in_time(self._ping)
        except (redis.RedisError, OSError):
            self.breaker.fail()
        else:
            self.breaker.answer()
            REDIS_AWAY.dec()
            log.info("redis answers again")


class Guarded(redis.asyncio.Redis):
    """A Redis client whose every call goes through a guard."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.guard = Guard(lambda: self._unguarded("PING"))

    async def execute_command(self, *arguments: Any, **options: Any) -> Any:
        """Make one call."""
        return await self.guard.run(lambda: self._unguarded(*arguments, **options))

    async def _unguarded(self, *arguments: Any, **options: Any) -> Any:
        return await super().execute_command(*arguments, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        """Return a pipeline whose one round trip goes through the guard."""
        return _GuardedPipeline(self.guard, self.connection_pool, self.response_callbacks, transaction, shard_hint)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Stop looking for Redis and close the connections."""
        await self.guard.close()
        await super().aclose(close_connection_pool)


def connect_redis(url: str) -> redis.asyncio.Redis:
    """Open a pool whose calls fail fast, and at once while Redis is away: whoever calls it can go on without it."""
    return open_redis(url, retries=1, kind=Guarded)


class _GuardedPipeline(Pipeline):
    """Commands that share a round trip."""

    def __init__(self, guard: Guard, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._guard = guard

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Send the commands and return their answers."""
        return await self._guard.run(lambda: Pipeline.execute(self, raise_on_error))
