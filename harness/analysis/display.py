"""What a reader sees in a notebook or on a page: the conclusion in words, and the tables laid out.

Everything here is an object that Jupyter shows by itself; nothing is computed that `slo` and `tables` do not hold.
"""

from __future__ import annotations

import dataclasses
import hashlib
import html
from collections.abc import Collection, Sequence

import pandas as pd
from pandas.io.formats.style import Styler
from pandas.io.formats.style_render import CSSDict

from harness.analysis import tables
from harness.analysis.dataset import Dataset
from harness.analysis.slo import Interval, Status, Verdict, number, overall, percent, plural, with_unit
from harness.analysis.validity import Finding
from harness.errors import ExitCode

MARKS = {Status.PASS: "✓", Status.FAIL: "✗", Status.INCONCLUSIVE: "?", Status.NOT_APPLICABLE: "·"}
"""So that a verdict can be told without its colour."""

ID_SHOWN = 8
"""Characters of a measurement's id in a table, as many as its folder's name has; the footer has them all."""

HEADINGS = {
    ExitCode.PASSED: "PASS",
    ExitCode.SLO_FAILED: "FAIL",
    ExitCode.INVALID: "INVALID",
    ExitCode.INCONCLUSIVE: "INCONCLUSIVE",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Passage:
    """A piece of HTML with the words it says, so that it reads in a terminal as well."""

    markup: str
    text: str

    def _repr_html_(self) -> str:
        return self.markup

    def __str__(self) -> str:
        """Return the words alone."""
        return self.text


def heading(verdicts: Collection[Verdict], findings: Sequence[Finding]) -> str:
    """Return the report's verdict in one word."""
    return HEADINGS[overall(verdicts, valid=not findings)]


def sentences(verdicts: Collection[Verdict], findings: Sequence[Finding]) -> list[str]:
    """Return the conclusion in plain sentences, the most important first."""
    if findings:
        said = ["Nothing was judged, because the measurement cannot be trusted."]
        return said + [f"{finding.detail} ({finding.measurement_id}, {finding.fault.value})" for finding in findings]
    counted = [verdict for verdict in verdicts if verdict.verdict is not Status.NOT_APPLICABLE]
    by_status = {status: [verdict for verdict in counted if verdict.verdict is status] for status in Status}
    failed, open_ = by_status[Status.FAIL], by_status[Status.INCONCLUSIVE]
    if not counted:
        return ["None of the promises is about the load that was measured, so nothing could be judged."]
    if not failed and not open_:
        said = [f"All {plural(len(counted), 'promises')} that this load can test were kept."]
    elif failed:
        said = [f"{len(failed)} of {plural(len(counted), 'promises')} {'was' if len(failed) == 1 else 'were'} broken."]
    else:
        said = [f"{len(open_)} of {plural(len(counted), 'promises')} could not be settled; none was broken."]
    for one in failed + open_:
        load = f"{one.mode.value}, " if one.mode else ""
        said.append(f"{one.title} ({load}{one.requirement}): {one.reason}")
    idle = len(verdicts) - len(counted)
    if idle:
        said.append(f"{plural(idle, 'promises')} {'is' if idle == 1 else 'are'} about other loads and not counted.")
    return said


def conclusion(verdicts: Collection[Verdict], findings: Sequence[Finding]) -> Passage:
    """Return the conclusion: one word, then the sentences that support it."""
    word, (first, *rest) = heading(verdicts, findings), sentences(verdicts, findings)
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in rest)
    markup = (
        f'<div class="conclusion {word.lower()}"><p><strong class="chip {word.lower()}">{word}</strong> '
        f"{html.escape(first)}</p>{f'<ul>{items}</ul>' if items else ''}</div>"
    )
    return Passage(markup, "\n".join([f"{word}. {first}", *rest]))


