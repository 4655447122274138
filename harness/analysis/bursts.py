"""What the trials at one burst size prove: tables in, tables out.

A burst of N meets its SLO when at most a share of its requests (5 % for a p95) is slow, counted over many bursts; a
request that failed or timed out is slow. The **trial** is the unit: requests of one burst share its fate. So the
requests are counted as the fewer independent ones that they are worth by the spread between trials (Korn and Graubard
1998, Survey Methodology 24:193-201), and the share is bounded from both sides by the exact binomial on that number.

Where few or no requests were slow, that spread cannot be seen in them; it is therefore also measured at the pooled
95 % quantile of the level's own latencies, where 5 % are "slow" by construction, and the larger spread counts. A
Student's t bound on the trials' shares, claiming 2.5 %, is wrong far more often: the page below has both.

A level is judged once halfway, where only a clear answer counts, and at its end. Next: `harness.search` decides on the
levels. How often all this is wrong: docs/evidence/burst-limits-calibration.md.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from harness.analysis.dependence import Bools, Floats
from harness.analysis.quantiles import binomial_bounds, quantile, smallest
from harness.analysis.slo import Op, Status, rounded
from harness.sample import Endpoint, Outcome
from harness.search import TRIALS_MIN

REQUESTS_MIN = 640
"""Requests that a level's trials hold at least. Twenty bursts of 8 are 160 requests: with one failure in a hundred they
seldom prove that at most 5 % are slow, and the climb would end there. A flawless level is judged long before."""

ALPHA = 0.025
"""Error of each level on each side. Two climbs can each claim too much once (see `harness.search`): 5 % in all."""

INTERIM_SHARE = 0.2
"""Of alpha, what the looks before the last one share; the rest is the last one's (Bonferroni)."""

MORE_TRIALS_MAX = 10_000
"""Beyond so many trials, a question is said to be open for good."""


@dataclasses.dataclass(frozen=True, slots=True)
class Requirement:
    """What a burst must meet: at most `slow_share` of its requests may miss `limit_ms`."""

    endpoint: Endpoint
    op: Op  # how a latency must stand to the limit
    limit_ms: float
    slow_share: float  # 0.05 for a p95

    @property
    def words(self) -> str:
        """Return it in short, such as "p95 < 300 ms"."""
        return f"p{(1.0 - self.slow_share) * 100.0:g} {self.op.sign} {self.limit_ms:g} ms"

    def is_slow(self, latency: Floats) -> Bools:
        """Say for each latency whether it misses the limit; infinity, a failure, does."""
        return latency >= self.limit_ms if self.op is Op.LT else latency > self.limit_ms


@dataclasses.dataclass(frozen=True, slots=True)
class LevelVerdict:
    """What the trials at one level prove."""

    status: Status
    share: float  # of slow requests
    lower: float  # one-sided bounds of the share, each with the error of the look
    upper: float
    trials: int
    effective: float  # independent requests that all of them are worth


@dataclasses.dataclass(frozen=True, slots=True)
class Look:
    """One moment at which a level is judged."""

    trials: int  # after so many
    alpha_pass: float  # error of a PASS; 0 when a level cannot pass yet
    alpha_fail: float


def looks(trials: int) -> tuple[Look, ...]:
    """Return when a level of so many trials is judged; raises ValueError below TRIALS_MIN.

    Twenty trials: after ten with 0.5 % on each side, after all with 2 %; the errors add up to ALPHA. With more, a
    hopeless level may fail after ten, twenty, forty …, but passes halfway at the earliest: a level must not pass for
    having been looked at before anything could go wrong.
    """
    if trials < TRIALS_MIN:
        raise ValueError(f"{trials} trials prove nothing: at least {TRIALS_MIN} are needed")
    half = trials // 2
    interim = sorted({half, *(TRIALS_MIN * 2**k for k in range(20))})
    early = [count for count in interim if TRIALS_MIN <= count <= half]
    spent = INTERIM_SHARE * ALPHA if early else 0.0
    found = [Look(count, spent if count == half else 0.0, spent / len(early)) for count in early]
    return (*found, Look(trials, ALPHA - spent, ALPHA - spent))


def trials_at(level: int, trials: int) -> int:
    """Return how many trials a level gets: `trials`, or more where they would hold fewer than REQUESTS_MIN requests."""
    return max(trials, math.ceil(REQUESTS_MIN / level))


