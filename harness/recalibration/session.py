"""One recalibration, from the first check to what the service decided: burst limits, capacity, notebook, hand-in.

What can be refused is refused before any load is made. Nothing is measured that was not named: without `--url` a stack
of the harness's own, and a service that takes the same tokens as the one whose quotas are to change only when told so.
Where no such service is named or runs, the own stack is recalibrated itself, to its end: it is nobody's production.

Each step is written down when it is whole and valid (`progress`), so that a killed recalibration is gone on with. The
service knows meanwhile that somebody measures (`inforce.Place`); `--dry-run` does not tell it, and asks it only what it
would decide.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from harness.burst_limits import read_limits
from harness.capacity import read_capacity
from harness.errors import BadUsage, ExitCode, HarnessError
from harness.folders import NOTEBOOKS, data_folder, data_folder_of_checkout, find_in_checkout, keep_caches_here
from harness.machine import commit
from harness.measurement import Interrupted, Wanted, measure, terminate_as_interrupt
from harness.notebooks import find_notebooks
from harness.quotaparameters import NOTEBOOK
from harness.recalibration import progress
from harness.recalibration.command import Wish
from harness.recalibration.inforce import InForce, Place, Stand, is_named, of_stack
from harness.recorder import require_writable
from harness.target import Target, await_the_last, named_target, own_stack
from service.quota.tables import parse, write

BURSTS, CAPACITY = "burst-limits", "capacity"
REVISION = "quota_revision.json"  # in the report's folder: what is proposed, with its evidence
IN_FORCE = "quotas_in_force.json"  # in the report's folder: what the proposal was compared with
NOTHING = "nothing proposed"
TOO_LATE = "nothing proposed, the generator could not keep up"
AT_ONCE = ("--unattended", "--shadow-minutes", "0", "--canary-minutes", "0", "--watch-minutes", "0")
"""How an own stack's proposal is carried out: nobody uses it who could be hurt."""

