"""What a reader sees in a notebook or on a page: the conclusion in words, and the tables laid out.

Everything here is an object that Jupyter shows by itself; nothing is computed that `slo` and `tables` do not hold.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import pandas as pd
from pandas.io.formats.style import Styler

from harness.analysis import tables
from harness.analysis.dataset import Dataset
from harness.analysis.layout import Passage, answer, cell, styled, unbroken
from harness.analysis.slo import (
    CHANGE,
    Statistic,
    Status,
    Verdict,
    number,
    overall,
    percent,
    plural,
    signed_percent,
    with_unit,
)
from harness.analysis.validity import ID_SHOWN, Fault, Finding, short_commit
from harness.errors import ExitCode

MARKS = {Status.PASS: "✓", Status.FAIL: "✗", Status.INCONCLUSIVE: "?", Status.NOT_APPLICABLE: "·"}
"""So that a verdict can be told without its colour."""

BOUNDED = {
    Statistic.MEAN: "mean",
    Statistic.PER_BUSY_SECOND: "rate",
    Statistic.MAX: "slowest",
    Statistic.ERROR_SHARE: "share",
}
"""What the bounds of a statistic are of; those of a quantile are of the share of slow requests."""

HEADINGS = {
    ExitCode.PASSED: "PASS",
    ExitCode.SLO_FAILED: "FAIL",
    ExitCode.INVALID: "INVALID",
    ExitCode.INCONCLUSIVE: "INCONCLUSIVE",
}


def heading(verdicts: Collection[Verdict], findings: Sequence[Finding]) -> str:
    """Return the report's verdict in one word."""
    return HEADINGS[overall(verdicts, valid=not findings)]


def sentences(
    verdicts: Collection[Verdict], findings: Sequence[Finding], folders: Mapping[str, str] | None = None
) -> list[str]:
    """Return the conclusion in plain sentences, the most important first.

    `folders` names the folder of each measurement, for a reader who has to find it.
    """
    if findings:
        said = ["Nothing was judged, because the measurement cannot be trusted."]
        return said + [_finding_sentence(finding, folders or {}) for finding in findings]
    counted = [verdict for verdict in verdicts if verdict.verdict is not Status.NOT_APPLICABLE]
    noun = "checks" if any(one.name.startswith("regression-") for one in counted) else "SLOs"
    by_status = {status: [verdict for verdict in counted if verdict.verdict is status] for status in Status}
    failed, open_ = by_status[Status.FAIL], by_status[Status.INCONCLUSIVE]
    if not counted:
        return ["None of the SLOs is about the load that was measured, so nothing could be judged."]
    if not failed and not open_:
        said = [f"All {plural(len(counted), noun)} about this load are met."]
    elif failed:
        said = [f"{len(failed)} of {plural(len(counted), noun)} {'is' if len(failed) == 1 else 'are'} missed."]
    else:
        said = [f"{len(open_)} of {plural(len(counted), noun)} could not be decided; none is missed."]
    for one in failed + open_:
        load = f"{one.mode.value}, " if one.mode else ""
        said.append(f"{one.title} ({load}{one.requirement}): {one.reason}")
    idle = len(verdicts) - len(counted)
    if idle:
        said.append(f"{plural(idle, 'SLOs')} {'is' if idle == 1 else 'are'} about other loads and not counted.")
    return said


def _finding_sentence(finding: Finding, folders: Mapping[str, str]) -> str:
    """Return a finding with the folder that it is about; mixed measurements name all of theirs."""
    if finding.fault is not Fault.MIXED_MEASUREMENTS or finding.rows:
        where = folders.get(finding.measurement_id, finding.measurement_id[:ID_SHOWN])
        return f"{where}: {finding.detail}"
    by_short = {name[:ID_SHOWN]: folder for name, folder in folders.items()}
    if not by_short:
        return finding.detail
    return re.sub("|".join(map(re.escape, by_short)), lambda found: by_short[found[0]], finding.detail)


def conclusion(
    verdicts: Collection[Verdict], findings: Sequence[Finding], folders: Mapping[str, str] | None = None
) -> Passage:
    """Return the conclusion: one word, then the sentences that support it (see `sentences`)."""
    word, (first, *rest) = heading(verdicts, findings), sentences(verdicts, findings, folders)
    return answer(word, first, rest)


