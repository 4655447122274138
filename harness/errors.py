"""Every way in which the harness itself fails, each with the exit code that a CI job sees.

A failing *service* is never one of these: that is an outcome in a row (see `sample.Outcome`). Sample sets that cannot
be read have their own branch of this tree in `sampleset`.
"""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """What a CI job reads. The meanings are the contract's; the first that holds wins."""

    PASSED = 0  # all that was asked for was done, and every gate asked for passed
    SLO_FAILED = 1  # some SLO failed
    INVALID = 2  # the measurement cannot be trusted, or could not be made
    INCONCLUSIVE = 3  # not enough data for a verdict, or nothing applicable
    USAGE = 64  # bad usage: a flag, a path, a parameter
    INTERRUPTED = 130  # Ctrl-C, as shells number it


class HarnessError(Exception):
    """Something of the harness's own went wrong. Its text is one plain line; `exit_code` says what a CI job sees."""

    exit_code = ExitCode.INVALID


class BadUsage(HarnessError):
    """What the caller gave cannot be used; the text names it and the mend."""

    exit_code = ExitCode.USAGE


class ServiceUnreachable(HarnessError):
    """The service did not answer a call that prepares the measurement."""

    def __init__(self, what: str, fault: str) -> None:
        super().__init__(f"cannot {what}: {fault}")
        self.what = what
        self.fault = fault


class ServiceDeclined(HarnessError):
    """The service answered a call that prepares the measurement with an error."""

    def __init__(self, what: str, status: int, fault: str) -> None:
        super().__init__(f"cannot {what}: the service answered {status} ({fault})")
        self.what = what
        self.status = status
        self.fault = fault


class TokenDeclined(ServiceDeclined):
    """The token given may not prepare a measurement (401 or 403): give an installation token."""

    exit_code = ExitCode.USAGE


class StackFailed(HarnessError):
    """The embedded stack did not start, or stopped while it was needed. Carries the last lines it wrote."""

    def __init__(self, fault: str, last_lines: list[str]) -> None:
        told = f"; its last lines were: {' | '.join(last_lines)}" if last_lines else ""
        super().__init__(fault + told)
        self.last_lines = last_lines
