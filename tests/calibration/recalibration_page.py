"""What the simulation of recalibrations measures, and the page that says it."""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np

from harness.machine import commit, versions
from service.db import Database, migrate
from service.embedded import Stack
from service.quota.guardrails import LARGEST_STEP
from tests.calibration.effort import Bar
from tests.calibration.recalibration_study import (
    FOLLOWED,
    Loss,
    Poisoned,
    Rollbacks,
    Steady,
    Wandering,
    Watch,
    loss,
    poisoned,
    rollbacks,
    steady,
    wandering,
    watch,
)
from tests.calibration.recalibration_world import TRIALS, Noise

SEED = 2027
RECALIBRATIONS = 500
POISONED_INSTALLATIONS = 500
DAYS = 200
ROLLBACKS = 25
CLAIMED = (Noise(0.02, 0.0), Noise(0.05, 0.01), Noise(0.1, 0.02), Noise(0.1, 0.03))
"""For which the page promises something."""

WORSE = (Noise(0.2, 0.03), Noise(0.2, 0.05))
"""Shown, so that everybody sees where the promise ends."""

PLAIN = Noise(0.1, 0.02)
WATCHES = (
    (0.002, 0.002, 10),
    (0.05, 0.05, 10),
    (0.05, 0.05, 100),
    (0.005, 0.014, 100),
    (0.0, 0.05, 10),
    (0.005, 0.05, 10),
    (0.005, 0.05, 100),
    (0.05, 0.1, 100),
)
"""Shares refused before and during, requests a minute."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """Everything that the page shows."""

    steady: list[Steady]
    losses: list[Loss]
    poisoned: Poisoned
    wandering: Wandering
    rollbacks: Rollbacks
    watches: list[Watch]

    @property
    def bars(self) -> list[Bar]:
        """Return what must hold, with what was found."""
        claimed = [each for each in self.steady if each.noise in CLAIMED]
        changes = max(max(each.young, each.chain) for each in claimed)
        followed = min(each.followed[2] for each in self.losses if each.noise in CLAIMED)
        applied, tried = sum(self.poisoned.applied.values()), sum(self.poisoned.tried.values())
        steps = [each.largest_step for each in self.steady] + [each.largest_step for each in self.losses]
        step = max(*steps, self.wandering.largest_step)
        quiet = max(each.taken_back for each in self.watches if each.during <= each.before)
        return [
            Bar(
                f"a steady service was changed by at most {changes} of {RECALIBRATIONS} recalibrations (at most 2 %)",
                changes <= 0.02 * RECALIBRATIONS,
            ),
            Bar(f"{applied} of {tried:,} poisoned files changed a table (none)", applied == 0),
            Bar(
                f"a loss of 30 % was followed within three cycles by at least {followed} of {RECALIBRATIONS}"
                " services (at least 99 %)",
                followed >= 0.99 * RECALIBRATIONS,
            ),
            Bar(f"the largest step was {float(step):.4%} (at most 20 %)", Fraction(0) < step <= LARGEST_STEP),
            Bar(f"{self.wandering.below_use} rates were lowered below their use (none)", self.wandering.below_use == 0),
            Bar(
                f"{self.rollbacks.exact} of {self.rollbacks.activated} rollbacks gave back the same bytes (all)",
                self.rollbacks.exact == self.rollbacks.activated >= ROLLBACKS,
            ),
            Bar(f"a steady share of refusals was taken for a rise on {quiet:.1%} of days (at most 1 %)", quiet <= 0.01),
        ]


def measure_recalibrations() -> Measured:
    """Carry everything out; about two minutes."""
    random = np.random.default_rng(SEED)
    noises = (*CLAIMED, *WORSE)
    return Measured(
        [steady(random, noise, RECALIBRATIONS) for noise in noises],
        [loss(random, noise, RECALIBRATIONS) for noise in noises],
        poisoned(random, PLAIN, POISONED_INSTALLATIONS),
        wandering(random, PLAIN, RECALIBRATIONS),
        _rollbacks(random),
        [watch(random, before, during, per_minute, DAYS) for before, during, per_minute in WATCHES],
    )


def _rollbacks(random: np.random.Generator) -> Rollbacks:
    """Take back what was activated on a private PostgreSQL."""
    with tempfile.TemporaryDirectory(prefix="plimsoll-") as folder:
        Path(folder).chmod(0o711)  # PostgreSQL's user passes through it when this runs as root
        with Stack(Path(folder) / "stack") as stack:
            migrate(stack.database_url)
            return asyncio.run(_roll(stack.database_url, random))


async def _roll(database_url: str, random: np.random.Generator) -> Rollbacks:
    database = Database(database_url)
    try:
        return await rollbacks(database, random, PLAIN, ROLLBACKS)
    finally:
        await database.close()


def page(measured: Measured) -> str:
    """Return the whole page."""
    bars = "\n".join(f"- {bar.sentence}{'' if bar.met else ' **MISSED**'}" for bar in measured.bars)
    told = versions(["numpy", "scipy"])
    spoiled = measured.poisoned
    return f"""# Evidence: how often a recalibration is wrong

