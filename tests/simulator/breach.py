"""How a broken promise is told."""

from __future__ import annotations

from service.pen import RunRow


class Broken(AssertionError):
    """A promise of the engine does not hold."""

    episode = 0  # of a simulation, counted from 1


class Breach(BaseException):
    """The same, on its way out through the engine: no Exception, or that would take it for a fault of the database."""


def require(holds: bool, run: RunRow, what: str) -> None:
    """Raise Breach with the run unless a promise holds."""
    if not holds:
        raise Breach(f"run {run.run_id} {what}: {run}")
