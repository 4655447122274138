"""When to stop asking a server that does not answer, and when to look again. Pure: the clock is passed in.

States: closed (everybody asks) -> open, at the first failure (nobody asks) -> probing, once the pause is over (one asks
on behalf of all) -> closed when that one was answered, else open again for twice as long. `guarded` uses it for Redis.

Refuses to count failures before it opens: whoever is turned away here goes on without the server, so opening too early
costs less than letting one more request wait.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

FIRST_PAUSE_S = 0.25
"""How long nobody asks after the first failure: shorter than a restart, longer than a stutter."""

LONGEST_PAUSE_S = 2.0
"""Where doubling the pause ends: so much later than the server itself everybody knows that it is back."""


class State(enum.Enum):
    """What the breaker lets through."""

    CLOSED = "closed"  # every call
    OPEN = "open"  # no call
    PROBING = "probing"  # no call but the probe, which is under way


class Breaker:
    """Decides for one process whether a server is asked."""

    def __init__(
        self,
        monotonic: Callable[[], float],
        first_pause_s: float = FIRST_PAUSE_S,
        longest_pause_s: float = LONGEST_PAUSE_S,
    ) -> None:
        self.state = State.CLOSED
        self._monotonic = monotonic
        self._first_pause_s = first_pause_s
        self._longest_pause_s = longest_pause_s
        self._pause_s = first_pause_s
        self._probe_at_s = 0.0

    @property
    def admits(self) -> bool:
        """Whether a call may be made."""
        return self.state is State.CLOSED

    def take_probe(self) -> bool:
        """Tell whether the asker is the one that has to look again; then nobody else is, until it has reported."""
        if self.state is not State.OPEN or self._monotonic() < self._probe_at_s:
            return False
        self.state = State.PROBING
        return True

    def fail(self) -> bool:
        """Note that a call, or the probe, was not answered; tells whether that opened the breaker.

        A call that began before the breaker opened and fails later says nothing new.
        """
        if self.state is State.OPEN:
            return False
        opened = self.state is State.CLOSED
        self._pause_s = self._first_pause_s if opened else min(2 * self._pause_s, self._longest_pause_s)
        self.state = State.OPEN
        self._probe_at_s = self._monotonic() + self._pause_s
        return opened

    def answer(self) -> None:
        """Note that the probe was answered: everybody asks again."""
        self.state = State.CLOSED
