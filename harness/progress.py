"""Shows how far the load is: a live line or panel on a terminal, plain lines otherwise.

Always on stderr: stdout is for results.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import time
from collections.abc import AsyncIterator
from typing import Protocol, TextIO, runtime_checkable

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

SHOW_INTERVAL_S = 0.25
PLAIN_INTERVAL_S = 10.0  # a plain line at least so often, and at every milestone


class Tally:
    """What became of the runs so far."""

    def __init__(self, runs: int) -> None:
        self.runs = runs
        self.completed = 0
        self.failed = 0  # ended otherwise, or could not be created or given their children
        self.timed_out = 0  # not seen final within the poll timeout
        self.requests = 0  # rows so far

    def end_run(self, *, final_status: str | None, timed_out: bool) -> None:
        """Count one run."""
        if final_status == "COMPLETED":
            self.completed += 1
        elif timed_out:
            self.timed_out += 1
        else:
            self.failed += 1

    @property
    def ended(self) -> int:
        """Return how many runs have ended, in whatever way."""
        return self.completed + self.failed + self.timed_out

    def line(self) -> str:
        """Tell it in one plain line."""
        return (
            f"{self.ended}/{self.runs} runs: {self.completed} completed, {self.failed} failed,"
            f" {self.timed_out} timed out; {self.requests} requests"
        )

    @property
    def milestone(self) -> int:
        """Return a number that changes when a plain line is worth it: at every tenth of the runs."""
        return self.ended * 10 // self.runs


class Told(Protocol):
    """What can be shown: a `Tally`, or what a search keeps."""

    @property
    def runs(self) -> int:
        """How many pieces of work there are."""

    @property
    def ended(self) -> int:
        """How many of them are done."""

    @property
    def milestone(self) -> int:
        """A number that changes when a plain line is worth it."""

    def line(self) -> str:
        """Tell it in one plain line."""


@runtime_checkable
class Detailed(Told, Protocol):
    """What has more to show than a line."""

    def facts(self) -> list[tuple[str, str]]:
        """Return what a person wants to see, each with its name."""


class PlainLines:
    """Prints a line when one is worth it, where nobody watches it live."""

    def __init__(self, tally: Told, stream: TextIO, now_s: float) -> None:
        self._tally = tally
        self._stream = stream
        self._milestone = 0
        self._printed_at_s = now_s
        self._printed = ""

    def due(self, now_s: float) -> str | None:
        """Return the line to print at `now_s`, if one is due."""
        milestone = self._tally.milestone
        if milestone == self._milestone and now_s - self._printed_at_s < PLAIN_INTERVAL_S:
            return None
        self._milestone, self._printed_at_s, self._printed = milestone, now_s, self._tally.line()
        return self._printed

    def show(self) -> None:
        """Print the line that is due now, if one is."""
        if (line := self.due(time.monotonic())) is not None:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Print what was reached, unless it was printed already."""
        if (line := self._tally.line()) != self._printed:
            print(line, file=self._stream, flush=True)


class LiveLine:
    """A bar that is drawn anew, for a person at a terminal."""

    def __init__(self, tally: Told, stream: TextIO) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._tally = tally
        # Refreshed from the event loop only: rich's own thread would wake while a request is being stamped.
        self._bar = Progress(*columns, console=Console(file=stream), auto_refresh=False)
        self._task = self._bar.add_task("", total=tally.runs)
        self._bar.start()

    def show(self) -> None:
        """Draw it."""
        tally = self._tally
        self._bar.update(self._task, completed=tally.ended, total=tally.runs, description=tally.line(), refresh=True)

    def close(self) -> None:
        """Draw what was reached, and leave it there."""
        self.show()
        self._bar.stop()


class LivePanel:
    """A bar with figures under it that are drawn anew, for a person at a terminal."""

    def __init__(self, tally: Detailed, stream: TextIO) -> None:
        self._tally = tally
        self._bar = Progress(BarColumn(bar_width=40), MofNCompleteColumn(), TimeElapsedColumn(), auto_refresh=False)
        self._task = self._bar.add_task("", total=tally.runs)
        # Drawn from the event loop, whose process makes no load where there is a panel.
        self._live = Live(console=Console(file=stream), auto_refresh=False, transient=False)
        self._live.start()

    def _panel(self) -> Panel:
        facts = self._tally.facts()
        figures = Table.grid(padding=(0, 2))
        for _ in range(2):
            figures.add_column(style="dim", no_wrap=True)
            figures.add_column(justify="right", no_wrap=True)
        half = (len(facts) + 1) // 2
        for left, right in itertools.zip_longest(facts[:half], facts[half:], fillvalue=("", "")):
            figures.add_row(*left, *right)
        return Panel(Group(self._bar, figures), title="open loop", title_align="left", expand=False)

    def show(self) -> None:
        """Draw it."""
        self._bar.update(self._task, completed=self._tally.ended, total=self._tally.runs)
        self._live.update(self._panel(), refresh=True)

    def close(self) -> None:
        """Draw what was reached, and leave it there."""
        self.show()
        self._live.stop()


def _display(tally: Told, stream: TextIO) -> PlainLines | LiveLine | LivePanel:
    if not stream.isatty():
        return PlainLines(tally, stream, time.monotonic())
    return LivePanel(tally, stream) if isinstance(tally, Detailed) else LiveLine(tally, stream)


@contextlib.asynccontextmanager
async def shown(tally: Told, stream: TextIO | None = None) -> AsyncIterator[None]:
    """Show the tally on `stream` (stderr) while the block runs."""
    stream = stream or sys.stderr
    display = _display(tally, stream)

    async def keep_showing() -> None:
        while True:
            await asyncio.sleep(SHOW_INTERVAL_S)
            display.show()

    showing = asyncio.create_task(keep_showing())
    try:
        yield
    finally:
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)
        display.close()