def limitations(data: Dataset) -> Passage:
    """Say what imported samples cannot tell; our own have nothing to say here."""
    if not data.notes:
        return Passage("", "")
    items = "".join(f"<li>{html.escape(note)}</li>" for note in data.notes)
    head = "What these samples cannot tell, because another tool recorded them:"
    markup = f'<div class="limitations"><p>{head}</p><ul>{items}</ul></div>'
    return Passage(unbroken(markup), "\n".join([head, *data.notes]))


class VerdictRow(NamedTuple):
    """One verdict as every reader gets it: on a page, in Markdown, in a terminal."""

    verdict: str  # without its mark
    slo: str  # its title and the load on which it was judged
    required: str
    measured: str
    bounds: str
    sample: str


VERDICT_COLUMNS = VerdictRow("Verdict", "SLO", "Required", "Measured", "95 % bounds", "Sample")


def verdict_row(one: Verdict) -> VerdictRow:
    """Return the cells of a verdict."""
    return VerdictRow(
        one.verdict.value.replace("_", " "),
        one.title + (f" ({one.mode.value})" if one.mode else ""),
        one.requirement,
        measured_text(one),
        bounds_text(one),
        sample_text(one),
    )


def verdicts(found: Collection[Verdict]) -> Styler:
    """Lay out the verdicts: what is required, what the samples prove, and why."""
    frame = pd.DataFrame([verdict_row(one) for one in found])
    frame.columns = pd.Index(VERDICT_COLUMNS)
    frame["Verdict"] = [f"{MARKS[one.verdict]}\u00a0{verdict_row(one).verdict}" for one in found]
    frame["Reason"] = [one.reason for one in found]
    return styled(frame, numeric=())


def latencies(data: Dataset) -> Styler:
    """Lay out the latencies per endpoint; an interval that the sample cannot carry is refused with the reason."""
    frame = tables.latency_frame(data)
    rows = []
    for (mode, endpoint), group in frame.groupby(["mode", "endpoint"], sort=False):
        first = group.iloc[0]
        row = {
            "Load": mode, "Endpoint": endpoint, "Requests": f"{first['requests']:,}", "Failed": f"{first['failed']:,}",
            "Mean, ms": cell(first["mean_ms"]),
        }  # fmt: skip
        for _, one in group.iterrows():
            value = "failed" if pd.isna(one["latency_ms"]) else number(float(one["latency_ms"]))
            interval = "" if pd.isna(one["lower_ms"]) else f" ({cell(one['lower_ms'])} to {cell(one['upper_ms'])})"
            row[f"p{one['q'] * 100:g}, ms"] = value + interval
        refused = group["refusal"].dropna()
        row["Why no interval"] = "" if refused.empty else _capital(str(refused.iloc[-1]))
        rows.append(row)
    return styled(pd.DataFrame(rows), numeric=("Requests", "Failed", "Mean, ms", "p50, ms", "p95, ms", "p99, ms"))


def runs(data: Dataset) -> Styler:
    """Lay out what became of the runs."""
    frame = tables.run_frame(data)
    shown = pd.DataFrame(
        {
            "Measurement": frame["measurement_id"].str.slice(0, ID_SHOWN),
            "Runs": frame["runs"],
            "Count": frame["count"].map(cell),
            "Completed": frame["completed"].map(cell),
            "Ended otherwise": frame["ended_otherwise"].map(cell),
            "Never seen finished": frame["never_seen_finished"].map(cell),
            "Median completion as polled, ms": frame["completion_ms_median"].map(cell),
            "Median by the service's clock, ms": frame["server_completion_ms_median"].map(cell),
            "Ticks per run": frame["ticks_per_run"].map(cell),
            "Events per run": frame["events_per_run"].map(cell),
        }
    )
    return styled(shown, numeric=tuple(shown.columns[2:]))


