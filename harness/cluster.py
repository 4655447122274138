"""Sends from the workers of a Dask cluster that is there already: `harness run --arrivals … --dask tcp://host:port`.

    ClusterCrew (this process)                       Outpost (a Dask actor on each worker; `outpost`)
      survey    is every worker able?         ───>   the same harness, by the digest of its code
      muster    an Order each                 ───>   a sender process (`sender`), connections opened ──> Arrived
                whose clock is where?         <──>   ROUND_TRIPS questions (`clocks`)
      go        one start instant, moved by   ───>   arrival k is begun by sender k mod N, as on one machine
                each clock's offset
      told      reports, Parquet files        <───   Word; rows are stamped by the clock of this machine
      end       whose clock is where now?     <──>   and away

**Invariants** are those of `openloop`. Senders on different machines begin at one instant but for the uncertainty of
their clocks, which is in the manifest; latencies are differences of one machine's stamps and have no part in it.

**What can fail, and how it shows.** No scheduler, no workers, a worker with other code: HarnessError before any load. A
worker that dies or falls silent: SenderFailed, with all that it had told until a second before. A clock that ran away
meanwhile, or is known too badly: `analysis/alignment` refuses the measurement.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import logging
import pkgutil
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from harness import machine
from harness.beside import end
from harness.clocks import Offset, measure_offset
from harness.crew import KEPT, READY_S, UNDONE, Sender, SenderFailed, Told
from harness.errors import BadUsage, HarnessError, ServiceUnreachable
from harness.outpost import Arrived, Order, Outpost, Word
from harness.recorder import Recorder
from harness.sampleset import SenderClock
from harness.sender import Job
from harness.storage import Storage

CONNECT_S = 10.0  # for a scheduler to answer
SILENT_S = 10.0  # a worker that is asked answers within a second (`outpost.WORD_S`), or is lost
ADDRESS = re.compile(r"(tcp|tls|ws|wss)://(\[[0-9a-fA-F:.]+\]|[^\s/:@\[\]]+):[0-9]{1,5}")


class ClusterFailed(HarnessError):
    """The cluster cannot be used as it is."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cluster:
    """Which workers of which cluster send."""

    scheduler: str
    workers: tuple[str, ...]  # addresses, one sender on each
    storage: Storage | None  # where they leave their rows; null: they send them home


