"""The table of quotas of a report: what is proposed, against what, and the file in which it is proposed.

The table in force is a file that `quotas show --json` printed, or revision 1, which every installation starts with,
where the measurement says that revision 1 was in force. Against an unknown table nothing is proposed: limits that were
not measured would be set to whatever had been guessed. Nor is anything proposed from a measurement that cannot be
trusted, was cut short, or shows no rate. Before: `analysis/quotasets`; next: `analysis/quotas_shown`.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.analysis.dataset import Dataset
from harness.analysis.quotas import FRACTION, QuotaRow, quota_rows, revision_bytes, revision_of
from harness.analysis.quotasets import QuotaTable, counted, throughputs
from harness.analysis.ratesets import Capacity
from harness.evaluation import Evaluation
from harness.quotaparameters import check_quota_parameters, read_active
from harness.sample import Mode
from harness.sampleset import Manifest
from service.quota.limits import Limit
from service.quota.tables import FIRST, Measured, Provenance, Tables

REVISION = "quota_revision.json"

SOURCES = (Mode.CAPACITY, Mode.BURST_LIMITS)
"""What a table of quotas is made from."""


def quota_table(evaluation: Evaluation, fraction: float = FRACTION, active: str = "") -> QuotaTable:
    """Return what these measurements propose against the table in the file `active`, or else revision 1.

    Raises BadUsage for a fraction or a file that cannot be used.
    """
    check_quota_parameters({"fraction": fraction, "active": active})
    tables, named = _in_force(evaluation, active)
    rows: tuple[QuotaRow, ...] = ()
    if not evaluation.findings and tables is not None:
        rows = quota_rows(throughputs(evaluation.data), tables.default, fraction)
    table = QuotaTable(evaluation.data, evaluation.findings, fraction, tables, named, rows, None)
    return dataclasses.replace(table, refusal=_refusal(table))


def revision_file(table: QuotaTable, evaluation: Evaluation, notebook: Path | None = None) -> bytes | None:
    """Return the bytes of `quota_revision.json`; null when nothing is proposed.

    `notebook` is the executed one, beside which the file will lie.
    """
    if table.refusal is not None or table.active is None:
        return None
    manifests = _sources(evaluation.data)
    commits = {manifest.commit for manifest in manifests}
    provenance = Provenance(
        author="harness report",
        note=f"{table.fraction:g} of the lower 95 % bound of stable throughput; limits not measured stay.",
        measured_at=max(_ended_at(manifest) for manifest in manifests),
        samples={one.measurement_id: evaluation.manifest_sha256[one.measurement_id] for one in manifests},
        commit=commits.pop() if len(commits) == 1 else None,
        machine=_plain(manifests[0].machine),
        measured=evidence(table, evaluation),
        notebook=None if notebook is None else notebook.name,
        notebook_sha256=None if notebook is None else hashlib.sha256(notebook.read_bytes()).hexdigest(),
    )
    return revision_bytes(revision_of(table.rows, table.active, provenance))


def evidence(table: QuotaTable, evaluation: Evaluation) -> dict[Limit, Measured]:
    """Return what stands behind each quota, for whoever activates without a person at hand.

    Only where the search also found a rate that is not sustained: without one nothing bounds the capacity from above.
    """
    manifests = {manifest.measurement_id: manifest for manifest in _sources(evaluation.data)}
    rows = {row.limit: row for row in table.measured}
    found = {}
    for limit, search in counted(table.data).items():
        lower = rows[limit].throughput_per_s_lower if limit in rows else None
        if lower is None or search.highest_pass_per_s is None or search.lowest_fail_per_s is None:
            continue
        manifest = manifests[search.measurement_id]
        requests = _rows_at(table.data, search, search.highest_pass_per_s)
        found[limit] = Measured(
            per_s=search.highest_pass_per_s,
            lower_per_s=lower,
            upper_per_s=search.lowest_fail_per_s,
            verdict="PASS",
            requests_planned=requests + _rows_lacking(table.data, manifest),
            requests_recorded=requests,
            seconds=search.span.whole_s * len(search.best),
            late_share=sum(trial.late for trial in search.best) / max(sum(trial.sent for trial in search.best), 1),
            samples={manifest.measurement_id: evaluation.manifest_sha256[manifest.measurement_id]},
            measured_at=_ended_at(manifest),
            machine=_plain(manifest.machine),
        )
    return found


def _rows_at(data: Dataset, search: Capacity, rate_per_s: float) -> int:
    """Return how many requests of a search were recorded at one rate."""
    samples = data.samples
    own = (samples["measurement_id"] == search.measurement_id) & (samples["level"] == rate_per_s)
    return int((own & (samples["endpoint"] == search.requirement.latency.endpoint.value)).sum())


def _rows_lacking(data: Dataset, manifest: Manifest) -> int:
    """Return how many rows a set has fewer than requests were planned.

    The plan is kept for the whole set, so each of them may have been one of any rate, and is counted against all.
    """
    return manifest.planned_requests - int((data.samples["measurement_id"] == manifest.measurement_id).sum())


def _ended_at(manifest: Manifest) -> datetime.datetime:
    """Return when a measurement ended, to the millisecond."""
    return datetime.datetime.fromtimestamp(manifest.clock.end.wall_ns // 1_000_000 / 1e3, datetime.UTC)


def _sources(data: Dataset) -> list[Manifest]:
    """Return the measurements that a table is made from."""
    return [manifest for manifest in data.manifests if manifest.mode in SOURCES]


def _in_force(evaluation: Evaluation, active: str) -> tuple[Tables | None, str]:
    """Return the table in force and how it is called."""
    if active:
        return read_active(active), Path(active).name
    revisions = {manifest.quota_revision for manifest in _sources(evaluation.data)}
    if revisions == {1}:
        return FIRST, "revision 1"
    told = " and ".join("unknown" if one is None else f"{one}" for one in sorted(revisions, key=lambda one: one or 0))
    return None, f"revision {told or 'unknown'}"


def _refusal(table: QuotaTable) -> str | None:
    """Return why nothing is proposed; null when something is."""
    manifests = _sources(table.data)
    if table.findings:
        return "Nothing is proposed, because the measurement cannot be trusted."
    if not any(manifest.mode == Mode.CAPACITY for manifest in manifests):
        return "These samples hold no search for capacity: make one with `python -m harness capacity`."
    if table.active is None:
        return (
            f"Nothing is proposed, because the table in force ({table.active_named}) is not known here: write it with"
            " `python -m service quotas show --json` into a file, and name that as the parameter `active`."
        )
    if len({manifest.commit for manifest in manifests}) > 1:
        return "Nothing is proposed, because bursts and capacity were measured on different commits."
    if not all(manifest.complete for manifest in manifests):
        return "Nothing is proposed, because a measurement was cut short."
    if not table.measured:
        return "Nothing is proposed: no limit was measured well enough, and every value in force stays."
    return None


def _plain(machine: Mapping[str, Any]) -> dict[str, str | int | float | bool | None]:
    """Return what of a machine's description a provenance can hold."""
    return {name: value for name, value in machine.items() if value is None or isinstance(value, str | int | float)}
