"""How a child process tells its supervisor that it does its work: one byte on a pipe that it inherited.

The supervisor (`supervisor`) must know, because it replaces a process only by one that works. A process that nobody
supervises has no pipe and tells nobody.
"""

from __future__ import annotations

import os

READY_FD = "PLIMSOLL_READY_FD"
"""The environment variable that names the pipe's writing end."""


def tell_ready() -> None:
    """Say once that this process works from now on."""
    number = os.environ.pop(READY_FD, None)
    if number is None:
        return
    try:
        os.write(int(number), b"1")
        os.close(int(number))
    except (OSError, ValueError):  # nobody listens: what told us of the pipe was not a supervisor of ours
        return
