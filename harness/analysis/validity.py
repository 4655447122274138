"""May these samples be judged at all? Every finding here makes a measurement invalid, before any statistic.

Looked for: rows lost or recorded twice, measurements mixed, clocks that stepped or disagree, instants out of order,
outcomes that contradict their status, latencies that contradict their instants, and a generator that could not keep
its schedule (`lateness`). Bytes that cannot be read at all were refused before, by `sampleset`. Next: `judges`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

import msgspec
import numpy as np
import pandas as pd

from harness.analysis.alignment import misalignments
from harness.analysis.dataset import Dataset
from harness.analysis.lateness import CLOSED_LOOP, lateness
from harness.analysis.slo import number, plural
from harness.sample import Mode, Outcome
from harness.sampleset import Manifest, Source

CLOCK_STEP_S = 0.1
CLOCK_RATE = 0.001
"""What wall and monotonic clock may disagree by: 0.1 s, or 0.1 % of the duration, twice what a time service slews."""

OUTSIDE_S = 1.0
"""How far a row may lie outside of the manifest's clock: the anchors are read before the first and after the last."""

LATENCY_TOLERANCE_MS = 0.001
"""What latency_ms may differ from done - intended by: its rounding, half of this (`samplebuffer`), and no more."""


ID_SHOWN = 8
"""Characters of a measurement's id in a sentence, as many as its folder's name ends in."""

COMMIT_SHOWN = 8
"""Characters of a commit in a sentence."""


class Fault(enum.StrEnum):
    """Why a measurement cannot be trusted."""

    INCOMPLETE = "incomplete"  # the harness was killed before its end, and --partial was not given
    LOST_ROWS = "lost_rows"  # fewer rows than planned requests, or a create without the record of its run
    DUPLICATE_ROWS = "duplicate_rows"  # the same request twice, the same run twice, the same measurement twice
    MIXED_MEASUREMENTS = "mixed_measurements"  # rows of another mode, or repetitions of different systems
    CLOCK_STEP = "clock_step"  # wall and monotonic clock disagree about the duration
    CLOCK_SKEW = "clock_skew"  # rows outside of the measurement's time, or senders' clocks apart
    CLOCK_ORDER = "clock_order"  # done before sent, or sent before due
    LATENCY_MISMATCH = "latency_mismatch"  # a latency that its instants do not give
    OUTCOME_MISMATCH = "outcome_mismatch"  # an outcome that its status or its instants contradict
    GENERATOR_LATE = "generator_late"  # the schedule was not kept


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One reason not to trust a measurement."""

    fault: Fault
    measurement_id: str
    detail: str  # one plain sentence
    rows: int  # how many rows show it; 0 when it is not about rows


def find_faults(data: Dataset, *, partial: bool = False) -> tuple[Finding, ...]:
    """Return every reason not to trust these sample sets, in their order; empty when they may be judged.

    With `partial`, a set that was cut short is taken for what it holds.
    """
    findings = [*_mixed(data)]
    for manifest in data.manifests:
        samples = data.samples[data.samples["measurement_id"] == manifest.measurement_id]
        runs = data.runs[data.runs["measurement_id"] == manifest.measurement_id]
        resources = data.resources[data.resources["measurement_id"] == manifest.measurement_id]
        cut_short = partial and not manifest.complete
        for fault, detail, rows in (
            *_incomplete(manifest, partial=partial),
            *_rows(manifest, samples, runs, cut_short=cut_short),
            *_clocks(manifest, samples),
            *_order(samples),
            *_latencies(samples),
            *_outcomes(manifest, samples),
            *((Fault.CLOCK_SKEW, told, 0) for told in misalignments(manifest)),
            *((Fault.GENERATOR_LATE, *told) for told in lateness(manifest, samples, resources)),
        ):
            findings.append(Finding(fault, manifest.measurement_id, detail, rows))
    return tuple(findings)


Found = Iterator[tuple[Fault, str, int]]


def _mixed(data: Dataset) -> Iterator[Finding]:
    """Look across sets: one read twice, or repetitions that measured different systems."""
    seen: set[str] = set()
    by_mode: dict[str, list[Manifest]] = {}
    for manifest in data.manifests:
        name = manifest.measurement_id
        if name in seen:
            yield Finding(Fault.DUPLICATE_ROWS, name, "The same measurement was given twice.", 0)
        seen.add(name)
        by_mode.setdefault(manifest.mode, []).append(manifest)
    for mode, manifests in by_mode.items():
        systems: dict[tuple[str | None, int | None, str], list[str]] = {}  # repetitions have the same
        for manifest in manifests:
            systems.setdefault((manifest.commit, manifest.quota_revision, manifest.source.tool), []).append(
                manifest.measurement_id
            )
        if len(systems) > 1:
            told = "; ".join(_measured_on(names, *system) for system, names in systems.items())
            detail = f"These are no repetitions of one {mode} measurement, judge them apart: {told}."
            first_other = list(systems.values())[1][0]
            yield Finding(Fault.MIXED_MEASUREMENTS, first_other, detail, 0)


def _measured_on(names: list[str], commit: str | None, revision: int | None, tool: str) -> str:
    """Say in words which measurements were made on which system, and by which tool if that was another's."""
    sets = " and ".join(name[:ID_SHOWN] for name in names)
    code = "an unknown commit" if commit is None else f"commit {short_commit(commit)}"
    by = "" if tool == Source().tool else f" by {tool}"
    return f"{sets}{by} on {code}, quota revision {'unknown' if revision is None else revision}"


