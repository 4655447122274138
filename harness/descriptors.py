"""How many files this process may have open: raised to what the connections of a load need, or refused in one line."""

from __future__ import annotations

import resource

from harness.errors import BadUsage

SPARE_DESCRIPTORS = 64  # files, pipes and the preparing connections


def allow_connections(count: int, flag: str) -> None:
    """Raise the limit of open files to what `count` connections need, also of processes started later, or refuse.

    Raises BadUsage, which names the flag that makes them fewer.
    """
    needed = count + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise BadUsage(f"{flag} {count} needs {needed} open files and {hard} are allowed here: give a smaller one")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
