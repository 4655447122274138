"""From paths to verdicts: what the report, the gate of a load run and every notebook call, so that all see the same.

Reads the sample sets and the file of SLOs, asks whether the measurement may be judged, and only then judges.
Next: `analysis/validity` and `analysis/judges`; `report` writes what is found here.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa

from harness.analysis.dataset import Dataset, build_dataset
from harness.analysis.gate import find_shared, judge_regression
from harness.analysis.judges import judge_all
from harness.analysis.slo import Slo, Verdict, overall
from harness.analysis.validity import Finding, find_faults
from harness.errors import ExitCode
from harness.folders import data_folder, find_in_checkout
from harness.sample import Mode
from harness.sampleset import (
    MANIFEST,
    Manifest,
    UnreadableFile,
    newest_sample_set,
    read_manifest,
    read_sample_set,
    sets_in,
)
from harness.slofile import SLO_FILE, read_slos

BASELINE = Path("data/baselines/smoke")
"""Where `make baseline` leaves this machine's baseline."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was measured and what it proves."""

    data: Dataset
    baseline: Dataset | None  # what the regression gate compares with; null without one
    slos: tuple[Slo, ...]
    findings: tuple[Finding, ...]  # reasons not to trust the measurement; when there are any, nothing was judged
    verdicts: tuple[Verdict, ...]  # empty when there are findings
    manifest_sha256: dict[str, str]  # of the manifest of each measurement judged, by its id

    @property
    def exit_code(self) -> ExitCode:
        """Return what a CI job sees."""
        return overall(self.verdicts, valid=not self.findings)

    @property
    def folders(self) -> dict[str, str]:
        """Return the name of each measurement's folder."""
        sides = [self.data] if self.baseline is None else [self.data, self.baseline]
        return {
            manifest.measurement_id: folder
            for side in sides
            for manifest, folder in zip(side.manifests, side.folders, strict=True)
        }

    @property
    def measurement_ids(self) -> tuple[str, ...]:
        """Return the measurements judged, in order."""
        return tuple(manifest.measurement_id for manifest in self.data.manifests)


def load(
    samples: Sequence[str | Path] = (),
    slo_file: str | Path = SLO_FILE,
    *,
    partial: bool = False,
    baseline: str | Path = "",
) -> Evaluation:
    """Read sample sets and judge them; without paths, the newest set of this checkout.

    `baseline` is a sample set, or a folder that holds some, to compare with; nothing is compared when it is empty, or
    when it is BASELINE and was not measured yet.

    Relative paths are those of the working directory, or else of the checkout that holds it, so that a notebook finds
    them too. Raises SampleSetError for files that cannot be read and SloFileError for SLOs that cannot.
    """
    paths = [find_in_checkout(Path(path)) for path in samples] or [
        newest_sample_set(find_in_checkout(data_folder() / "samples"))
    ]
    slos = read_slos(find_in_checkout(Path(slo_file)))
    data = build_dataset([_frames(path) for path in paths])
    digests = {
        read_manifest(path).measurement_id: hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest() for path in paths
    }
    findings = find_faults(data, partial=partial)
    unmeasured = Path(baseline) == BASELINE and not find_in_checkout(BASELINE).exists()
    if not str(baseline) or unmeasured:
        return Evaluation(data, None, slos, findings, () if findings else judge_all(slos, data), digests)
    compared = build_dataset([_frames(path) for path in sets_in(find_in_checkout(Path(baseline)))])
    findings += (*find_faults(compared), *find_shared(data, compared))
    verdicts = () if findings else (*judge_all(slos, data), *judge_regression(data, compared))
    return Evaluation(data, compared, slos, findings, verdicts, digests)


def find_faults_in(path: Path) -> tuple[Finding, ...]:
    """Return every reason not to trust the sample set at `path`, without judging it; raises SampleSetError."""
    return find_faults(build_dataset([_frames(path)]))


def _frames(path: Path) -> tuple[str, Manifest, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return one set's folder, its manifest and its tables as data frames, whole numbers kept whole beside nulls."""
    one = read_sample_set(path)
    if one.manifest.mode not in {mode.value for mode in Mode}:
        known = ", ".join(Mode)
        raise UnreadableFile(path, MANIFEST, f"its mode is {one.manifest.mode!r}, this program knows {known}")
    return path.resolve().name, one.manifest, _frame(one.samples), _frame(one.runs), _frame(one.resources)


def _frame(table: pa.Table) -> pd.DataFrame:
    """Return a table as a data frame with nullable columns; categories become plain text, which compares by value."""
    plain = table.cast(
        pa.schema(
            field.with_type(pa.string()) if pa.types.is_dictionary(field.type) else field for field in table.schema
        )
    )
    types = {pa.int64(): pd.Int64Dtype(), pa.float64(): pd.Float64Dtype(), pa.string(): pd.StringDtype()}
    frame: pd.DataFrame = plain.to_pandas(types_mapper=types.get)
    return frame
