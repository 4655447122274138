"""Recalibrations by the hundred in worlds whose truth is known: what moves, what must not, and how soon."""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import msgspec
import numpy as np
from sqlalchemy import text

from service.db import Database
from service.quota import revisions
from service.quota.guardrails import GUARDRAILS, Guardrail, ask
from service.quota.limits import RATES, Limit
from service.quota.recalibration import Decision, Usage, decide, leaning, unattended
from service.quota.recalibration_cycle import Count, Figures, rise
from service.quota.recalibration_evidence import SHARE, Known
from service.quota.tables import FIRST, FORMAT, Provenance, RateValue, RevisionFile, Tables
from tests.calibration.recalibration_world import (
    CAPACITY_PER_S,
    POISONS,
    POISONS_BESIDE_A_RECORD,
    WEEK,
    Noise,
    World,
    spoiled,
    spoiled_table,
)
from tests.measuredtables import NOW

FOLLOWED = 1.1
"""A loss is followed when no rate is more than 10 % above a quarter of what the service truly carries."""

ACTIVE = text("SELECT revision, limits::text, provenance::text FROM quota_revisions WHERE state = 'active'")


@dataclasses.dataclass
class Installation:
    """What is in force at one installation, and the largest step that was ever made there."""

    limits: Tables = FIRST
    provenance: Provenance = dataclasses.field(default_factory=Provenance)
    leaning: dict[Limit, float] = dataclasses.field(default_factory=dict)
    largest_step: Fraction = Fraction(0)
    below_use: int = 0  # times a rate was lowered below its use

    def recalibrate(self, file: RevisionFile, cycle: int, usage: Usage | None = None) -> Decision:
        """Carry one recalibration out, as far as it is decided without traffic: decision, guardrails, activation."""
        usage, known = usage or {}, Known(self.provenance, NOW + cycle * WEEK, self.leaning)
        decision = decide(self.limits, file, usage, known)
        if not decision.doubts:
            self.leaning = leaning(decision.moves)
        proposal = decision.proposal
        if proposal is not None:
            if ask(unattended(usage), self.limits, proposal.limits, proposal.provenance, known.now, force=False):
                return msgspec.structs.replace(decision, proposal=None)
            self._note_steps(proposal.limits, usage)
            self.limits, self.provenance = proposal.limits, proposal.provenance
        return decision

    def _note_steps(self, new: Tables, usage: Usage) -> None:
        for limit in RATES:
            before, after = rate(self.limits, limit), rate(new, limit)
            self.largest_step = max(self.largest_step, abs(after / before - 1))
            self.below_use += after < before and float(after) < usage.get(limit, 0.0)


def rate(limits: Tables, limit: Limit) -> Fraction:
    """Return a rate of the class `default`, exactly."""
    value = limits.default.value(limit)
    assert isinstance(value, RateValue)
    return Fraction(repr(value.per_s))


def installed(world: World, random: np.random.Generator) -> Installation:
    """Return an installation whose table rests on one sound measurement of this world."""
    file = world.measure(random, 0)
    return Installation(file.limits, file.provenance)


def drawn_world(random: np.random.Generator, noise: Noise, inconclusive: float = 0.0) -> World:
    """Return a service of another size than the reference, each of its paths a little different."""
    size = math.exp(random.uniform(-1, 2))
    return World(
        {limit: per_s * size * math.exp(random.uniform(-0.3, 0.3)) for limit, per_s in CAPACITY_PER_S.items()},
        noise,
        inconclusive,
    )


@dataclasses.dataclass(frozen=True)
class Steady:
    """Recalibrations of services that did not change."""

    noise: Noise
    young: int  # changes in `count` recalibrations: two each of services that rest on a single measurement
    chain: int  # changes in `count` recalibrations in a row of one service
    count: int
    largest_step: Fraction


