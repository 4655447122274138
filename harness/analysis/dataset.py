"""What is judged: the rows of one or more sample sets as data frames, each row knowing its measurement.

Built by `evaluation` from files; everything in this package reads it and nothing changes it. Next: `validity`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np
import pandas as pd

from harness.analysis.dependence import Floats, Ints
from harness.sample import Endpoint, Mode, Outcome
from harness.sampleset import Manifest

GROUPED_BY_TRIAL = frozenset({Mode.BURST, Mode.BURST_LIMITS})
"""Modes whose runs start together, so that the burst and not the run is what repeats independently."""


NOT_COMPARED = frozenset({"runs"})
"""Parameters in which two measurements of the same load may differ: how long it went on."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Sample sets read together, ordered by measurement id. Every frame has a `measurement_id` and a `mode` column."""

    manifests: tuple[Manifest, ...]
    folders: tuple[str, ...]  # the name of the folder of each, for a reader; no verdict depends on it
    samples: pd.DataFrame  # columns of harness.sample.Sample, plus `root_key` (the parent run's key)
    runs: pd.DataFrame  # columns of harness.sample.RunRecord, plus `root_key`
    resources: pd.DataFrame  # columns of harness.sample.ResourceSample

    def of_modes(self, modes: Collection[Mode]) -> Dataset:
        """Return the part that was measured in one of these modes."""
        wanted = [mode.value for mode in modes]
        kept = [place for place, manifest in enumerate(self.manifests) if manifest.mode in wanted]
        return Dataset(
            tuple(self.manifests[place] for place in kept),
            tuple(self.folders[place] for place in kept),
            self.samples[self.samples["mode"].isin(wanted)],
            self.runs[self.runs["mode"].isin(wanted)],
            self.resources[self.resources["mode"].isin(wanted)],
        )

    def of_endpoint(self, endpoint: Endpoint) -> pd.DataFrame:
        """Return the samples of one endpoint in the order in which they were due."""
        return in_order(self.samples[self.samples["endpoint"] == endpoint.value])

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what imported measurements cannot tell, each sentence with its tool; empty for our own."""
        told = [f"{one.source.tool}: {note}" for one in self.manifests for note in one.source.notes]
        return tuple(dict.fromkeys(told))

    @property
    def tells_failures(self) -> bool:
        """Say whether every measurement told which requests failed; a log of histograms does not."""
        return not any("outcome" in one.source.cannot_know for one in self.manifests)


def build_dataset(sets: Collection[tuple[str, Manifest, pd.DataFrame, pd.DataFrame, pd.DataFrame]]) -> Dataset:
    """Return the dataset of sample sets, each given as its folder's name, manifest, samples, runs and resources."""
    ordered = sorted(sets, key=lambda one: one[1].measurement_id)
    samples, runs, resources = [], [], []
    for _, manifest, sample_rows, run_rows, resource_rows in ordered:
        name = {"measurement_id": manifest.measurement_id, "mode": manifest.mode}
        parents = run_rows.set_index("run_key")["parent_run_key"].dropna().to_dict()
        roots = {key: parents.get(key, key) for key in {*sample_rows["run_key"], *run_rows["run_key"]}}
        samples.append(
            sample_rows.assign(measurement_id=manifest.measurement_id, root_key=sample_rows["run_key"].map(roots))
        )
        runs.append(run_rows.assign(**name, root_key=run_rows["run_key"].map(roots)))
        resources.append(resource_rows.assign(**name))
    return Dataset(
        tuple(manifest for _, manifest, *_ in ordered),
        tuple(folder for folder, *_ in ordered),
        pd.concat(samples, ignore_index=True),
        pd.concat(runs, ignore_index=True),
        pd.concat(resources, ignore_index=True),
    )


def asked_alike(manifest: Manifest) -> dict[str, object]:
    """Return the parameters in which measurements must be alike to be compared."""
    return {name: value for name, value in manifest.parameters.items() if name not in NOT_COMPARED}


def moment_ns(samples: pd.DataFrame) -> pd.Series:
    """Return when each request was due; where an imported tool did not record it, when it was sent, or else done."""
    return samples["intended_at_ns"].fillna(samples["sent_at_ns"]).fillna(samples["done_at_ns"])


def in_order(samples: pd.DataFrame) -> pd.DataFrame:
    """Return the rows measurement by measurement in the order of their moments; those of one moment as recorded."""
    order = ["measurement_id", "moment_ns", "sent_at_ns"]
    return samples.assign(moment_ns=moment_ns(samples)).sort_values(order, kind="stable").drop(columns="moment_ns")


def waited_ms(samples: pd.DataFrame) -> Floats:
    """Return what each request waited, shape (n_requests,), in milliseconds; failures are infinitely slow.

    From the intended moment; where an imported tool did not record it, from sending (see `counted_from_send`).
    """
    counted = samples["latency_ms"].fillna(samples["service_ms"])
    ok = (samples["outcome"] == Outcome.OK.value).to_numpy(dtype=bool)
    values = counted.to_numpy(dtype=np.float64, na_value=np.inf)
    return np.where(ok, values, np.inf)


def counted_from_send(samples: pd.DataFrame) -> bool:
    """Say whether some of these latencies start at sending, so that coordinated omission is not excluded."""
    return bool((samples["latency_ms"].isna() & samples["service_ms"].notna()).any())


def groups_of(rows: pd.DataFrame) -> Ints:
    """Number the independent unit of each row, shape (n_rows,): its burst where runs start together, else its run.

    Trials count from 0 at each level, so a burst is named by both.
    """
    burst = rows["mode"].isin([mode.value for mode in GROUPED_BY_TRIAL])
    unit = rows["root_key"].astype(str).where(~burst, rows["level"].astype(str) + "/" + rows["trial"].astype(str))
    return np.asarray(pd.factorize(rows["measurement_id"].astype(str) + "/" + unit)[0], dtype=np.int64)
