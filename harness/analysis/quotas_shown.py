"""What the notebook of quotas shows: the answer in words, what was shown beside what is in force, how many tenants fit.

Computes nothing: the numbers are those of `quotas` and `ratesets`. Where a limit was not measured well enough its row
says so and shows no quota; where nothing is proposed, the first sentence says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator
from pandas.io.formats.style import Styler

from harness.analysis.drawing import GREY, INK, RED, Drawing, finish, name_panel, new_figure, scale_log
from harness.analysis.layout import Passage, answer, cell, plainly, styled
from harness.analysis.quotas import Oversubscription, QuotaRow, oversubscription
from harness.analysis.quotasets import QuotaTable
from harness.analysis.ratesets import Capacity, capacities
from harness.analysis.slo import Status, number, percent, plural, signed_percent
from harness.analysis.validity import ID_SHOWN
from service.quota.limits import Limit

NAMES = {
    Limit.RUN_CREATION: "create",
    Limit.SUBRUN_SPAWN: "spawn",
    Limit.SNAPSHOT_POLL: "snapshot",
    Limit.TICK: "tick",
}
"""What a limit is called on a page."""

NOTHING = "No limit was judged."

BLUE = "#0072B2"
LOOKS = {"PASS": (BLUE, "o"), "FAIL": (RED, "X"), "INCONCLUSIVE": (GREY, "d"), "INVALID": (GREY, "x")}
"""Colour and mark of a rate by its verdict, as in every figure."""

SHARES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#56B4E9", "v"))
"""Colour and mark of a line by its place."""

LEAST = 1e-4
"""Smallest probability that is drawn."""

LABEL_DECADES = 0.24
"""Height of a label on that axis."""


def conclusion(table: QuotaTable) -> Passage:
    """Say for each limit what a tenant may use, or why nothing is proposed."""
    told = [_sentence(row, table) for row in table.rows if row.status is Status.PASS]
    kept = [
        f"{NAMES[row.limit]}: {row.reason[:1].lower()}{row.reason[1:]}"
        for row in table.rows
        if row not in table.measured
    ]
    if table.findings:
        return answer("INVALID", table.refusal or NOTHING)
    if table.refusal is not None:
        return answer("INCONCLUSIVE", table.refusal, kept)
    changed = plural(len(table.measured), "limits")
    first = (
        f"{changed} of {len(table.rows)} can be set to {percent(table.fraction)} of what was shown to be sustained;"
        f" quota_revision.json proposes it against {table.active_named}."
    )
    return answer("FOUND", first, [*told, *kept])


def _sentence(row: QuotaRow, table: QuotaTable) -> str:
    """Say what one limit comes to."""
    change = (
        "" if row.change is None else f", {signed_percent(row.change)} against {number(row.active_per_s)}/s in force"
    )
    return (
        f"{NAMES[row.limit]}: {number(row.quota_per_s)}/s for each tenant, {percent(table.fraction)} of at least"
        f" {number(row.throughput_per_s_lower)}/s{change}."
    )


def shares(table: QuotaTable) -> Drawing | Passage:
    """Draw what was sustained, its bound, the quota made from it and the value in force, a line for each limit."""
    rows = [row for row in table.rows if row.quota_per_s is not None and (row in table.measured or row.active_per_s)]
    if not table.measured:
        return plainly(table.refusal or NOTHING)
    figure, (axis,) = new_figure(1, 1, height=0.85 * len(rows) + 0.9)
    axis.set_xscale("log")
    values = [
        value
        for row in rows
        for value in (row.throughput_per_s, row.quota_per_s, row.active_per_s, row.throughput_per_s_lower)
        if value
    ]
    axis.set_xlim(min(values) / 2.0, max(values) * 2.0)
    for place, row in enumerate(rows):
        _share_row(axis, place, row, table)
    axis.set_ylim(len(rows) - 0.4, -0.7)
    axis.set_yticks(range(len(rows)), [NAMES[row.limit] for row in rows])
    axis.tick_params(axis="y", length=0, pad=9)
    axis.grid(visible=False, axis="y")
    scale_log(axis.xaxis)
    axis.set_xlabel("requests per second")
    said = "; ".join(_described(row, table) for row in rows)
    return finish(figure, "Quotas", f"What each endpoint sustains and what one tenant may use of it. {said}.")


def _share_row(axis: Axes, place: int, row: QuotaRow, table: QuotaTable) -> None:
    """Draw one limit."""
    if row in table.measured:
        low, high, quota = row.throughput_per_s_lower or 0.0, row.throughput_per_s or 0.0, row.quota_per_s or 0.0
        axis.plot([quota, low], [place, place], color="#B8B8B8", lw=1, ls=":", zorder=1)
        axis.plot([low], [place], color=BLUE, marker="|", ms=13, mew=2.4)
        axis.plot([max(low, high)], [place], color=BLUE, marker="o", ms=5, mfc="white")
        axis.plot([quota], [place], color=BLUE, marker="s", ms=7)
        _label(axis, low, place, f"at least {number(low)}", above=True)
        _label(axis, quota, place, f"quota {number(quota)}", above=True)
    if row.active_per_s:
        axis.plot([row.active_per_s], [place], color=INK, marker="D", ms=5.5, mfc="white", mew=1.3)
        kept = "" if row in table.measured else ", stays"
        _label(axis, row.active_per_s, place, f"in force {number(row.active_per_s)}{kept}", above=False)


def _label(axis: Axes, x: float, place: int, words: str, *, above: bool) -> None:
    """Write beside a mark."""
    axis.annotate(words, (x, place), xytext=(0, 9 if above else -17), textcoords="offset points", ha="center",
                  color=INK, size=8)  # fmt: skip


def _described(row: QuotaRow, table: QuotaTable) -> str:
    """Return one limit in words."""
    force = "nothing in force" if row.active_per_s is None else f"{number(row.active_per_s)}/s in force"
    if row not in table.measured:
        return f"{NAMES[row.limit]}: not measured, {force} stays"
    return (
        f"{NAMES[row.limit]}: {number(row.throughput_per_s)}/s measured,"
        f" at least {number(row.throughput_per_s_lower)}/s, quota {number(row.quota_per_s)}/s, {force}"
    )


def quotas(table: QuotaTable) -> Styler | Passage:
    """Lay out the limits: what was shown, what follows, and what is in force."""
    if not table.rows:
        return plainly(table.refusal or NOTHING)
    rows = table.rows
    own = {row.limit for row in table.measured}
    share = percent(table.fraction)

    def told(name: str) -> list[str]:
        return [cell(getattr(row, name)) if row.limit in own else "—" for row in rows]

    shown = pd.DataFrame(
        {
            "Limit": [NAMES[row.limit] for row in rows],
            "Verdict": ["✓\u00a0PASS" if row.limit in own else "?\u00a0INCONCLUSIVE" for row in rows],
            "Stable": [cell(row.throughput_per_s) for row in rows],
            "At least": told("throughput_per_s_lower"),
            "Quota": told("quota_per_s"),
            f"{share} of stable": told("quota_per_s_observed"),
            "At once": told("burst"),
            "In flight": told("concurrency"),
            "In flight, all": told("concurrency_capacity"),
            "In force": ["lifted" if row.active_per_s is None else cell(row.active_per_s) for row in rows],
            "Change": ["—" if row.change is None else signed_percent(row.change) for row in rows],
            "Reason": [row.reason for row in rows],
        }
    )
    words = {"Limit", "Verdict", "Reason"}
    return styled(shown, numeric=tuple(column for column in shown.columns if column not in words))


def oversubscribed(table: QuotaTable, tenants: Sequence[int], busy_shares: Sequence[float]) -> Drawing | Passage:
    """Draw how likely more tenants are at full quota at one moment than the system carries."""
    counts = sorted({*tenants})
    if not counts or not busy_shares:
        return plainly("Neither tenants nor shares of time were named.")
    figure, (axis,) = new_figure(1, 1, height=3.5)
    axis.set_yscale("log")
    said, ends = [], {}
    for place, share in enumerate(sorted({*busy_shares})):
        colour, mark = SHARES[place % len(SHARES)]
        found = [oversubscription(count, share, table.fraction) for count in counts]
        seen, surging = (_drawn([getattr(one, name) for one in found]) for name in ("independent", "surging"))
        axis.plot(counts, seen, color=colour, marker=mark, ms=5, lw=1.6, clip_on=False)
        axis.plot(counts, surging, color=colour, lw=1.1, ls="--", alpha=0.8)
        ends[share] = max(found[-1].independent, LEAST)
        said.append(f"busy {percent(share)} of the time: {', '.join(_chance(one) for one in found)}")
    height = -math.inf
    for share, end in sorted(ends.items()):  # more time busy is more likely, so labels rise in this order
        height = max(math.log10(end), height + LABEL_DECADES)
        axis.annotate(f"busy {percent(share)} of the time", (counts[-1], 10**height), xytext=(9, 0),
                      textcoords="offset points", va="center", color=INK, size=8.5,
                      annotation_clip=False)  # fmt: skip
    axis.set_ylim(LEAST, 1.3)
    span = max(counts[-1] - counts[0], 1)
    axis.set_xlim(counts[0] - 0.02 * span, counts[-1] + 0.27 * span)
    axis.set_xticks(counts, [f"{count:,}" for count in counts])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: percent(y)))
    axis.set_xlabel("tenants; solid: each is busy by itself, dashed: they also surge together in 1 % of the time")
    carried = oversubscription(1, 0.0, table.fraction).tenants_carried
    name_panel(axis, f"probability that more than {carried} are at full quota at once")
    return finish(
        figure, "Oversubscription", f"Probability that tenants at full quota exceed the capacity: {'; '.join(said)}."
    )


def _drawn(probabilities: Sequence[float]) -> list[float]:
    """Return what is high enough to be drawn, nan for the rest."""
    return [value if value >= LEAST else math.nan for value in probabilities]


def _chance(one: Oversubscription) -> str:
    """Return one probability in words."""
    return f"{_small(one.independent)} with {plural(one.tenants, 'tenants')}"


def chances(table: QuotaTable, tenants: Sequence[int], busy_shares: Sequence[float]) -> Styler | Passage:
    """Lay out the same probabilities; of those with a surge in brackets."""
    if not tenants or not busy_shares:
        return plainly("Neither tenants nor shares of time were named.")
    rows = []
    for count in sorted({*tenants}):
        row = {"Tenants": f"{count:,}"}
        for share in sorted({*busy_shares}):
            one = oversubscription(count, share, table.fraction)
            row[f"Busy {percent(share)}"] = f"{_small(one.independent)} ({_small(one.surging)})"
        rows.append(row)
    shown = pd.DataFrame(rows)
    return styled(shown, numeric=tuple(shown.columns))


def _small(share: float) -> str:
    """Return a probability in percent, to a hundredth of one."""
    return "< 0.01 %" if 0.0 < share < 1e-4 else percent(round(share, 4))


def rates(table: QuotaTable) -> Drawing | Passage:
    """Draw every rate that was tried: its p95 beside the target, by what it proves."""
    found = [one for one in capacities(table.data) if one.levels] if not table.findings else []
    if not found:
        return plainly(table.refusal or NOTHING)
    columns = min(len(found), 3)
    bands = -(-len(found) // columns)
    figure, axes = new_figure(bands, columns, height=2.9 * bands + 0.2)
    for axis in axes[len(found) :]:
        axis.set_axis_off()
    for place, (axis, one) in enumerate(zip(axes, found, strict=False)):
        _rate_panel(axis, one, _named(one, found))
        if place % columns == 0:
            axis.set_ylabel("p95, ms")
    said = "; ".join(_levels_in_words(one, found) for one in found)
    return finish(figure, "Rates tried", f"The p95 at each rate tried, and what the rate proves. {said}.")


def _rate_panel(axis: Axes, one: Capacity, name: str) -> None:
    """Draw one endpoint's rates."""
    target = one.requirement.latency.limit_ms
    known = [level["latency_ms_p95"] for level in one.levels if level["latency_ms_p95"] is not None]
    top, low = max([target, *known]) * 1.8, min([target, *known]) / 1.8
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.axhline(target, color=INK, lw=1, ls="--")
    axis.text(0.01, target, f"target {number(target)} ms", va="bottom", color=INK, size=8,
              transform=axis.get_yaxis_transform())  # fmt: skip
    for level in one.levels:
        colour, mark = LOOKS[level["verdict"]]
        height = top if level["latency_ms_p95"] is None else level["latency_ms_p95"]
        axis.plot([level["rate_per_s"]], [height], ls="", color=colour, marker=mark, ms=6.5, clip_on=False)
        if level["rate_per_s"] in {one.highest_pass_per_s, one.lowest_fail_per_s}:
            axis.annotate(f"{number(level['rate_per_s'])}/s {level['verdict']}", (level["rate_per_s"], height),
                          xytext=(0, -15), textcoords="offset points", ha="center", color=colour, size=8)  # fmt: skip
    given = [level["rate_per_s"] for level in one.levels]
    axis.set_xlim(min(given) / 1.6, max(given) * 1.6)
    axis.set_ylim(low / 1.3, top)
    scale_log(axis.xaxis)
    scale_log(axis.yaxis)
    axis.set_xlabel("arrivals per second")
    name_panel(axis, name)


