"""How a process of ours conducts itself: which signals it heeds, and how seldom its garbage collector looks."""

from __future__ import annotations

import gc
import signal


def heeds_hangup() -> bool:
    """Tell whether SIGHUP should stop this process: not when it was started with `nohup`."""
    return signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN


def calm_collector() -> None:
    """Have the garbage collector look seldom, and never at what start-up made, which lives as long as the process.

    Its default settings cost tail latency and find nothing: what a request or a batch makes has no cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