def verdicts(found: Collection[Verdict]) -> Styler:
    """Lay out the verdicts: what was promised, what the samples prove, and why."""
    frame = pd.DataFrame(
        {
            "Verdict": [f"{MARKS[one.verdict]}\u00a0{one.verdict.value.replace('_', ' ')}" for one in found],
            "Promise": [one.title + (f" ({one.mode.value})" if one.mode else "") for one in found],
            "Required": [one.requirement for one in found],
            "Measured": [measured_text(one) for one in found],
            "95 % bounds": [bounds_text(one.interval) for one in found],
            "Sample": [sample_text(one) for one in found],
            "Reason": [one.reason for one in found],
        }
    )
    return _styled(frame, numeric=("Measured", "95 % bounds"))


def latencies(data: Dataset) -> Styler:
    """Lay out the latencies per endpoint; an interval that the sample cannot carry is refused with the reason."""
    frame = tables.latency_frame(data)
    rows = []
    for (mode, endpoint), group in frame.groupby(["mode", "endpoint"], sort=False):
        first = group.iloc[0]
        row = {
            "Load": mode, "Endpoint": endpoint, "Requests": f"{first['requests']:,}", "Failed": f"{first['failed']:,}",
            "Mean, ms": _cell(first["mean_ms"]),
        }  # fmt: skip
        for _, one in group.iterrows():
            value = "failed" if pd.isna(one["latency_ms"]) else number(float(one["latency_ms"]))
            interval = "" if pd.isna(one["lower_ms"]) else f" ({_cell(one['lower_ms'])} to {_cell(one['upper_ms'])})"
            row[f"p{one['q'] * 100:g}, ms"] = value + interval
        refused = group["refusal"].dropna()
        row["Why no interval"] = "" if refused.empty else _capital(str(refused.iloc[-1]))
        rows.append(row)
    return _styled(pd.DataFrame(rows), numeric=("Requests", "Failed", "Mean, ms", "p50, ms", "p95, ms", "p99, ms"))


def runs(data: Dataset) -> Styler:
    """Lay out what became of the runs."""
    frame = tables.run_frame(data)
    shown = pd.DataFrame(
        {
            "Measurement": frame["measurement_id"].str.slice(0, ID_SHOWN),
            "Runs": frame["runs"],
            "Count": frame["count"].map(_cell),
            "Completed": frame["completed"].map(_cell),
            "Ended otherwise": frame["ended_otherwise"].map(_cell),
            "Never seen finished": frame["never_seen_finished"].map(_cell),
            "Median completion as polled, s": frame["completion_s"].map(_cell),
            "By the service's clock, ms": frame["server_completion_ms"].map(_cell),
            "Ticks per run": frame["ticks_per_run"].map(_cell),
            "Events per run": frame["events_per_run"].map(_cell),
        }
    )
    return _styled(shown, numeric=tuple(shown.columns[2:]))


def slowest(data: Dataset, count: int) -> Styler:
    """Lay out the requests that waited longest, and where their time went."""
    frame = tables.slowest_frame(data, count)
    status = (" " + frame["status"].astype("string")).fillna("")
    shown = pd.DataFrame(
        {
            "At, s": frame["at_s"].map(_cell),
            "Endpoint": frame["endpoint"],
            "Run": frame["run_key"],
            "Outcome": frame["outcome"].astype(str) + status,
            "Waited, ms": frame["latency_ms"].map(_cell),
            "Service, ms": frame["service_ms"].map(_cell),
            "Database, ms": frame["server_db_ms"].map(_cell),
            "Quota, ms": frame["server_quota_ms"].map(_cell),
            "Publish, ms": frame["server_publish_ms"].map(_cell),
            "App, ms": frame["server_app_ms"].map(_cell),
        }
    )
    return _styled(shown, numeric=("At, s", *shown.columns[4:]))


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
            "Status": frame["status"].map(_cell),
            "Error": frame["error"].fillna(""),
            "Requests": frame["requests"].map(_cell),
        }
    )
    return _styled(shown, numeric=("Status", "Requests"))