Written by `make calibrate` (`tests/calibration/`, some two minutes of processor time) at commit
{commit() or "unknown"}; seed {SEED}, so the counts are the same everywhere with the same libraries
(numpy {told["numpy"]}, scipy {told["scipy"]}).
A fast share of it is in `make test`. The rules and their reasons: [recalibration.md](../recalibration.md).

## What was shown

{bars}

This holds where the {TRIALS} trials of a cycle differ by up to {max(each.within for each in CLAIMED):.0%} (standard
deviation) and cycles by up to {max(each.between for each in CLAIMED):.0%} on top; also shown is where they differ more.

## The worlds

A service carries so many creates, spawns, polls and ticks a second; how many is known to the simulation alone. A cycle
measures each with {TRIALS} trials, lognormal around the truth, and gives Student's one-sided 95 % bounds; the whole
cycle is off by another lognormal factor of which its bounds know nothing. Decision, doubts and guardrails are the
service's own code (`service/quota/recalibration.py`); cycles are a week apart.

## A steady service

*Young*: {RECALIBRATIONS // 2} services that rest on one measurement, two recalibrations each. *Chain*:
{RECALIBRATIONS} recalibrations of one service in a row. Any rate that moves counts.

| trials differ by, cycles by | changes, young | changes, chain | of | largest step |
|---|---|---|---|---|
{chr(10).join(map(steady_row, measured.steady))}

## A loss of 30 %

{RECALIBRATIONS} services each. *Followed*: no rate is more than {FOLLOWED - 1:.0%} above a quarter of what the service
carries now. A step is at most 20 %, so one cycle cannot do it unless the value was low by luck.

| trials differ by, cycles by | followed after one cycle | two | three | of | largest step |
|---|---|---|---|---|---|
{chr(10).join(map(loss_row, measured.losses))}

## Poison

Each into {POISONED_INSTALLATIONS} installations whose service had truly changed by 20 to 40 % and whose cycle before
had pointed the same way, so that there was every reason to move: of {spoiled.sound} sound files in the same places,
{spoiled.sound_applied} moved the table. One of the four rates is spoiled, the others are sound. *Nothing on record*:
the table in force was never measured, as at the first recalibration.

| poison | files | without a doubt | changed the table |
|---|---|---|---|
{chr(10).join(poison_row(spoiled, name) for name in spoiled.tried)}

## A service that wanders, in use

{measured.wandering.cycles} cycles in a row; the capacity moves by up to 42 % a week, a tenth of the measurements prove
nothing, and workspaces use between 30 % and all of each rate. {measured.wandering.changes} cycles changed the table,
and {measured.wandering.held_by_use} rates were lowered less, or not, because they were used.

## After the activation

{DAYS} days of looking every minute. *Taken back*: the share of refused requests was found to have risen by more than
1 % and more than chance.

| refused before | refused under the new table | requests a minute | days taken back | minutes until then, median |
|---|---|---|---|---|
{chr(10).join(map(watch_row, measured.watches))}
"""


def steady_row(each: Steady) -> str:
    """Return a row of the table of steady services."""
    return f"| {each.noise.name} | {each.young} | {each.chain} | {each.count} | {float(each.largest_step):.1%} |"


def loss_row(each: Loss) -> str:
    """Return a row of the table of losses."""
    followed = " | ".join(map(str, each.followed))
    return f"| {each.noise.name} | {followed} | {each.count} | {float(each.largest_step):.1%} |"


def poison_row(spoiled: Poisoned, name: str) -> str:
    """Return a row of the table of poisons."""
    return f"| {name} | {spoiled.tried[name]} | {spoiled.believed[name]} | {spoiled.applied[name]} |"


def watch_row(each: Watch) -> str:
    """Return a row of the table of watches."""
    minutes = "" if each.minutes is None else f"{each.minutes:g}"
    return f"| {each.before:.1%} | {each.during:.1%} | {each.per_minute} | {each.taken_back:.1%} | {minutes} |"
