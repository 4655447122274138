"""What the recorded trials of a search for burst limits come to: for each endpoint the highest burst that meets the SLO
and the lowest that does not.

Read from rows alone: what each level proves is judged again by `bursts`, and `search` says what the levels come to, so
whoever has the sample set comes to the same answer as the search itself. Each measurement is its own search; trials of
two are never pooled, for each search decided for itself which levels to try. Next: `bursts_shown`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import pandas as pd

from harness.analysis.bursts import Requirement, level_table, requests_of
from harness.analysis.dataset import Dataset
from harness.analysis.quantiles import quantile
from harness.analysis.slo import Status
from harness.sample import Mode
from harness.sampleset import MANIFEST, Manifest, UnreadableFile
from harness.search import BURST_MAX, TRIALS_MAX, TRIALS_MIN, burst_ladder, consider


class _Asked(msgspec.Struct, frozen=True):
    """The parameters of a search that its answer depends on, as its manifest keeps them."""

    requirements: tuple[Requirement, ...]
    trials: Annotated[int, msgspec.Meta(ge=TRIALS_MIN, le=TRIALS_MAX)]
    max_burst: Annotated[int, msgspec.Meta(ge=1, le=BURST_MAX)]


@dataclasses.dataclass(frozen=True)
class Limit:
    """The burst limit of one endpoint in one measurement."""

    measurement_id: str
    folder: str
    requirement: Requirement
    highest_pass: int | None  # requests at once; null when no level was shown to pass
    lowest_fail: int | None  # null when none was shown to fail
    levels: pd.DataFrame  # a row per level, columns as `bursts.COLUMNS`
    trials: pd.DataFrame  # a row per trial, see `trial_frame`

    @property
    def status(self) -> Status:
        """Return PASS when the limit is held from both sides: a search that ended without is inconclusive."""
        return Status.INCONCLUSIVE if None in (self.highest_pass, self.lowest_fail) else Status.PASS

    @property
    def words(self) -> str:
        """Return the answer in a sentence."""
        name, rule = self.requirement.endpoint.value, self.requirement.words
        if self.levels.empty:
            return f"{name}: no whole trial was recorded."
        passed = (
            f"bursts of {self.highest_pass:,} meet {rule}"
            if self.highest_pass
            else f"no burst was shown to meet {rule} (more --trials may show one)"
        )
        if self.lowest_fail is None:
            return f"{name}: {passed}; none was shown to miss it (a higher --max-burst, or more --trials, may)."
        missed = f"bursts of {self.lowest_fail:,} miss it"
        return f"{name}: {passed}; {missed}{self._gap()}."

    def _gap(self) -> str:
        """Say which levels between both are open, if there are any."""
        between = self.levels[(self.levels["level"] > (self.highest_pass or 0)) & (self.levels["verdict"] != "FAIL")]
        between = between[between["level"] < (self.lowest_fail or 0)]
        open_ = ", ".join(f"{level:,}" for level in between["level"])
        return f"; what was tried in between ({open_}) proved neither" if open_ else ""


def limits_of(data: Dataset) -> tuple[Limit, ...]:
    """Return the burst limits of a dataset, by measurement and endpoint; empty when it holds no such search.

    Raises UnreadableFile for a manifest that does not say what was searched for.
    """
    found: list[Limit] = []
    for manifest, folder in zip(data.manifests, data.folders, strict=True):
        if manifest.mode == Mode.BURST_LIMITS:
            found += _limits(data, manifest, folder)
    return tuple(found)


def limits_frame(limits: tuple[Limit, ...]) -> pd.DataFrame:
    """Return the levels of all limits in one table: measurement_id, requirement, then `bursts.COLUMNS`."""
    parts = [one.levels.assign(measurement_id=one.measurement_id, requirement=one.requirement.words) for one in limits]
    whole = pd.concat(parts, ignore_index=True)
    first = ["measurement_id", "requirement"]
    return whole[[*first, *(column for column in whole.columns if column not in first)]]


def trial_frame(samples: pd.DataFrame, requirement: Requirement, levels: pd.Series) -> pd.DataFrame:
    """Return a row per whole trial: level, trial (from 0), slow (requests that miss the limit), tail_ms.

    `tail_ms` is the trial's own quantile that the requirement names (its p95), infinite where that lies among failures.
    """
    rows: list[dict[str, Any]] = []
    for level in levels:
        latency = requests_of(samples, requirement.endpoint, int(level))
        slow = requirement.is_slow(latency).sum(axis=1)
        tails = [quantile(trial, 1.0 - requirement.slow_share) for trial in latency]
        rows += [
            {"level": int(level), "trial": number, "slow": int(count), "tail_ms": tail}
            for number, (count, tail) in enumerate(zip(slow, tails, strict=True))
        ]
    columns = {"level": np.int64, "trial": np.int64, "slow": np.int64, "tail_ms": np.float64}
    return pd.DataFrame(rows, columns=list(columns)).astype(columns)


def _limits(data: Dataset, manifest: Manifest, folder: str) -> list[Limit]:
    """Return the limits of one measurement."""
    try:
        asked = msgspec.convert(manifest.parameters, _Asked)
    except msgspec.ValidationError as fault:
        raise UnreadableFile(
            Path(folder), MANIFEST, f"its parameters are no search for burst limits: {fault}"
        ) from None
    samples = data.samples[data.samples["measurement_id"] == manifest.measurement_id]
    resources = data.resources[data.resources["measurement_id"] == manifest.measurement_id]
    table = level_table(samples, resources, asked.requirements, asked.trials)
    ladder, found = burst_ladder(asked.max_burst), []
    for requirement in asked.requirements:
        levels = table[table["endpoint"] == requirement.endpoint.value].reset_index(drop=True)
        tried = {int(row["level"]): Status(row["verdict"]) for _, row in levels.iterrows()}
        bracket = consider(ladder, tried)
        found.append(
            Limit(
                manifest.measurement_id, folder, requirement, bracket.highest_pass, bracket.lowest_fail, levels,
                trial_frame(samples, requirement, levels["level"]),
            )
        )  # fmt: skip
    return found