def judge(latency: Floats, requirement: Requirement, trials: int) -> LevelVerdict:
    """Return what latencies (n_trials, burst) in ms, failures as infinity, prove; `trials` as for `trials_at`.

    After a number of trials that is no look the answer is INCONCLUSIVE: looking more often would spend more error.
    """
    count, burst = latency.shape
    planned = looks(trials_at(burst, trials))
    # Between two looks the level stays open; what it would be at the end is shown.
    look = next((one for one in planned if one.trials == count), None)
    shown = look if look is not None and look.alpha_pass else planned[-1]
    slow = requirement.is_slow(latency)
    share, worth = float(slow.mean()), _worth(latency, slow, requirement.slow_share)
    _, upper, effective = bounds_of_share(share, float(count * burst), worth, count, shown.alpha_pass)
    lower, _, _ = bounds_of_share(
        share, float(count * burst), worth, count, look.alpha_fail if look else shown.alpha_fail
    )
    status = Status.INCONCLUSIVE
    if look is not None and lower > requirement.slow_share:
        status = Status.FAIL
    elif look is not None and look.alpha_pass:
        if _far_below(latency, slow, requirement, look.alpha_pass):
            upper = min(upper, requirement.slow_share)
        status = Status.PASS if upper <= requirement.slow_share else status
    return LevelVerdict(status, share, lower, upper, count, effective)


def more_trials(latency: Floats, requirement: Requirement, trials: int) -> int | None:
    """Return how many more trials like these would settle an open level.

    None when no number would (the share seen is the limit itself), or only one beyond MORE_TRIALS_MAX.
    """
    count, burst = latency.shape
    slow = requirement.is_slow(latency)
    share, worth = float(slow.mean()), _worth(latency, slow, requirement.slow_share)
    last = looks(trials_at(burst, trials))[-1]

    def settled(n: int) -> bool:
        lower, upper, _ = bounds_of_share(share, float(n * burst), worth, n, last.alpha_pass)
        return upper <= requirement.slow_share or lower > requirement.slow_share or n > MORE_TRIALS_MAX

    needed = smallest(settled, count + 1)
    return needed - count if needed <= MORE_TRIALS_MAX else None


def _far_below(latency: Floats, slow: Bools, requirement: Requirement, alpha: float) -> bool:
    """Say whether even the spread between these trials, carried on, stays below the limit.

    The second way to pass, for levels so far below the limit that nothing was slow, where a large spread between fast
    trials is no reason for doubt. If all but half of the share of bursts have all but half of the share of their
    requests in time, no more than the share is slow. That so many bursts do is shown by a normal tolerance bound on the
    logarithm of each trial's quantile: mean + k * deviation, k from the noncentral t (Hahn and Meeker 1991, chapter 4).
    The exact binomial on the requests must hold besides.
    """
    count, burst = latency.shape
    half = requirement.slow_share / 2.0
    if slow.any() or binomial_bounds(0.0, float(count * burst), alpha)[1] > requirement.slow_share:
        return False
    tails = np.array([quantile(trial, 1.0 - half) for trial in latency])
    if tails.min() <= 0.0:
        return False
    logs = np.log(tails)
    return float(logs.mean() + tolerance_factor(count, alpha, 1.0 - half) * logs.std(ddof=1)) < math.log(
        requirement.limit_ms
    )


@functools.cache
def tolerance_factor(count: int, alpha: float, content: float) -> float:
    """Return k of the one-sided normal tolerance bound for `content`, with error alpha, from `count` values."""
    root = math.sqrt(count)
    return float(stats.nct.ppf(1.0 - alpha, count - 1, stats.norm.ppf(content) * root)) / root


def _worth(latency: Floats, slow: Bools, slow_share: float) -> float:
    """Return how many times as much the share varies between trials as if requests were independent; 0 if unseen."""
    pooled = latency.ravel()
    threshold = quantile(pooled, 1.0 - slow_share)
    return max(_design_effect(slow), _design_effect(latency > threshold))


def _design_effect(hits: Bools) -> float:
    """Return the variance of the trials' shares over that of independent requests, (n_trials, burst) -> ratio."""
    share = float(hits.mean())
    if len(hits) < 2 or share in {0.0, 1.0}:
        return 0.0
    between = float(hits.mean(axis=1).var(ddof=1))
    effect: float = between * hits.shape[1] / (share * (1.0 - share))
    return effect


def bounds_of_share(share: float, n: float, worth: float, trials: int, alpha: float) -> tuple[float, float, float]:
    """Return lower and upper bound of a share of `n` requests in `trials`, and the effective number of requests.

    n* = n / worth * (z / t)^2, at most n; exact binomial on n* (Korn and Graubard 1998).
    Where: z and t are the normal and Student quantiles at 1 - alpha, t with trials - 1 degrees of freedom, which pays
    for a spread that is estimated from so few trials.
    """
    effective = n
    if worth > 0.0 and trials > 1:
        paid = float(stats.norm.ppf(1.0 - alpha) / stats.t.ppf(1.0 - alpha, trials - 1)) ** 2
        effective = min(n, max(1.0, n / worth * paid))
    lower, upper = binomial_bounds(share * effective, effective, alpha)
    return lower, upper, effective


