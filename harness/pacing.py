"""Wakes a sending loop at absolute instants of the monotonic clock.

On Linux by a timerfd, which the event loop waits for like for a socket: the kernel's own timer, some 60 µs exact, and
no rounding to milliseconds as in the loop's own timers. Elsewhere by the loop's timers, set to the same absolute
instants; they are later by a millisecond or two, and each row shows by how much. Neither ever waits relative to "now",
so a late wake-up delays nothing that comes after it. What is sent then is `sender`'s business.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable
from typing import Protocol


class Alarm(Protocol):
    """Calls back once at the instant it was set to, or later; never before."""

    def set(self, at_ns: int) -> None:
        """Wake at this monotonic instant instead of any set before; at once when it has passed."""

    def close(self) -> None:
        """Wake never again."""


def alarm(wake: Callable[[], None]) -> Alarm:
    """Return the most exact alarm that this platform has. Belongs to the running event loop."""
    return TimerFd(wake) if sys.platform == "linux" else LoopAlarm(wake)


class _Spec(ctypes.Structure):
    """`struct itimerspec` of timerfd_settime(2)."""

    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class TimerFd:
    """A timerfd by ctypes: Python has `os.timerfd_create` from 3.13 on only."""

    _NONBLOCK_CLOEXEC = os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)  # TFD_NONBLOCK, TFD_CLOEXEC have these values
    _ABSOLUTE = 1  # TFD_TIMER_ABSTIME

    def __init__(self, wake: Callable[[], None]) -> None:
        """Raise OSError when the kernel gives none."""
        self._wake = wake
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = self._libc.timerfd_create(time.CLOCK_MONOTONIC, self._NONBLOCK_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._spec = _Spec()
        self._pointer = ctypes.byref(self._spec)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._ring)

    def set(self, at_ns: int) -> None:
        """Wake at this monotonic instant instead of any set before; at once when it has passed."""
        # An instant of 0 would disarm it.
        self._spec.value_s, self._spec.value_ns = divmod(max(1, at_ns), 1_000_000_000)
        if self._libc.timerfd_settime(self._fd, self._ABSOLUTE, self._pointer, None) < 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def close(self) -> None:
        """Wake never again."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it was set anew between the kernel's ring and this call
            os.read(self._fd, 8)
            self._wake()


class LoopAlarm:
    """The event loop's own timer, for platforms without a timerfd."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None

    def set(self, at_ns: int) -> None:
        """Wake at this monotonic instant instead of any set before; at once when it has passed."""
        self.close()
        self._handle = self._loop.call_later(max(0.0, (at_ns - time.monotonic_ns()) / 1e9), self._ring, at_ns)

    def close(self) -> None:
        """Wake never again."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _ring(self, at_ns: int) -> None:
        if time.monotonic_ns() < at_ns:  # loops round to their clock's resolution, also downwards
            self.set(at_ns)
            return
        self._handle = None
        self._wake()
