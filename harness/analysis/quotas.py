"""From measured throughput to a table of quotas: tables in, tables out.

A quota is a share (25 %) of what the system was shown to carry: of the lower 95 % bound of its stable throughput, not
of the figure measured, which is too high half of the time. Stable is the highest rate that met the SLO; the trials
there are the unit. Beside each quota stand the same share of the figure itself, the requests in flight that it comes
to (Little's law), and the difference to the revision in force. A limit whose throughput was not measured well enough
keeps its value and is INCONCLUSIVE: no quota is ever made from nothing, and zero requests served are nothing. The same
holds for what may come at once: it is at most the same share of the highest burst that met the SLO, and without such a
burst the value in force stays.

Four tenants at full quota use all that there is; how likely more are is `oversubscription`. `revision_bytes` gives the
file that `quotas propose` reads (docs/quotas.md). Whether it is wise to put it in force is for the service's
guardrails.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from scipy import stats

from harness.analysis.dependence import Floats
from harness.analysis.means import MIN_UNITS, ratio_bounds
from harness.analysis.slo import Status, number, percent, plural
from service.quota.limits import Limit
from service.quota.tables import FORMAT, ClassTable, Provenance, RateValue, RevisionFile, Tables

FRACTION = 0.25
"""Share of the proven throughput that one workspace may use."""

STEP_PER_S = 0.001
"""Rates are written as multiples of this, rounded down."""


@dataclasses.dataclass(frozen=True, slots=True)
class Throughput:
    """What trials at the highest rate that met the SLO served."""

    limit: Limit  # the rate that it becomes
    served: Floats  # requests answered well in each trial, (n_trials,), in their order
    seconds: Floats  # how long each trial lasted, (n_trials,)
    waited_ms_mean: float  # mean latency there, of good answers
    offered_per_s: float = math.inf  # rate of arrivals there: nobody is promised more than was asked for
    burst_shown: int | None = None  # most requests at once that met the SLO; null when none was shown to
    absent: str = ""  # why there are no trials, where there are none


@dataclasses.dataclass(frozen=True, slots=True)
class QuotaRow:
    """One limit of the table. Rates are per second."""

    limit: Limit
    status: Status  # PASS: measured; INCONCLUSIVE: not well enough, and the active value stays
    trials: int
    throughput_per_s: float | None  # stable; null when nothing was served
    throughput_per_s_lower: float | None  # its lower 95 % bound, one-sided; null when refused
    quota_per_s: float | None  # the fraction of that bound; of the active revision where inconclusive
    quota_per_s_observed: float | None  # the fraction of the throughput itself, for comparison
    burst: int | None  # at once after a rest
    concurrency: float | None  # requests in flight at the quota: rate times mean latency
    concurrency_capacity: float | None  # the same at the bound of the throughput
    active_per_s: float | None  # in force; null when lifted
    change: float | None  # quota over active, less 1
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Oversubscription:
    """How often tenants at full quota exceed what the system carries."""

    tenants: int
    busy_share: float  # of the time in which a tenant uses its full quota
    tenants_carried: int  # so many at full quota fit
    independent: float  # probability that more are busy at one moment, if each is busy by itself
    surging: float  # the same if they also surge together


def quota_rows(measured: Sequence[Throughput], active: ClassTable, fraction: float = FRACTION) -> tuple[QuotaRow, ...]:
    """Return the row of each measured limit; `active` is the table in force of the class `default`.

    Raises ValueError for a fraction outside of (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"a fraction lies above 0 and at most at 1, not {fraction}")
    return tuple(_row(one, active, fraction) for one in measured)


def _row(one: Throughput, active: ClassTable, fraction: float) -> QuotaRow:
    """Return one row."""
    now = active.value(one.limit)
    now_per_s = now.per_s if isinstance(now, RateValue) else None
    trials = len(one.served)
    known = trials > 0 and float(one.seconds.min()) > 0.0 and float(one.served.sum()) > 0.0
    bounds = ratio_bounds(one.served, one.seconds) if known else None
    lower = None if bounds is None or bounds.lower is None else min(bounds.lower, one.offered_per_s)
    quota = None if lower is None else math.floor(fraction * lower / STEP_PER_S + 1e-9) * STEP_PER_S
    burst = None if quota is None or quota < STEP_PER_S else _burst(one, quota, active, fraction)
    if bounds is None or lower is None or quota is None or burst is None:
        reason = _kept(one, known=known, bounded=quota is not None and quota >= STEP_PER_S)
        return QuotaRow(
            one.limit, Status.INCONCLUSIVE, trials, bounds.estimate if bounds else None, None, now_per_s,
            None, now.burst if isinstance(now, RateValue) else None, None, None, now_per_s, None, reason,
        )  # fmt: skip
    quota = round(quota, 3)
    waited_s = one.waited_ms_mean / 1e3
    change = None if now_per_s is None else quota / now_per_s - 1.0
    reason = (
        f"{percent(fraction)} of {number(lower)}/s, which {plural(trials, 'trials')} show with 95 % confidence "
        f"({number(bounds.estimate)}/s measured)."
    )
    if one.burst_shown is None:
        reason += " No burst was shown to meet the SLO: what may come at once stays."
    return QuotaRow(
        one.limit, Status.PASS, trials, bounds.estimate, lower, quota, fraction * bounds.estimate,
        burst, quota * waited_s, lower * waited_s, now_per_s, change, reason,
    )  # fmt: skip


