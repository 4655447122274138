"""How far the clock of another machine is from ours: asked as NTP does, with the error bound that comes of it.

One exchange: it is t1 here when the question leaves, u there when it is read, t4 here when the answer is back. The
clocks differ by u - (t1 + t4) / 2 and by no more than (t4 - t1) / 2 from that, however the way there and the way back
share the time (RFC 5905, section 8, with one stamp there in place of two). So the shortest of several exchanges knows
best. Monotonic clocks are not set; quartz makes them drift by some 50 ms in a quarter of an hour at worst (50 ppm),
which is why they are asked again after the load.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence

ROUND_TRIPS = 32  # of which the shortest counts; a tenth of a second on a local network

Exchange = tuple[int, int, int]  # t1, u, t4 in nanoseconds


@dataclasses.dataclass(frozen=True, slots=True)
class Offset:
    """The other clock less ours, right within the uncertainty."""

    ns: int
    uncertainty_ns: int
    round_trips: int


def best_of(exchanges: Sequence[Exchange]) -> Offset:
    """Return what the shortest exchange says. Raises ValueError when there is none."""
    asked, read, back = min(exchanges, key=lambda exchange: exchange[2] - exchange[0])
    return Offset(read - (asked + back) // 2, (back - asked + 1) // 2, len(exchanges))


async def measure_offset(ask: Callable[[], Awaitable[int]], round_trips: int = ROUND_TRIPS) -> Offset:
    """Ask the other clock (ns) so many times, one after another; raises what asking raises."""
    exchanges: list[Exchange] = []
    for _ in range(round_trips):
        asked = time.monotonic_ns()
        read = await ask()
        exchanges.append((asked, read, time.monotonic_ns()))
    return best_of(exchanges)