def short_commit(commit: str) -> str:
    """Return a commit as short as git prints it, with its "-dirty"."""
    name, dash, dirty = commit.partition("-")
    return f"{name[:COMMIT_SHOWN]}{dash}{dirty}"


def _incomplete(manifest: Manifest, *, partial: bool) -> Found:
    """Look for a set whose harness was killed."""
    if not manifest.complete and not partial:
        yield Fault.INCOMPLETE, "It was cut short (complete: false); --partial judges what it holds.", 0


def _rows(manifest: Manifest, samples: pd.DataFrame, runs: pd.DataFrame, *, cut_short: bool) -> Found:
    """Compare the rows with the plan: one for each planned request, and a run for each create."""
    missing = manifest.planned_requests - len(samples)
    if missing > 0 and not cut_short:
        detail = f"{plural(missing, 'rows')} of {manifest.planned_requests:,} planned requests are missing."
        yield Fault.LOST_ROWS, detail, missing
    on_wire = samples[samples["outcome"] != Outcome.NOT_SENT.value]
    # A row per planned request: a second row of one request has all its instants, a request of its own never does.
    twice = int(on_wire.duplicated().sum()) if manifest.mode != Mode.IMPORT else 0
    if twice or missing < 0:
        surplus = max(twice, -missing)
        detail = f"{plural(surplus, 'rows')} more than planned requests: some were recorded twice."
        yield Fault.DUPLICATE_ROWS, detail, surplus
    same_run = int(runs["run_key"].duplicated().sum())
    if same_run:
        yield (
            Fault.DUPLICATE_ROWS,
            f"{plural(same_run, 'runs')} of runs.parquet are recorded twice.",
            same_run,
        )
    other_mode = int((samples["mode"] != manifest.mode).sum())
    if other_mode:
        detail = f"{plural(other_mode, 'rows')} were measured in another mode than {manifest.mode}."
        yield Fault.MIXED_MEASUREMENTS, detail, other_mode
    creates = samples.loc[samples["endpoint"] == "create", "run_key"]
    unknown = int((~creates.isin(runs["run_key"])).sum())
    if manifest.mode in CLOSED_LOOP and unknown and not cut_short:
        yield Fault.LOST_ROWS, f"{plural(unknown, 'creates')} without a record of the run.", unknown


def _clocks(manifest: Manifest, samples: pd.DataFrame) -> Found:
    """Compare the wall clock with the monotonic clock, and the rows with both ends."""
    start, end = manifest.clock.start, manifest.clock.end
    monotonic_s = (end.monotonic_ns - start.monotonic_ns) / 1e9
    wall_s = (end.wall_ns - start.wall_ns) / 1e9
    step = wall_s - monotonic_s
    if monotonic_s < 0:
        yield Fault.CLOCK_STEP, f"The monotonic clock ran backwards by {number(-monotonic_s)} s.", 0
        return
    if abs(step) > max(CLOCK_STEP_S, CLOCK_RATE * monotonic_s):
        detail = f"The wall clock stepped by {number(step)} s against the monotonic clock in {number(monotonic_s)} s."
        yield Fault.CLOCK_STEP, detail, 0
    if manifest.mode == Mode.IMPORT:
        return  # another tool's instants are of its own clock
    earliest, latest = start.monotonic_ns - OUTSIDE_S * 1e9, end.monotonic_ns + OUTSIDE_S * 1e9
    instants = samples[["intended_at_ns", "sent_at_ns", "done_at_ns"]]
    outside = ((instants < earliest) | (instants > latest)).fillna(value=False).any(axis=1)
    # The manifest of a set that was cut short was last written before its last rows.
    count = int(outside.sum()) if manifest.complete else 0
    if count:
        yield Fault.CLOCK_SKEW, f"{plural(count, 'rows')} lie outside of the measurement's time.", count