def measurements(data: Dataset) -> Styler:
    """Lay out what was measured, and on what."""
    frame = tables.measurement_frame(data)
    shown = pd.DataFrame(
        {
            "Measurement": frame["measurement_id"].str.slice(0, ID_SHOWN),
            "Load": frame["mode"],
            "Requests": frame["requests"].map(_cell),
            "Runs": frame["runs"].map(_cell),
            "Duration, s": frame["duration_s"].map(_cell),
            "Attempt": frame["attempt"].map(_cell),
            "Commit": frame["commit"].fillna("unknown").str.slice(0, 12),
            "Quota revision": frame["quota_revision"].map(_cell),
            "Machine": frame["cpu_count"].map(_cell) + " x " + frame["cpu"],
        }
    )
    return _styled(shown, numeric=("Requests", "Runs", "Duration, s", "Attempt", "Quota revision"))


def measured_text(verdict: Verdict) -> str:
    """Return what was measured, with its unit."""
    if verdict.measured is None:
        return "—"
    if verdict.statistic == "error_share":
        return percent(verdict.measured)
    aside = "".join(f" ({name} {number(value)})" for name, value in verdict.shown.items() if value is not None)
    return with_unit(verdict.measured, verdict.unit) + aside


def bounds_text(interval: Interval | None) -> str:
    """Return both bounds with their unit, and of what they are where it is not the statistic itself."""
    if interval is None:
        return "—"
    if interval.unit == "share":
        ends = f"{percent(interval.lower or 0.0)} to {percent(1.0 if interval.upper is None else interval.upper)}"
        return f"{ends} slow" if "slow" in interval.of else ends
    if interval.lower == interval.upper:
        return "counted"
    return f"{number(interval.lower)} to {with_unit(interval.upper, interval.unit)}"


def sample_text(verdict: Verdict) -> str:
    """Return the size of the sample, and what it is worth where that is less."""
    if not verdict.sample_size:
        return "—"
    size = plural(verdict.sample_size, verdict.sample_unit)
    worth = verdict.effective_size
    return size if worth is None or round(worth) >= verdict.sample_size else f"{size}, worth {worth:.0f}"


def _cell(value: float | None) -> str:
    """Return a number for a table, or a dash for what is not known."""
    return "—" if pd.isna(value) else number(float(value))


def _capital(words: str) -> str:
    """Return the words with a capital at their beginning."""
    return words[:1].upper() + words[1:]


def _styled(frame: pd.DataFrame, numeric: Sequence[str]) -> Styler:
    """Return a table without row numbers, with numbers to the right; its markup is the same every time."""
    classes = pd.DataFrame("", index=frame.index, columns=frame.columns)
    for column in numeric:
        if column in classes:
            classes[column] = "number"
    if "Verdict" in frame:
        words = frame["Verdict"].str.split("\u00a0", n=1).str[1]
        classes["Verdict"] = "verdict " + words.str.lower().str.replace(" ", "-")
    if "Reason" in frame:
        classes["Reason"] = "wide"
    rules: list[CSSDict] = [
        {"selector": "td, th", "props": "text-align: left; vertical-align: top;"},
        {"selector": "td.number", "props": "text-align: right; font-variant-numeric: tabular-nums;"},
    ]
    rules += [
        {"selector": f"th.col{place}", "props": "text-align: right;"}
        for place, column in enumerate(frame.columns)
        if column in numeric
    ]
    styler = Styler(frame, cell_ids=False, uuid=_fingerprint(frame)).hide(axis="index")
    styler = styler.set_table_attributes('class="table"').format(escape="html").set_td_classes(classes)
    return styler.set_table_styles(rules)


def _fingerprint(frame: pd.DataFrame) -> str:
    """Return a name for a table's style that is the same for the same table and no other on its page."""
    return hashlib.sha256(frame.to_csv(index=False).encode()).hexdigest()[:8]
