"""What an open loop shows of itself while it runs: offered and achieved rate, latencies of the last seconds, lag.

For a person only: nothing here is recorded or judged, and the figures of the last seconds have no intervals. The rows
say the same exactly. Drawn by `progress`.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import msgspec
import numpy as np

from harness.arrivals import Nanoseconds
from harness.sample import Outcome
from harness.samplebuffer import OUTCOME_CODE
from harness.sender import Report

WINDOW_S = 5.0
_OK, _NOT_SENT = OUTCOME_CODE[Outcome.OK], OUTCOME_CODE[Outcome.NOT_SENT]


class Glimpse(msgspec.Struct, frozen=True):
    """What of a report's rows is shown; taken where the rows are, which may be another machine."""

    requests: int
    errors: int  # that did not end well, those never sent included
    not_sent: int
    answered: int  # arrivals whose own request ended well
    latency_ms: bytes  # of arrivals' own requests, packed as float32


def glimpse_of(rows: np.ndarray[Any, Any]) -> Glimpse:
    """Return what is shown of packed rows (`samplebuffer.Batch.rows`)."""
    own = rows[rows["child"] == 0]
    own = own[own["endpoint"] == own["endpoint"].min()] if len(own) else own  # creates come before polls in Endpoint
    known = own[(own["done"] >= 0) & (own["intended"] >= 0)]
    return Glimpse(
        requests=len(rows),
        errors=int((rows["outcome"] != _OK).sum()),
        not_sent=int((rows["outcome"] == _NOT_SENT).sum()),
        answered=int((own["outcome"] == _OK).sum()),
        latency_ms=((known["done"] - known["intended"]) / 1e6).astype("<f4").tobytes(),
    )


class _Lately:
    """One report's share of the last seconds."""

    __slots__ = ("answered", "at_s", "lag_ms", "latency_ms")

    def __init__(self, at_s: float, answered: int, latency_ms: np.ndarray[Any, Any], lag_ms: float) -> None:
        self.at_s = at_s
        self.answered = answered  # arrivals whose own request ended well
        self.latency_ms = latency_ms
        self.lag_ms = lag_ms


class OpenTally:
    """How far the load is. `arrivals` are of the whole schedule."""

    def __init__(self, due_ns: Nanoseconds, *, follow_up: bool) -> None:
        """`due_ns` is the schedule; with `follow_up` an arrival has ended when its agent run has."""
        self._due_ns = due_ns
        self._follow_up = follow_up
        self._start_at_ns: int | None = None
        self._lately: deque[_Lately] = deque()
        self.runs = len(due_ns)
        self.ended = 0
        self.requests = 0
        self.errors = 0  # requests that did not end well, those never sent included
        self.not_sent = 0

    def begin(self, start_at_ns: int) -> None:
        """Note the instant from which the schedule counts."""
        self._start_at_ns = start_at_ns

    def take(self, glimpse: Glimpse, report: Report) -> None:
        """Take what one sender reported."""
        self.requests += glimpse.requests
        self.errors += glimpse.errors
        self.not_sent += glimpse.not_sent
        parents = sum(run.parent_run_key is None for run in report.runs)
        self.ended += parents if self._follow_up else glimpse.requests
        latency_ms = np.frombuffer(glimpse.latency_ms, "<f4")
        self._lately.append(_Lately(time.monotonic(), glimpse.answered, latency_ms, report.strain.lag_ms or 0.0))

    @property
    def milestone(self) -> int:
        """Return a number that changes when a plain line is worth it: at every tenth of the arrivals."""
        return self.ended * 10 // self.runs

    def _due_by(self, at_s: float) -> int:
        """Return how many arrivals were due by an instant of this machine's clock."""
        if self._start_at_ns is None:
            return 0
        return int(np.searchsorted(self._due_ns, at_s * 1e9 - self._start_at_ns, side="right"))

    def _last_seconds(self) -> tuple[float, float, str, str, float]:
        """Return offered and achieved arrivals per second, p50 and p95 in words, and the worst lag in milliseconds."""
        # Up to the last report and not up to now: what was answered since is not known yet.
        now_s = self._lately[-1].at_s if self._lately else time.monotonic()
        while self._lately and self._lately[0].at_s <= now_s - WINDOW_S:
            self._lately.popleft()
        began_s = now_s if self._start_at_ns is None else self._start_at_ns / 1e9
        span_s = min(WINDOW_S, max(0.0, now_s - began_s)) or WINDOW_S
        offered = (self._due_by(now_s) - self._due_by(now_s - span_s)) / span_s
        achieved = sum(each.answered for each in self._lately) / span_s
        latency_ms = np.concatenate([each.latency_ms for each in self._lately]) if self._lately else np.empty(0)
        p50, p95 = ("-", "-")
        if len(latency_ms):
            both = np.quantile(latency_ms, [0.5, 0.95], method="inverted_cdf")
            p50, p95 = (f"{value:.1f} ms" for value in both)
        return offered, achieved, p50, p95, max((each.lag_ms for each in self._lately), default=0.0)

    def facts(self) -> list[tuple[str, str]]:
        """Return what a person wants to see, each with its name."""
        offered, achieved, p50, p95, lag_ms = self._last_seconds()
        unsent = f" ({self.not_sent:,} never sent)" if self.not_sent else ""
        return [
            ("arrivals ended", f"{self.ended:,} of {self.runs:,}"),
            (f"offered, last {WINDOW_S:g} s", f"{offered:,.1f}/s"),
            ("achieved", f"{achieved:,.1f}/s"),
            ("latency from due, p50", p50),
            ("latency from due, p95", p95),
            ("requests", f"{self.requests:,}"),
            ("errors", f"{self.errors:,}{unsent}"),
            ("send lag, worst", f"{lag_ms:.1f} ms"),
        ]

    def line(self) -> str:
        """Tell it in one plain line."""
        offered, achieved, p50, p95, lag_ms = self._last_seconds()
        return (
            f"{self.ended}/{self.runs} arrivals: offered {offered:.1f}/s, achieved {achieved:.1f}/s, p50 {p50},"
            f" p95 {p95}, {self.errors} errors of {self.requests} requests, send lag {lag_ms:.1f} ms"
        )