def requests_of(samples: pd.DataFrame, endpoint: Endpoint, level: int) -> Floats:
    """Return the latencies (n_trials, burst) of the whole trials at one level, failures as infinity.

    `samples` has the columns of `sample.Sample`; a trial with fewer or more rows than the level is left out (it was cut
    short). Trials are in their order.
    """
    rows = samples[(samples["endpoint"] == endpoint.value) & (samples["level"] == level)]
    latency = rows["latency_ms"].to_numpy(dtype=np.float64, na_value=np.inf).copy()
    latency[(rows["outcome"] != Outcome.OK.value).to_numpy(dtype=bool)] = np.inf
    trial = rows["trial"].to_numpy(dtype=np.int64)
    parts = [latency[trial == number] for number in np.unique(trial)]
    whole = [part for part in parts if len(part) == level]
    return np.vstack(whole) if whole else np.empty((0, level))


COLUMNS = (
    "endpoint", "level", "verdict", "trials", "requests", "failed", "slow", "slow_share", "slow_share_lower",
    "slow_share_upper", "effective_requests", "latency_ms_p50", "latency_ms_p95", "latency_ms_max", "send_lag_ms_max",
    "served_per_s", "queue_depth_max", "oldest_due_tick_s_max", "more_trials",
)  # fmt: skip
"""Of the table of levels; docs/burst-limits.md says what each holds."""


def level_table(
    samples: pd.DataFrame, resources: pd.DataFrame, requirements: Sequence[Requirement], trials: int
) -> pd.DataFrame:
    """Return one row for each endpoint and level with whole trials, by endpoint and rising level (COLUMNS).

    `resources` has the columns of `sample.ResourceSample`; the first look after a burst says which queue it left. A
    quantile that lies among the failures is null, and so is what no look told.
    """
    seen = _left_behind(samples, resources)
    rows: list[dict[str, Any]] = []
    for requirement in requirements:
        ours = samples[samples["endpoint"] == requirement.endpoint.value]
        for level in sorted({int(level) for level in ours["level"].dropna()}):
            latency = requests_of(ours, requirement.endpoint, level)
            if len(latency):
                here = seen[(seen["endpoint"] == requirement.endpoint.value) & (seen["level"] == level)]
                at = ours[ours["level"] == level]
                rows.append(_level_row(requirement, latency, trials, at) | _queue(here))
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"more_trials": "Int64"})


def _left_behind(samples: pd.DataFrame, resources: pd.DataFrame) -> pd.DataFrame:
    """Return each burst with the first look at the service after its last answer."""
    ended = samples.dropna(subset=["done_at_ns", "level"]).groupby(["endpoint", "level", "trial"], as_index=False)
    bursts = ended[["done_at_ns"]].max().rename(columns={"done_at_ns": "at_ns"})
    looks_at = resources.astype({"at_ns": "int64"}).sort_values("at_ns")
    return pd.merge_asof(
        bursts.astype({"at_ns": "int64"}).sort_values("at_ns"), looks_at, on="at_ns", direction="forward"
    )


def _queue(looks_at: pd.DataFrame) -> dict[str, Any]:
    """Return the longest queue that a burst of a level left behind."""
    found = dict[str, Any]()
    for column in ("queue_depth", "oldest_due_tick_s"):
        told = looks_at[column].dropna()
        found[f"{column}_max"] = rounded(float(told.max())) if len(told) else None
    return found


def _level_row(requirement: Requirement, latency: Floats, trials: int, rows: pd.DataFrame) -> dict[str, Any]:
    verdict, pooled = judge(latency, requirement, trials), latency.ravel()
    lag_ms = ((rows["sent_at_ns"] - rows["intended_at_ns"]) / 1e6).dropna()
    whole_s = float(np.median(latency.max(axis=1))) / 1e3
    return {
        "endpoint": requirement.endpoint.value,
        "level": latency.shape[1],
        "verdict": verdict.status.value,
        "trials": verdict.trials,
        "requests": len(pooled),
        "failed": int(np.isinf(pooled).sum()),
        "slow": int(requirement.is_slow(pooled).sum()),
        "slow_share": rounded(verdict.share),
        "slow_share_lower": rounded(verdict.lower),
        "slow_share_upper": rounded(verdict.upper),
        "effective_requests": rounded(verdict.effective),
        "latency_ms_p50": _finite(quantile(pooled, 0.5)),
        "latency_ms_p95": _finite(quantile(pooled, 0.95)),
        "latency_ms_max": _finite(float(pooled.max())),
        "send_lag_ms_max": rounded(float(lag_ms.max())) if len(lag_ms) else None,
        "served_per_s": _finite(latency.shape[1] / whole_s) if math.isfinite(whole_s) and whole_s > 0.0 else None,
        "more_trials": more_trials(latency, requirement, trials) if verdict.status is Status.INCONCLUSIVE else None,
    }


def _finite(value: float) -> float | None:
    return rounded(value) if math.isfinite(value) else None