def _order(samples: pd.DataFrame) -> Found:
    """Check that each request was due, sent, answered and done in this order, as far as the instants are known."""
    steps = (
        ("intended_at_ns", "sent_at_ns", "sent before they were due"),
        ("sent_at_ns", "first_byte_at_ns", "answered before they were sent"),
        ("sent_at_ns", "done_at_ns", "done before they were sent"),
        ("first_byte_at_ns", "done_at_ns", "done before their first byte"),
    )
    for before, after, words in steps:
        count = int((samples[after] < samples[before]).fillna(value=False).sum())
        if count:
            yield Fault.CLOCK_ORDER, f"{plural(count, 'requests')} were {words}.", count


def _latencies(samples: pd.DataFrame) -> Found:
    """Check both durations against the instants that give them."""
    for column, origin in (("latency_ms", "intended_at_ns"), ("service_ms", "sent_at_ns")):
        given = samples[column].to_numpy(dtype=np.float64, na_value=np.nan)
        span = ((samples["done_at_ns"] - samples[origin]) / 1e6).to_numpy(dtype=np.float64, na_value=np.nan)
        both = ~np.isnan(given) & ~np.isnan(span)
        # Nanoseconds of days need more digits than a double has beside its milliseconds.
        off = both & (np.abs(given - span) > LATENCY_TOLERANCE_MS + 1e-12 * np.abs(span))
        absent = np.isnan(given) & ~np.isnan(span) & (samples["outcome"] == Outcome.OK.value).to_numpy(dtype=bool)
        count = int((off | absent).sum())
        if count:
            yield (
                Fault.LATENCY_MISMATCH,
                f"{plural(count, 'rows')} have a {column} that their instants do not give.",
                count,
            )


def _outcomes(manifest: Manifest, samples: pd.DataFrame) -> Found:
    """Check each outcome against its HTTP status and its instants."""
    status = samples["status"]
    good = (status.between(200, 299) | (status == 304)).fillna(value=False)
    ours = manifest.mode != Mode.IMPORT  # an imported tool may not tell the status, or reject a 200 by its own check
    rules = {
        Outcome.OK: (~good & (status.notna() | ours), "are ok without a good status"),
        Outcome.HTTP_ERROR: (
            good | status.isna() if ours else status.isna() & False,
            "are errors with a good status",
        ),
        Outcome.REFUSED: (status.notna(), "are refused connections with a status"),
        Outcome.NOT_SENT: (
            samples["sent_at_ns"].notna() | status.notna(),
            "were never sent and yet sent or answered",
        ),
    }
    for outcome, (wrong, words) in rules.items():
        count = int(((samples["outcome"] == outcome.value) & wrong.astype(bool)).sum())
        if count:
            yield Fault.OUTCOME_MISMATCH, f"{plural(count, 'requests')} {words}.", count
    strange = samples.loc[~samples["outcome"].isin([outcome.value for outcome in Outcome]), "outcome"]
    if len(strange):
        told = ", ".join(sorted({str(outcome) for outcome in strange})[:3])
        detail = f"{plural(len(strange), 'requests')} ended in no outcome that is known: {told}."
        yield Fault.OUTCOME_MISMATCH, detail, len(strange)
    unknown_end = (samples["outcome"] == Outcome.OK.value) & samples["done_at_ns"].isna() & ours
    if int(unknown_end.sum()):
        detail = f"{plural(int(unknown_end.sum()), 'requests')} are ok without a moment at which they were done."
        yield Fault.OUTCOME_MISMATCH, detail, int(unknown_end.sum())