def _named(one: Capacity, among: Sequence[Capacity]) -> str:
    """Return an endpoint, with the measurement's short name where there are several."""
    several = len({each.measurement_id for each in among}) > 1
    return (f"{one.measurement_id[:ID_SHOWN]}, " if several else "") + one.requirement.latency.endpoint.value


def _levels_in_words(one: Capacity, among: Sequence[Capacity]) -> str:
    """Return one endpoint's rates in words."""
    told = ", ".join(
        f"{number(level['rate_per_s'])}/s {level['verdict']}"
        f" (p95 {'failed' if level['latency_ms_p95'] is None else number(level['latency_ms_p95']) + ' ms'})"
        for level in one.levels
    )
    return f"{_named(one, among)}, {one.requirement.words}: {told}"


def levels(table: QuotaTable) -> Styler | Passage:
    """Lay out the rates that were tried and what each proves."""
    found = capacities(table.data) if not table.findings else ()
    rows = [
        {
            "Measurement": one.measurement_id[:ID_SHOWN],
            "Endpoint": one.requirement.latency.endpoint.value,
            "Rate, 1/s": cell(level["rate_per_s"]),
            "Verdict": f"{ {'PASS': '✓', 'FAIL': '✗'}.get(level['verdict'], '?') }\u00a0{level['verdict']}",
            "Trials": cell(level["trials"]),
            "Requests": cell(level["requests"]),
            "Failed": cell(level["failed"]),
            "Slow at most": _bound(level["slow_share_upper"]),
            "Queues grow at most": _bound(_most(level)),
            "p95, ms": cell(level["latency_ms_p95"]),
            "Served, 1/s": cell(level["served_per_s"]),
            "More trials": cell(level["more_trials"]),
        }
        for one in found
        for level in one.levels
    ]
    if not rows:
        return plainly(table.refusal or NOTHING)
    shown = pd.DataFrame(rows)
    if shown["Measurement"].nunique() == 1:
        shown = shown.drop(columns="Measurement")
    words = {"Measurement", "Endpoint", "Verdict"}
    return styled(shown, numeric=tuple(column for column in shown.columns if column not in words))


def _most(level: dict[str, float | None]) -> float | None:
    """Return the largest upper bound of a growth that is known."""
    grown = [level[f"{name}_growth_upper"] for name in ("under_way", "depth", "age")]
    return max((value for value in grown if value is not None), default=None)


def _bound(share: float | None) -> str:
    return "—" if share is None else percent(round(share, 4))
