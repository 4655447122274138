"""What an open loop shows of itself."""

import io
import time
from pathlib import Path

import numpy as np

from harness.openview import OpenTally, glimpse_of
from harness.progress import LivePanel, shown
from harness.sample import Endpoint, Outcome
from harness.samplebuffer import NAN, UNKNOWN, Batch, SampleBuffer
from harness.selfwatch import Strain
from harness.sender import Report

SECOND = 10**9


class Clock:
    def __init__(self, monkeypatch) -> None:  # type: ignore[no-untyped-def]
        self.now_s = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)


def report(*requests: tuple[Endpoint, float, Outcome], lag_ms: float = 0.5) -> tuple[Batch, Report]:
    """What a sender tells: endpoint, latency and outcome of each request."""
    buffer = SampleBuffer()
    for endpoint, latency_ms, outcome in requests:
        done = 0 if outcome is Outcome.NOT_SENT else round(latency_ms * 1e6)
        buffer.append(
            1, 0, endpoint, 10.0, 0, 0, 0, 0, 0, done, 200, outcome, None, (NAN,) * 4, UNKNOWN, UNKNOWN
        )  # fmt: skip
    strain = Strain(lag_ms, None, None, 0.0)
    told = Report(chunks=[], errors=[], runs=[], live=[], planned=0, begun=0, strain=strain, last=False)
    return buffer.take(), told


def test_rates_and_latencies_are_of_the_last_five_seconds(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    clock = Clock(monkeypatch)
    tally = OpenTally(np.arange(200, dtype=np.int64) * SECOND // 10, follow_up=False)
    tally.begin(100 * SECOND)
    clock.now_s = 101.0
    batch, told = report(*[(Endpoint.CREATE, 900.0, Outcome.OK)] * 10, lag_ms=7.0)
    tally.take(glimpse_of(batch.rows()), told)
    clock.now_s = 108.0
    answered = [(Endpoint.CREATE, float(ms), Outcome.OK) for ms in range(1, 20)]
    batch, told = report(*answered, (Endpoint.CREATE, 20.0, Outcome.HTTP_ERROR), (Endpoint.SNAPSHOT, 5e3, Outcome.OK))
    tally.take(glimpse_of(batch.rows()), told)
    assert tally.line() == (
        "31/200 arrivals: offered 10.0/s, achieved 3.8/s, p50 10.0 ms, p95 19.0 ms, 1 errors of 31 requests, send lag"
        " 0.5 ms"
    )
    assert tally.milestone == 1


def test_before_the_first_report_nothing_is_claimed() -> None:
    tally = OpenTally(np.zeros(5, dtype=np.int64), follow_up=True)
    assert tally.line() == (
        "0/5 arrivals: offered 0.0/s, achieved 0.0/s, p50 -, p95 -, 0 errors of 0 requests, send lag 0.0 ms"
    )


async def test_a_terminal_gets_a_panel_with_every_figure(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    tally = OpenTally(np.arange(3, dtype=np.int64), follow_up=False)
    async with shown(tally, stream):
        batch, told = report((Endpoint.CREATE, 2.0, Outcome.OK), (Endpoint.CREATE, 2.0, Outcome.NOT_SENT))
        tally.take(glimpse_of(batch.rows()), told)
    drawn = stream.getvalue()
    for name, value in tally.facts():
        assert name in drawn
        assert value in drawn
    assert "1 (1 never sent)" in drawn


def test_a_panel_is_drawn_anew_in_its_place() -> None:
    stream = io.StringIO()
    panel = LivePanel(OpenTally(np.zeros(1, dtype=np.int64), follow_up=False), stream)
    panel.show()
    panel.close()
    assert "open loop" in stream.getvalue()
