"""Judges that latency does not drift during a soak: each soak on its own, by its minutes' medians (see `drift`)."""

from __future__ import annotations

from harness.analysis.dataset import Dataset
from harness.analysis.drift import DriftVerdict, judge_drift, minute_medians
from harness.analysis.slo import CHANGE, Slo, Status, Verdict, interval_of, plural, verdict_of
from harness.sample import Endpoint, Mode


def judge(slo: Slo, mode: Mode, data: Dataset) -> Verdict:
    """Judge the drift of one endpoint's median; of several soaks the worst counts."""
    endpoint = slo.endpoint or Endpoint.OTHER
    rows = data.of_endpoint(endpoint)
    if rows.empty:
        reason = f"The {mode.value} samples hold no {endpoint.value} request."
        return verdict_of(slo, mode, Status.INCONCLUSIVE, reason, of="minutes")
    soaks = {
        str(name): judge_drift(minute_medians(part), slo.limit)
        for name, part in rows.groupby("measurement_id", sort=True)
    }
    name, found = max(soaks.items(), key=lambda one: _gravity(one[1]))
    reason = found.reason + _more(found)
    if len(soaks) > 1:
        reason = f"The worst of {plural(len(soaks), 'soaks')}, {name[:8]}: {reason}"
    interval = None
    if found.change is not None:
        of = f"change of the median {endpoint.value} latency over the soak"
        interval = interval_of(of, CHANGE, found.change, (found.lower, found.upper), slo.limit)
    return verdict_of(
        slo, mode, found.status, reason, measured=found.change, interval=interval, size=found.minutes, of="minutes",
        more=found.more_minutes,
    )  # fmt: skip


def _gravity(found: DriftVerdict) -> tuple[int, float]:
    """Return how bad it is: the verdict first, then the change."""
    worse = {Status.FAIL: 2, Status.INCONCLUSIVE: 1}.get(found.status, 0)
    return worse, abs(found.change or 0.0)


def _more(found: DriftVerdict) -> str:
    """Say how much longer the soak would have to be, with a space before it."""
    if found.status is not Status.INCONCLUSIVE:
        return ""
    if found.more_minutes is None:
        return " No longer soak would settle it."
    return f" {plural(found.more_minutes, 'more minutes')} would settle it."