def slowest(data: Dataset, count: int) -> Styler:
    """Lay out the requests that waited longest, and where their time went."""
    frame = tables.slowest_frame(data, count)
    status = (" " + frame["status"].astype("string")).fillna("")
    shown = pd.DataFrame(
        {
            "At, s": frame["at_s"].map(cell),
            "Endpoint": frame["endpoint"],
            "Run": frame["run_key"],
            "Outcome": frame["outcome"].astype(str) + status,
            "Waited, ms": frame["latency_ms"].map(cell),
            "Service, ms": frame["service_ms"].map(cell),
            "Database, ms": frame["server_db_ms"].map(cell),
            "Quota, ms": frame["server_quota_ms"].map(cell),
            "Publish, ms": frame["server_publish_ms"].map(cell),
            "App, ms": frame["server_app_ms"].map(cell),
        }
    )
    return styled(shown, numeric=("At, s", *shown.columns[4:]))


def failures(data: Dataset) -> Styler | Passage:
    """Lay out what failed and how often, or say that nothing did."""
    frame = tables.failure_frame(data)
    if frame.empty:
        said = f"Nothing failed: {plural(len(data.samples), 'requests')} were sent and every one was answered well."
        return Passage(f"<p>{said}</p>", said)
    shown = pd.DataFrame(
        {
            "Endpoint": frame["endpoint"],
            "Outcome": frame["outcome"],
            "Status": frame["status"].map(cell),
            "Error": frame["error"].fillna(""),
            "Requests": frame["requests"].map(cell),
        }
    )
    return styled(shown, numeric=("Status", "Requests"))


def measurements(data: Dataset) -> Styler:
    """Lay out what was measured, and on what."""
    frame = tables.measurement_frame(data)
    shown = pd.DataFrame(
        {
            "Samples": list(data.folders),
            "Start, UTC": frame["started_at"].dt.strftime("%Y-%m-%d %H:%M:%S"),
            "Load": frame["mode"],
            "Requests": frame["requests"].map(cell),
            "Runs": frame["runs"].map(cell),
            "Duration, s": frame["duration_s"].map(cell),
            "Attempt": frame["attempt"].map(cell),
            "Commit": frame["commit"].fillna("unknown").map(short_commit),
            "Quota revision": frame["quota_revision"].map(cell),
            "Machine": frame["cpu_count"].map(cell) + " x " + frame["cpu"],
        }
    )
    return styled(shown, numeric=("Requests", "Runs", "Duration, s", "Attempt", "Quota revision"))


def measured_text(verdict: Verdict) -> str:
    """Return what was measured, named and with its unit."""
    if verdict.measured is None:
        return "—"
    if verdict.statistic is Statistic.ERROR_SHARE:
        return percent(verdict.measured)
    if verdict.unit == CHANGE:
        return signed_percent(verdict.measured)
    named = f"{verdict.statistic.value} " if verdict.statistic.is_latency else ""
    aside = "".join(
        f" ({name} {with_unit(value, verdict.unit)})" for name, value in verdict.shown.items() if value is not None
    )
    return named + with_unit(verdict.measured, verdict.unit) + aside


def bounds_text(verdict: Verdict) -> str:
    """Return of what the bounds are, and both with their unit; a p95's are of the share of slow requests."""
    interval = verdict.interval
    if interval is None:
        return "—"
    if interval.lower == interval.upper and interval.unit == "requests":
        return "counted"
    if interval.unit == CHANGE:
        return f"change {signed_percent(interval.lower or 0.0)} to {signed_percent(interval.upper or 0.0)}"
    if interval.unit == "share":
        ends = f"{percent(interval.lower or 0.0)} to {percent(1.0 if interval.upper is None else interval.upper)}"
        is_quantile = verdict.statistic.q is not None
        return f"slow {ends}, allowed {percent(interval.limit)}" if is_quantile else f"errors {ends}"
    ends = f"{number(interval.lower)} to {with_unit(interval.upper, interval.unit)}"
    return f"{BOUNDED[verdict.statistic]} {ends}"


def sample_text(verdict: Verdict) -> str:
    """Return the size of the sample, and its effective size for this statistic where that is less."""
    if not verdict.sample_size:
        return "—"
    size, effective = plural(verdict.sample_size, verdict.sample_unit), verdict.effective_size
    if effective is None or round(effective) >= verdict.sample_size:
        return size
    return f"{size}, effective {effective:.0f} for the {BOUNDED.get(verdict.statistic, verdict.statistic.value)}"


def _capital(words: str) -> str:
    """Return the words with a capital at their beginning."""
    return words[:1].upper() + words[1:]
