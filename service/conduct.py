"""How a process of ours conducts itself: which signals it heeds, and how seldom its garbage collector looks."""

from __future__ import annotations

import contextlib
import gc
import signal
from collections.abc import Iterator


def heeds_hangup() -> bool:
    """Tell whether SIGHUP should stop this process: not when it was started with `nohup`."""
    return signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN


@contextlib.contextmanager
def calm_collector() -> Iterator[None]:
    """Have the garbage collector look seldom, and never at what start-up made, which lives as long as the service.

    Its default settings cost tail latency and find nothing: what a request or a batch makes has no cycles. All is as
    before afterwards: the interpreter's end frees what is not frozen, and C extensions complain of the rest.
    """
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
