"""What a report is asked for, checked before anything slow is imported or any load is made.

Refused here, each with the flag that is at fault: paths that do not exist, an unknown notebook or parameter, a value of
the wrong type, a file of SLOs with a typo, a folder that cannot be written (64), and last a path that exists and holds
no sample set (2). What the samples themselves are worth is for `report` to say.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import BadUsage
from harness.folders import NOTEBOOKS, find_in_checkout
from harness.notebooks import Notebook, applicable, check_parameters, find_notebooks
from harness.quotaparameters import NOTEBOOK, check_quota_parameters
from harness.sampleset import read_manifest, sets_in
from harness.slofile import SLO_FILE, SloFileError, read_slos


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """A report that can be made, as far as can be told without reading the samples."""

    samples: tuple[Path, ...]
    slo_file: Path
    notebooks: tuple[Notebook, ...]  # in the order in which their pages are named
    parameters: dict[str, dict[str, Any]]  # of each notebook by its name, ours included
    out: Path | None  # the folder that gets the files; null: a new one in data/reports
    partial: bool  # judge also sets that were cut short
    baseline: Path | None  # a sample set, or a folder of some, to compare with


def check_request(
    samples: Sequence[Path],
    notebooks: Sequence[str] | None = None,
    out: Path | None = None,
    *,
    partial: bool = False,
    parameters: Mapping[str, str] | None = None,
    slo_file: Path = SLO_FILE,
    baseline: Path | None = None,
) -> Request:
    """Return the request. `notebooks` are names, null for those of the checkout that apply.

    `parameters` are YAML texts by name. Raises BadUsage that names the flag, or a SampleSetError for a path that is no
    sample set.
    """
    if not samples:
        raise BadUsage("--samples needs at least one folder of a sample set")
    for path in samples:
        if not path.exists():
            raise BadUsage(f"--samples {path} does not exist: give the folder of a sample set")
    if baseline is not None:
        _require_baseline(baseline)
    if out is not None:
        _refuse_unwritable(out)
    try:
        slos = _checked_slos(slo_file)
    except SloFileError as fault:
        raise BadUsage(f"--slo {fault}") from None
    chosen = find_notebooks(notebooks, find_in_checkout(NOTEBOOKS))
    ours = {
        "samples": [str(path.resolve()) for path in samples],
        "partial": partial,
        "slo_file": str(slos.resolve()),
        "baseline": "" if baseline is None else str(baseline.resolve()),
    }
    checked = check_parameters(chosen, ours, parameters or {})
    check_quota_parameters(checked.get(NOTEBOOK, {}))
    if checked.get(NOTEBOOK, {}).get("active"):  # a notebook runs in the checkout, whoever asks from wherever
        checked[NOTEBOOK]["active"] = str(Path(checked[NOTEBOOK]["active"]).resolve())
    modes = {read_manifest(path).mode for path in samples}
    if notebooks is None:
        chosen = applicable(chosen, modes, baseline=baseline is not None)
    return Request(tuple(samples), slos, chosen, checked, out, partial, baseline)


def require_judgeable(baseline: Path | None = None) -> None:
    """Raise BadUsage when SLOs, notebooks or baseline cannot be used, before load is made to be judged by them."""
    if baseline is not None:
        _require_baseline(baseline)
    _checked_slos(SLO_FILE)
    check_parameters(find_notebooks(None, find_in_checkout(NOTEBOOKS)), {}, {})


def _require_baseline(baseline: Path) -> None:
    """Raise BadUsage for a baseline that does not exist, SampleSetError for one that holds no sample set."""
    if not baseline.exists():
        raise BadUsage(f"--baseline {baseline} does not exist: give a sample set, or a folder that holds some")
    for path in sets_in(baseline):
        read_manifest(path)


def _checked_slos(file: Path) -> Path:
    """Return where the file of SLOs is. Raises SloFileError for what is wrong in it."""
    found = find_in_checkout(file)
    read_slos(found)
    return found


def _refuse_unwritable(out: Path) -> None:
    """Raise BadUsage when the folder can certainly not be made or written."""
    nearest = next(above for above in (out, *out.absolute().parents) if above.exists())
    if not nearest.is_dir():
        raise BadUsage(f"--out {out}: cannot be written ({nearest} is a file)")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise BadUsage(f"--out {out}: cannot be written (no right to write in {nearest})")