def identity() -> str:
    """Return what two machines must have in common to make one load: the code that makes it."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    version = machine.versions().get("plimsoll", "from source")
    return f"{version}, code {digest.hexdigest()[:12]}"


def survey(scheduler: str, wanted: int | None, storage: str | None) -> Cluster:
    """Choose so many workers of a cluster, all of them when no number is given, and see that each is able.

    Raises BadUsage for what the caller can mend and ClusterFailed for what the cluster lacks.
    """
    if not ADDRESS.fullmatch(scheduler):
        raise BadUsage(f"--dask {scheduler} is no address of a scheduler: give tcp://host:port")
    place = None if storage is None else Storage(storage)
    return Cluster(scheduler, asyncio.run(_able_workers(scheduler, wanted)), place)


@contextlib.asynccontextmanager
async def _connected(scheduler: str) -> AsyncIterator[Any]:
    """Connect to the scheduler; raises ClusterFailed, or BadUsage where `distributed` is not installed."""
    try:
        import distributed
    except ImportError:
        raise BadUsage("--dask needs the package distributed: install the harness with its extra `cluster`") from None
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what goes wrong is told once, by whoever waits for it
    client: Any = distributed.Client(  # type: ignore[no-untyped-call]
        scheduler, asynchronous=True, timeout=CONNECT_S
    )
    try:
        try:
            await client
        except (OSError, ValueError) as fault:
            raise ClusterFailed(f"cannot reach the Dask scheduler at {scheduler}: {_line(fault)}") from None
        yield client
    finally:
        await client.close()


async def _able_workers(scheduler: str, wanted: int | None) -> tuple[str, ...]:
    async with _connected(scheduler) as client:
        found = spread(list((await client.scheduler.identity(n_workers=-1))["workers"]))
        if not found:
            raise ClusterFailed(f"the cluster at {scheduler} has no workers: start some with `dask worker {scheduler}`")
        if wanted is not None and wanted > len(found):
            raise BadUsage(f"--workers {wanted} is more than the {len(found)} of the cluster at {scheduler}")
        chosen = found[:wanted]
        # By its name first, from the standard library: a worker that lacks the harness can say so.
        named = await client.run(pkgutil.resolve_name, "harness.cluster:identity", workers=chosen, on_error="return")
        for address, answer in sorted(named.items()):
            if isinstance(answer, BaseException):
                raise ClusterFailed(f"worker {address} cannot load the harness ({_line(answer)}): install it there")
        here = identity()
        for address, theirs in sorted((await client.run(identity, workers=chosen, on_error="return")).items()):
            if theirs != here:
                said = _line(theirs) if isinstance(theirs, BaseException) else theirs
                raise ClusterFailed(f"worker {address} has another harness ({said}) than this machine ({here})")
        return tuple(chosen)


def spread(addresses: Sequence[str]) -> list[str]:
    """Return the addresses so that few of them are on as many machines as can be: the first of each, the second, …"""
    machines: dict[str, list[str]] = {}
    for address in sorted(addresses):
        machines.setdefault(address.rpartition(":")[0], []).append(address)
    rows = itertools.zip_longest(*machines.values())
    return [address for row in rows for address in row if address is not None]


class ClusterCrew:
    """Senders on a cluster."""

    start_lead_s = 1.0  # every sender has heard of it by then, also of a busy scheduler
    shares_descriptors = False

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._close = contextlib.AsyncExitStack()
        self._senders: list[_FarSender] = []
        self._recorder: Recorder | None = None

    def parameters(self) -> dict[str, Any]:
        """Return what the manifest keeps of it."""
        return {"dask": self._cluster.scheduler}

    async def muster(self, jobs: Sequence[Job], recorder: Recorder) -> Sequence[Sender]:
        """Send an outpost to a worker for each job, and compare clocks when all have their connections."""
        self._recorder = recorder
        storage = None if self._cluster.storage is None else self._cluster.storage.below(recorder.path.name)
        recorder.stored = None if storage is None else storage.url
        try:
            client = await self._close.enter_async_context(_connected(self._cluster.scheduler))
            for job, address in zip(jobs, self._cluster.workers, strict=True):
                order = Order(
                    job=job,
                    measurement_id=recorder.measurement_id,
                    mode=recorder.mode,
                    scenario=recorder.scenario,
                    storage=recorder.stored,
                )
                self._senders.append(_FarSender(client, address, order))
            await self._arrive()
            for sender in self._senders:  # one by one: they would lengthen each other's round trips
                await sender.compare_clocks()
        except BaseException:
            await asyncio.gather(*(sender.end() for sender in self._senders), return_exceptions=True)
            await self._close.aclose()
            raise
        recorder.senders = tuple(sender.clock() for sender in self._senders)
        return self._senders

    async def _arrive(self) -> None:
        arriving = [asyncio.create_task(sender.arrive()) for sender in self._senders]
        try:
            await asyncio.gather(*arriving)
        finally:
            await end(arriving)

    async def dismiss(self) -> None:
        """Note how the clocks stand now, and leave the cluster."""
        if self._recorder is not None:
            self._recorder.senders = tuple(sender.clock() for sender in self._senders)
        await self._close.aclose()


class _FarSender:
    """One sender on a worker of the cluster."""

    def __init__(self, client: Any, address: str, order: Order) -> None:
        self.worker = order.job.worker
        self._client = client
        self._address = address
        self._order = order
        self._outpost: Any = None  # a Dask actor
        self._machine: dict[str, Any] = {}
        self._before: Offset | None = None
        self._after: Offset | None = None
        self._asking: asyncio.Task[bytes] | None = None
        self._pending: list[Told] = []
        self._lost = False  # it gave no answer once; Dask would wait for it to come back
        self._fault: str | None = None

    async def arrive(self) -> None:
        """Set up the outpost and wait for its connections; raises ServiceUnreachable or SenderFailed."""
        future = self._client.submit(
            Outpost, actor=True, workers=[self._address], allow_other_workers=False, pure=False, retries=0
        )
        self._outpost = await self._within(READY_S, future)
        answer = await self._within(
            READY_S + SILENT_S, self._outpost.prepare(msgspec.msgpack.encode(self._order)),
        )  # fmt: skip
        arrived = msgspec.msgpack.decode(answer, type=Arrived)
        self._machine = arrived.machine
        if arrived.fault is not None and arrived.unreachable:
            what = f"open connections to {self._order.job.url} from the worker {self._address}"
            raise ServiceUnreachable(what, arrived.fault)
        if arrived.fault is not None:
            raise self._failed(arrived.fault)

    async def compare_clocks(self) -> None:
        """Find out how far its clock is from ours; raises SenderFailed."""
        offset = await self._offset()
        if self._before is None:
            self._before = offset
        else:
            self._after = offset

    async def _offset(self) -> Offset:
        async def ask() -> int:
            return int(await self._asked("now"))

        return await measure_offset(ask)

    def clock(self) -> SenderClock:
        """Return what is known of its clock."""
        assert self._before is not None  # noqa: S101 - the crew compares clocks before anybody asks
        after = self._after
        return SenderClock(
            worker=self.worker,
            offset_us=self._before.ns / 1e3,
            uncertainty_us=self._before.uncertainty_ns / 1e3,
            round_trips=self._before.round_trips,
            end_offset_us=None if after is None else after.ns / 1e3,
            end_uncertainty_us=None if after is None else after.uncertainty_ns / 1e3,
            machine=self._machine,
        )

    async def go(self, start_at_ns: int) -> None:
        """Tell it the instant from which the schedule counts, on our clock."""
        assert self._before is not None  # noqa: S101 - clocks were compared when it arrived
        await self._asked("go", start_at_ns, self._before.ns)

    async def stop(self) -> None:
        """Tell it to end before the schedule does."""
        await self._asked("stop")

    async def told(self) -> Told:
        """Return what it tells next; raises SenderFailed when it tells no more."""
        while not self._pending:
            if self._fault is not None:
                raise self._failed(self._fault)
            # Kept until it has come: who waits may be cancelled in between, and another reads on.
            self._asking = self._asking or asyncio.create_task(self._asked("word"))
            answer = await asyncio.shield(self._asking)
            self._asking = None
            word = msgspec.msgpack.decode(answer, type=Word)
            self._pending, self._fault = word.told, word.fault
        return self._pending.pop(0)

    async def end(self) -> None:
        """Ask its clock once more and see it out, where it is still there."""
        if self._outpost is None:
            return
        with contextlib.suppress(SenderFailed):
            if self._before is not None:
                await self.compare_clocks()
            await self._asked("end")
        self._outpost = None
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    async def _asked(self, method: str, *words: object) -> Any:
        """Ask the outpost; raises SenderFailed when no answer comes."""
        if self._lost:
            raise self._failed(f"was lost {UNDONE}; {KEPT}")
        try:
            question = getattr(self._outpost, method)(*words)
        except RuntimeError:  # the cluster knows already that it was lost
            self._lost = True
            raise self._failed(f"was lost {UNDONE}; {KEPT}") from None
        return await self._within(SILENT_S, question)

    async def _within(self, seconds: float, answer: Any) -> Any:
        try:
            async with asyncio.timeout(seconds):
                return await answer
        except TimeoutError:
            self._lost = True
            raise self._failed(f"was silent for {seconds:g} s {UNDONE}; {KEPT}") from None
        except Exception as fault:
            # Of the cluster's many errors each means that it is not there any more.
            self._lost = True
            raise self._failed(f"was lost {UNDONE} ({_line(fault)}); {KEPT}") from None

    def _failed(self, what: str) -> SenderFailed:
        return SenderFailed(self.worker, f"on {self._address} {what}")


def _line(fault: BaseException) -> str:
    """Return an error in one line."""
    return " ".join(str(fault).split()) or type(fault).__name__