def _burst(one: Throughput, per_s: float, active: ClassTable, fraction: float) -> int | None:
    """Return what may come at once: a second's worth, for spawns as many as parents may live at once, if it was shown.

    At most the fraction of the highest burst that met the SLO, so that as many tenants fit as at their rates. Where
    none did, the value in force; null when none is in force either.
    """
    if one.burst_shown is None:
        now = active.value(one.limit)
        return now.burst if isinstance(now, RateValue) else None
    parents = active.live_parent_runs or 1 if one.limit is Limit.SUBRUN_SPAWN else 1
    return max(1, min(max(parents, math.ceil(per_s)), math.floor(fraction * one.burst_shown + 1e-9)))


def _kept(one: Throughput, *, known: bool, bounded: bool) -> str:
    """Say why a limit keeps its value."""
    trials = len(one.served)
    if not known:
        return f"{one.absent or 'Nothing was served, which measures nothing'}: the value in force stays."
    if trials < MIN_UNITS:
        return f"{plural(trials, 'trials')} have no lower bound, {MIN_UNITS} are needed: the value in force stays."
    if bounded:
        return "No burst was shown to meet its SLO, and none is in force: the limit stays lifted."
    return "The trials differ so much that their lower bound is no rate: the value in force stays."


def oversubscription(
    tenants: int,
    busy_share: float,
    fraction: float = FRACTION,
    *,
    surge_share: float = 0.01,
    surge_busy_share: float = 0.5,
) -> Oversubscription:
    """Return how likely more tenants are at full quota than fit, at any one moment.

    If each is busy by itself, their number is binomial. Tenants do surge together (a release, a Monday morning): in
    `surge_share` of the time each is busy with probability `surge_busy_share` instead. Shares lie within [0, 1].
    """
    shares = {"busy_share": busy_share, "surge_share": surge_share, "surge_busy_share": surge_busy_share}
    wrong = next((name for name, share in shares.items() if not 0.0 <= share <= 1.0), None)
    if wrong is not None or tenants < 1 or not 0.0 < fraction <= 1.0:
        raise ValueError(f"{wrong or 'tenants or fraction'} is out of range")
    carried = math.floor(1.0 / fraction + 1e-9)
    alone = float(stats.binom.sf(carried, tenants, busy_share))
    together = float(stats.binom.sf(carried, tenants, surge_busy_share))
    mixed = (1.0 - surge_share) * alone + surge_share * together
    return Oversubscription(tenants, busy_share, carried, alone, mixed)


def revision_of(rows: Sequence[QuotaRow], active: Tables, provenance: Provenance) -> RevisionFile:
    """Return the revision: the tables in force with each measured rate in its place, nothing else changed."""
    measured = {
        row.limit.value: RateValue(row.quota_per_s, row.burst)
        for row in rows
        if row.status is Status.PASS and row.quota_per_s is not None and row.burst is not None
    }
    default = msgspec.structs.replace(active.default, **measured)
    return RevisionFile(FORMAT, msgspec.structs.replace(active, default=default), provenance)


def revision_bytes(file: RevisionFile) -> bytes:
    """Return `quota_revision.json`, as `quotas propose` reads it; the same revision gives the same bytes."""
    return msgspec.json.format(msgspec.json.encode(file, order="deterministic"), indent=2) + b"\n"


def differences(proposed: Tables, active: Tables) -> Mapping[str, tuple[object, object]]:
    """Return what a proposal changes in the class `default`: limit -> (value in force, proposed value)."""
    names = [limit.value for limit in Limit]
    pairs = {name: (getattr(active.default, name), getattr(proposed.default, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def served_per_window(done_at_ns: Floats, window_s: float) -> tuple[Floats, Floats]:
    """Return requests done in each whole window and the windows' lengths: the trials of one long measurement.

    `done_at_ns` (n_requests,) are the instants of those answered well. Neighbouring windows may resemble each other;
    the bound is widened by that.
    """
    if len(done_at_ns) == 0:
        return np.empty(0), np.empty(0)
    at_s = (done_at_ns - done_at_ns.min()) / 1e9
    whole = int(at_s.max() // window_s)
    counts = np.bincount((at_s // window_s).astype(np.int64), minlength=whole)[:whole]
    return counts.astype(np.float64), np.full(whole, window_s)