OWN_WAIT_S = 300.0  # its worker looks once a minute
LOOK_EVERY_S = 5.0
GAP = "gap: "


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of it."""

    samples: dict[str, str]  # step -> folder
    report: str  # folder
    decided: dict[str, Any]  # what the service said: phase, revision, a sentence for each rate or doubt
    stand: Stand | None  # after waiting; null when nobody waited

    @property
    def exit_code(self) -> ExitCode:
        """Return 2 for a measurement that is not believed, 3 when it says nothing about any rate, else 0."""
        is_doubted = any(name.startswith("doubt about ") for name in self.decided)
        if is_doubted or self.decided["phase"] == TOO_LATE:
            return ExitCode.INVALID
        rates = [value for name, value in self.decided.items() if name not in ("recalibration", "revision", "phase")]
        says_nothing = bool(rates) and all(value.startswith(GAP) for value in rates)
        is_open = self.decided["phase"] == NOTHING or says_nothing
        return ExitCode.INCONCLUSIVE if is_open else ExitCode.PASSED

    def document(self) -> dict[str, Any]:
        """Return it for `--json`."""
        told = {"samples": self.samples, "report": self.report, **self.decided}
        return told if self.stand is None else {**told, "stands": msgspec.to_builtins(self.stand)}

    def lines(self) -> list[str]:
        """Return it for a person."""
        told = [f"samples: {path}" for path in self.samples.values()]
        told += [f"report: {self.report}", *(f"{name}: {value}" for name, value in self.decided.items())]
        if self.stand is not None:
            told.append(f"stands: {self.stand.phase}")
        return told


def recalibrate(wish: Wish) -> Outcome:
    """Carry it out. Raises HarnessError."""
    find_notebooks([NOTEBOOK], find_in_checkout(NOTEBOOKS))
    samples_root, folder = data_folder() / "samples", data_folder() / "recalibration"
    require_writable(samples_root)
    keep_caches_here()
    with terminate_as_interrupt(), contextlib.ExitStack() as stack:
        if not wish.dry_run:
            stack.enter_context(progress.alone(folder))
        target, service, is_own = _sides(wish, stack)
        done = progress.Progress({}, 0.0)
        if not wish.dry_run:
            wanted = wish.settings() | {"commit": commit(), "own": is_own}
            done = progress.read(folder, msgspec.to_builtins(wanted))
            if (decided := _handed_in_before(service, done)) is not None:
                progress.forget(folder)
                return decided
        session = _Session(wish, target, service, folder, done, AT_ONCE + wish.plan if is_own else wish.plan)
        with session.place() as place:
            decided = session.carry_out(place, samples_root)
        stand = None
        wait_s = (OWN_WAIT_S if is_own else 0.0) if wish.wait_s is None else wish.wait_s
        if not wish.dry_run and wait_s:
            stand = _await_its_end(service, target, wait_s)
            if is_own and stand.phase == "waiting" and stand.revision is not None:
                service.reject(stand.revision, "nobody uses this stack, so nobody could object to lower rates")
                stand = service.stand()
        return dataclasses.replace(decided, stand=stand)


def _sides(wish: Wish, stack: contextlib.ExitStack) -> tuple[Target, InForce, bool]:
    """Return what is measured, whose quotas are to change, and whether both are an own stack."""
    named = is_named()
    if wish.url is not None:
        target = named_target(wish.url, wish.token)
        if not named:
            raise BadUsage("--url is what is measured, and no service is named whose quotas could change: set"
                           " DATABASE_URL and REDIS_URL, or start this checkout's with `make up`")  # fmt: skip
        service = InForce(os.environ)
        service.table()
        if not wish.same_service and service.knows(target.token):
            raise BadUsage(f"--url {target.url} takes a token of the service whose quotas are to change, so it is that"
                           " service: name a staging one, or give --same-service to load it all the same")  # fmt: skip
        return target, service, False
    if named:
        service = InForce(os.environ)
        service.table()
        return stack.enter_context(own_stack(data_folder() / "stack")), service, False
    _say("no service is named or runs here: the embedded stack is measured, and its own quotas are recalibrated")
    stacks = data_folder() / "stack" / "recalibration"
    await_the_last(stacks)  # of a harness that was killed just now: its quotas are those to go on with
    target = stack.enter_context(own_stack(stacks))
    assert target.folder is not None  # noqa: S101 - an own stack has one
    return target, of_stack(target.folder), True


def _handed_in_before(service: InForce, done: progress.Progress) -> Outcome | None:
    """Return what became of a measurement that was handed in by a process that was killed right then."""
    if done.recalibration is None or done.report is None:
        return None
    stand = service.stand()
    if stand.recalibration != done.recalibration or stand.phase in ("measuring", "abandoned"):
        return None
    _say(f"recalibration {done.recalibration} was handed in before: it stands at {stand.phase}")
    told = {"recalibration": stand.recalibration, "revision": stand.revision, "phase": stand.phase}
    return Outcome(done.samples, done.report, told, stand)


class _Session:
    """The steps, each of which may be done already."""

    def __init__(
        self,
        wish: Wish,
        target: Target,
        service: InForce,
        folder: Path,
        done: progress.Progress,
        plan: tuple[str, ...],
    ) -> None:
        self._wish = wish
        self._target = target
        self._service = service
        self._folder = folder
        self._done = done
        self._plan = plan

    @contextlib.contextmanager
    def place(self) -> Iterator[Place | None]:
        """Hold the service's one place for whoever measures; none is needed for a dry run."""
        if self._wish.dry_run:
            yield None
            return
        again = self._done.recalibration
        stand = self._service.stand()
        if again is not None and not (stand.recalibration == again and stand.phase == "measuring"):
            again = None  # its lease was over, and somebody noticed
        flags = [] if again is None else ["--recalibration", str(again)]
        with self._service.measuring([*flags, *self._plan]) as place:
            self._done.recalibration = place.recalibration
            self._keep()
            try:
                yield place
            except (Interrupted, KeyboardInterrupt):  # to be gone on with
                raise
            except BaseException:
                place.give_up()
                self._done.recalibration = None
                self._keep()
                raise

    def carry_out(self, place: Place | None, samples_root: Path) -> Outcome:
        """Do what is not done, and hand it in."""
        target = self._target if place is None else _checked_too(self._target, place)
        steps: tuple[tuple[str, Wanted], ...] = ((BURSTS, self._wish.bursts), (CAPACITY, self._wish.capacity))
        for name, plan in steps:
            if name in self._done.samples:
                _say(f"{name}: done before, in {self._done.samples[name]}")
                continue
            _say(f"{name}: measuring {target.name}")
            self._done.samples[name] = str(self._measured(name, plan, target, samples_root).resolve())
            self._keep()
        if self._done.report is None:
            self._done.report = str(self._reported())
            self._keep()
        decided = self._hand_in(Path(self._done.report), place)
        if not self._wish.dry_run:
            progress.forget(self._folder)
        return Outcome(self._done.samples, self._done.report, decided, None)

    def _measured(self, name: str, plan: Wanted, target: Target, samples_root: Path) -> Path:
        """Make one search; raises HarnessError unless it is whole and valid."""
        measured = measure(plan, contextlib.nullcontext(target), samples_root)
        if not measured.complete:
            raise HarnessError(f"{measured.path} lacks rows of planned requests: the measurement is not valid")
        answer = (
            read_limits(measured.path, self._wish.bursts, self._wish.slo_file)
            if name == BURSTS
            else read_capacity(measured.path, self._wish.slo_file)
        )
        for line in answer.lines():
            _say(line)
        return measured.path

    def _reported(self) -> Path:
        """Execute the notebook over both searches, against the table in force; returns the report's folder."""
        from harness.report import write_report
        from harness.request import check_request

        paths = [Path(path) for path in self._done.samples.values()]
        folder = _new_report()
        in_force = folder / IN_FORCE
        in_force.write_bytes(write(self._service.table()))
        written = write_report(
            check_request(
                paths,
                [NOTEBOOK],
                folder,
                parameters={"active": json.dumps(str(in_force))},
                slo_file=self._wish.slo_file,
            )
        )
        if written.exit_code is ExitCode.INVALID:
            raise HarnessError(f"the measurement is not valid: see {folder / 'index.html'}")
        return folder

    def _hand_in(self, report: Path, place: Place | None) -> dict[str, Any]:
        """Give the service what the report proposes; returns what it decided."""
        file = report / REVISION
        if not file.exists() or not parse(file.read_bytes()).provenance.measured:
            if place is not None:
                place.give_up()
            capacity = read_capacity(Path(self._done.samples[CAPACITY]), self._wish.slo_file)
            return {"phase": TOO_LATE if capacity.exit_code is ExitCode.INVALID else NOTHING}
        flags = list(self._plan)
        if self._wish.machine_worth is not None:
            flags += ["--machine-worth", self._wish.machine_worth]
        if self._wish.dry_run:
            flags.append("--dry-run")
        elif place is not None:
            flags += ["--recalibration", str(place.recalibration)]
        return self._service.hand_in(file, flags)

    def _keep(self) -> None:
        if not self._wish.dry_run:
            progress.write(self._folder, self._done)


def _new_report() -> Path:
    """Return a new folder for a report."""
    now = datetime.datetime.now(datetime.UTC)
    folder = data_folder_of_checkout() / "reports" / f"{now:%Y%m%dT%H%M%S}.{now.microsecond // 1000:03d}Z-recalibration"
    folder.mkdir(parents=True)
    return folder


def _checked_too(target: Target, place: Place) -> Target:
    """Return a target whose load ends when the place is lost."""

    def check() -> None:
        target.check()
        place.check()

    return dataclasses.replace(target, check=check)


def _await_its_end(service: InForce, target: Target, wait_s: float) -> Stand:
    """Look until nothing happens any more without a person, or for that long."""
    until = time.monotonic() + wait_s
    stand = service.stand()
    told = stand.phase
    while not stand.is_settled and time.monotonic() < until:
        time.sleep(LOOK_EVERY_S)
        target.check()
        stand = service.stand()
        if stand.phase != told:
            _say(f"recalibration {stand.recalibration}: {stand.phase}")
            told = stand.phase
    return stand


def _say(words: str) -> None:
    """Say on stderr what is being done."""
    sys.stderr.write(f"{words}\n")
    sys.stderr.flush()
