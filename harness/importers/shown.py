"""How far an import is, for a person: a live bar on a terminal, plain lines otherwise. Always on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_INTERVAL_S = 10.0

Tell = Callable[[int, int], None]
"""Takes the bytes read so far and the rows written so far."""


@contextlib.contextmanager
def shown(size: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> Iterator[Tell]:
    """Show the reading of a file of `size` bytes while the block runs."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield _plain(size, stream, clock)
        return
    columns = (BarColumn(), DownloadColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(file=stream), auto_refresh=False) as bar:
        task = bar.add_task("", total=size)

        def tell(bytes_read: int, rows: int) -> None:
            bar.update(task, completed=min(bytes_read, size), description=f"{rows:,} rows", refresh=True)

        yield tell


def _plain(size: int, stream: TextIO, clock: Callable[[], float]) -> Tell:
    printed_at_s = clock()

    def tell(bytes_read: int, rows: int) -> None:
        nonlocal printed_at_s
        if clock() - printed_at_s < PLAIN_INTERVAL_S:
            return
        printed_at_s = clock()
        print(f"{min(bytes_read / size, 1.0):.0%} read: {rows:,} rows", file=stream, flush=True)

    return tell
