"""Makes one measurement from the first check to the closed sample set.

Whatever can be refused is refused before any load is made; whatever was started is stopped on every way out.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from harness.api import Api
from harness.client import Client
from harness.errors import BadUsage, ExitCode, HarnessError
from harness.progress import Told, shown
from harness.recorder import Recorder, require_writable
from harness.resources import Resources
from harness.sample import Mode
from harness.target import Target

METRICS_TIMEOUT_S = 2.0  # a look at the machine is due every second; one may be lost, not more
SPARE_DESCRIPTORS = 64  # files, pipes and the preparing connections


class Interrupted(HarnessError):
    """The measurement was ended from outside; what was recorded is kept in `path`."""

    exit_code = ExitCode.INTERRUPTED

    def __init__(self, path: Path) -> None:
        super().__init__(f"interrupted; what was recorded is in {path}, and is not complete")
        self.path = path


class Load(Protocol):
    """What makes the load of a plan."""

    @property
    def tally(self) -> Told:
        """How far it is."""

    async def prepare(self) -> None:
        """Make what the load needs, before anything is measured."""

    async def carry_out(self) -> None:
        """Make the whole load."""


class Wanted(Protocol):
    """A plan that can be measured: `generator.Plan`, `burst_limits.BurstPlan`."""

    @property
    def mode(self) -> Mode:
        """How the load is made."""

    @property
    def scenario(self) -> str:
        """The name of what is done."""

    @property
    def connections(self) -> int:
        """How many connections may be open at once."""

    @property
    def connections_flag(self) -> str:
        """The flag that makes them fewer."""

    def parameters(self) -> dict[str, Any]:
        """Return the plan as the manifest keeps it."""

    def load(
        self, client: Client, api: Api, recorder: Recorder, resources: Resources, check: Callable[[], None]
    ) -> Load:
        """Return what carries it out."""


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """Where the rows are."""

    path: Path
    complete: bool  # every planned request has its row


def measure(plan: Wanted, target: AbstractContextManager[Target], samples_root: Path) -> Measured:
    """Measure and return the sample set.

    Raises BadUsage for what the caller can mend, another HarnessError when the measurement could not be made, and
    Interrupted on Ctrl-C or SIGTERM, after the runs under way were cancelled.
    """
    require_writable(samples_root)
    _allow_connections(plan)
    with terminate_as_interrupt(), target as service:
        try:
            return asyncio.run(_measure(plan, service, samples_root))
        except asyncio.CancelledError:  # SIGTERM while the workspaces were being made
            raise KeyboardInterrupt from None
        finally:
            _interrupt_on_terminate()  # the loop took the signal for itself


async def _measure(plan: Wanted, target: Target, samples_root: Path) -> Measured:
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - asyncio.run made it
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    client, watcher = Client(target.url), Client(target.url, METRICS_TIMEOUT_S)
    recorder = Recorder(samples_root, plan.mode, plan.scenario, plan.parameters() | {"target": target.name})
    resources = Resources(Api(watcher, target.token), target.pids)
    api = Api(client, target.token)
    load = plan.load(client, api, recorder, resources, target.check)
    try:
        try:
            await load.prepare()
            recorder.note_quota_revision(await api.active_revision())
        except BaseException:
            recorder.discard()
            raise
        return await _record(load, recorder)
    finally:
        await client.close()
        await watcher.close()


async def _record(load: Load, recorder: Recorder) -> Measured:
    """Carry the load out and close the set, complete or not."""
    try:
        async with shown(load.tally):
            await load.carry_out()
    except asyncio.CancelledError:
        recorder.finish(complete=False)
        raise Interrupted(recorder.path) from None
    except HarnessError:
        with contextlib.suppress(OSError):  # a full disk is why we are here: its parts are readable as they are
            recorder.finish(complete=False)
        raise
    return Measured(recorder.path, recorder.finish(complete=True).complete)


def _interrupt_on_terminate() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that a stack being started or stopped is not left behind."""
    before = signal.getsignal(signal.SIGTERM)
    _interrupt_on_terminate()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _allow_connections(plan: Wanted) -> None:
    """Raise this process's limit of open files to what the plan's connections need, or refuse."""
    needed = plan.connections + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise BadUsage(
            f"{plan.connections_flag} {plan.connections} needs {needed} open files and {hard} are allowed here:"
            " give a smaller one"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