def steady(random: np.random.Generator, noise: Noise, count: int) -> Steady:
    """Count spurious changes."""
    young = 0
    steps = []
    for _ in range(count // 2):
        world = drawn_world(random, noise)
        here = installed(world, random)
        young += sum(_changes(here, world, random, cycle) for cycle in (1, 2))
        steps.append(here.largest_step)
    world = drawn_world(random, noise)
    here = installed(world, random)
    chain = sum(_changes(here, world, random, cycle) for cycle in range(1, count + 1))
    return Steady(noise, young, chain, count, max(*steps, here.largest_step))


def _changes(here: Installation, world: World, random: np.random.Generator, cycle: int) -> bool:
    return here.recalibrate(world.measure(random, cycle, here.limits), cycle).proposal is not None


@dataclasses.dataclass(frozen=True)
class Poisoned:
    """Poisoned files handed to recalibrations."""

    tried: Mapping[str, int]
    applied: Mapping[str, int]  # changed the table
    believed: Mapping[str, int]  # were held without a doubt
    sound_applied: int  # of as many sound files in the same places, how many changed the table
    sound: int


def poisoned(random: np.random.Generator, noise: Noise, count: int) -> Poisoned:
    """Hand every poison to `count` installations whose service has truly changed, so that there is a reason to move."""
    tried: dict[str, int] = {}
    applied: dict[str, int] = {}
    believed: dict[str, int] = {}
    sound = sound_applied = 0
    for number in range(count):
        world = drawn_world(random, noise)
        now = world.after(factor := float(random.choice([0.7, 0.8, 1.25, 1.4])))
        pointing = dict.fromkeys(RATES, 1e-6 if factor < 1 else 1e6)  # the cycle before saw the same: nothing waits
        limit = RATES[number % len(RATES)]
        for name, file, has_record in _files(now.measure(random, 1), limit):
            here = installed(world, random)
            here.leaning = pointing
            if not has_record:
                here.provenance = Provenance()
            decision = here.recalibrate(file, 1)
            tried[name] = tried.get(name, 0) + 1
            applied[name] = applied.get(name, 0) + (decision.proposal is not None)
            believed[name] = believed.get(name, 0) + (not decision.doubts)
        sound += 1
        here = installed(world, random)
        here.leaning = pointing
        sound_applied += here.recalibrate(now.measure(random, 1), 1).proposal is not None
    return Poisoned(tried, applied, believed, sound_applied, sound)


def _files(file: RevisionFile, limit: Limit) -> Iterator[tuple[str, RevisionFile, bool]]:
    """Yield every poison as (name, file, whether the installation has a measurement on record)."""
    for name, poison in POISONS.items():
        yield name, spoiled(file, poison, limit), True
        yield f"{name} (nothing on record)", spoiled(file, poison, limit), False
    for name, poison in POISONS_BESIDE_A_RECORD.items():
        yield name, spoiled(file, poison, limit), True
    for name, factor in (("the table alone per minute", 60.0), ("the table alone a tenth more", 1.1)):
        yield name, spoiled_table(file, limit, factor), True
    yield "values without a measurement", RevisionFile(file.format, file.limits, Provenance(author="somebody")), True


@dataclasses.dataclass(frozen=True)
class Loss:
    """Services that lost a share of their capacity."""

    noise: Noise
    followed: Sequence[int]  # after the first, second, third cycle
    count: int
    largest_step: Fraction


def loss(random: np.random.Generator, noise: Noise, count: int, factor: float = 0.7, cycles: int = 3) -> Loss:
    """Count how many services are followed, and after how many cycles."""
    followed, steps = [0] * cycles, [Fraction(0)]
    for _ in range(count):
        world = drawn_world(random, noise)
        here = installed(world, random)
        lost = world.after(factor)
        for cycle in range(1, cycles + 1):
            here.recalibrate(lost.measure(random, cycle, here.limits), cycle)
            followed[cycle - 1] += all(
                float(rate(here.limits, limit)) <= FOLLOWED * float(SHARE) * lost.capacity_per_s[limit]
                for limit in RATES
            )
        steps.append(here.largest_step)
    return Loss(noise, followed, count, max(steps))


@dataclasses.dataclass(frozen=True)
class Wandering:
    """Services that change all the time, in use."""

    cycles: int
    changes: int
    largest_step: Fraction
    below_use: int
    held_by_use: int  # rates that were lowered less, or not, because they were used


def wandering(random: np.random.Generator, noise: Noise, cycles: int) -> Wandering:
    """Recalibrate a service whose capacity wanders by up to 40 % a week and whose workspaces use their quotas."""
    world = drawn_world(random, noise, inconclusive=0.1)
    here = installed(world, random)
    changes = held = 0
    for cycle in range(1, cycles + 1):
        world = world.after(math.exp(random.uniform(-0.35, 0.35)))
        usage = {limit: float(rate(here.limits, limit)) * float(random.uniform(0.3, 1.0)) for limit in RATES}
        decision = here.recalibrate(world.measure(random, cycle, here.limits), cycle, usage)
        changes += decision.proposal is not None
        held += sum(move.outcome == "in_use" for move in decision.moves)
    return Wandering(cycles, changes, here.largest_step, here.below_use, held)


@dataclasses.dataclass(frozen=True)
class Rollbacks:
    """Tables activated on a real database and taken back again."""

    activated: int
    exact: int  # rollbacks after which number, values and provenance were those of before, byte for byte


async def rollbacks(database: Database, random: np.random.Generator, noise: Noise, count: int) -> Rollbacks:
    """Put `count` recalibrated tables in force and take each back; every second one is then put in force to stay."""
    world = drawn_world(random, noise)
    here = installed(world, random)
    activated = exact = cycle = 0
    async with database.begin() as connection:  # where the simulated installation begins
        number = await revisions.propose(connection, RevisionFile(FORMAT, here.limits, here.provenance), "simulation")
        await revisions.activate(connection, number, "simulation", "where it begins", force=True, guardrails=())
    while activated < count:
        cycle += 1
        world = world.after(float(random.choice([0.75, 1.3])))
        before = Installation(here.limits, here.provenance, here.leaning)
        proposal = here.recalibrate(world.measure(random, cycle, here.limits), cycle).proposal
        if proposal is None:
            continue
        was = await _in_force(database)
        async with database.begin() as connection:
            number = await revisions.propose(connection, proposal, "simulation")
            known_at = NOW + cycle * WEEK  # the database's own clock is not in the simulated week
            rails = tuple(_at(known_at, each) for each in GUARDRAILS)
            activated += (await revisions.activate(connection, number, "simulation", guardrails=rails)).activated
        async with database.begin() as connection:
            await revisions.rollback(connection, "simulation")
        exact += await _in_force(database) == was
        here = before
        if activated % 2 == 0:
            here.recalibrate(world.measure(random, cycle, here.limits), cycle)
            async with database.begin() as connection:
                file = RevisionFile(FORMAT, here.limits, here.provenance)
                number = await revisions.propose(connection, file, "simulation")
                await revisions.activate(connection, number, "simulation", guardrails=())
    return Rollbacks(activated, exact)


def _at(now: dt.datetime, guardrail: Guardrail) -> Guardrail:
    return dataclasses.replace(guardrail, check=lambda one, other, source, _: guardrail.check(one, other, source, now))


async def _in_force(database: Database) -> tuple[int, str, str]:
    """Return the active revision's number and its row's very text."""
    async with database.read() as connection:
        row = (await connection.execute(ACTIVE)).one()
    return row.revision, row.limits, row.provenance


@dataclasses.dataclass(frozen=True)
class Watch:
    """Days of watching a new table, looked at every minute."""

    before: float  # share of requests refused under the table before
    during: float  # share under the new one
    per_minute: int  # requests
    taken_back: float  # share of days
    minutes: float | None  # until it was, in the median


def watch(random: np.random.Generator, before: float, during: float, per_minute: int, days: int) -> Watch:
    """Watch so many days."""
    minutes: list[int] = []
    for _ in range(days):
        baseline = Count(per_minute * 1_440, int(random.binomial(per_minute * 1_440, before)))
        wrong = random.binomial(per_minute, during, 1_440).cumsum()
        for minute in range(1, 1_441):
            now = Count(per_minute * minute, int(wrong[minute - 1]))
            if rise(Figures(before={"run_creation": baseline}, during={"run_creation": now})) is not None:
                minutes.append(minute)
                break
    return Watch(before, during, per_minute, len(minutes) / days, float(np.median(minutes)) if minutes else None)
