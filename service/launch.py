"""Becomes another program that ends when its parent does; run by its path, never imported.

`python -I -S launch.py PARENT DEATH_SIGNAL ACCOUNT -- COMMAND…` takes the account (`uid:gid`, or `-` to stay), asks the
kernel to send the signal when the parent dies (Linux; 0 asks for nothing), and turns into the command. The order
matters: a change of user clears the request, turning into another program keeps it (prctl(2), PR_SET_PDEATHSIG).
A process of its own does this because code between fork and exec may not run safely in a process with threads.
Only the standard library is used here, so that it starts in a few milliseconds. Its caller: `processes.spawn`.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
NOT_STARTED = 127  # what a shell answers for a command that it cannot run


def main() -> None:
    """Turn into the command; ends with 127 and one line on standard error when that is impossible."""
    parent, death_signal, account = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    command = sys.argv[5:]
    try:
        if account != "-":
            uid, gid = (int(part) for part in account.split(":"))
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
        if death_signal and sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
            if os.getppid() != parent:  # it died before it was asked for
                sys.exit(NOT_STARTED)
        os.execvp(command[0], command)  # noqa: S606 - no shell is what is wanted
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        sys.exit(NOT_STARTED)


if __name__ == "__main__":
    main()
