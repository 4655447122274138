"""Files of other tools, read as the command reads them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness.importers.formats import Format
from harness.importers.intake import import_file
from harness.sample import Endpoint, Mode, Outcome, Sample
from harness.sampleset import SampleSet, read_sample_set

FILES = Path(__file__).parent / "files"

SECOND_NS = 1_700_000_000 * 10**9
"""The moment at which all of the files begin: 2023-11-14T22:13:20Z."""

RUN = "018f4e2a-7b1c"


def imported(kind: Format, path: Path, root: Path, **options: Any) -> SampleSet:
    """Import a file and read the set back."""
    return read_sample_set(Path(import_file(kind, path, root, **options).samples))


def written(path: Path, content: str | bytes | Iterable[str]) -> Path:
    """Write a file: text, bytes or lines."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else "".join(f"{line}\n" for line in content), "utf-8")
    return path


def rows_of(found: SampleSet) -> list[Sample]:
    """Return the rows of a set as they were before they were written."""
    enums = {"endpoint": Endpoint, "mode": Mode, "outcome": Outcome}
    return [
        Sample(**row | {name: enum(row[name]) for name, enum in enums.items()}) for row in found.samples.to_pylist()
    ]


def sample(**known: Any) -> Sample:
    """Return an imported row of which only so much is known."""
    unknown: dict[str, Any] = dict.fromkeys(Sample.__dataclass_fields__)
    base = {"scenario": "imported", "mode": Mode.IMPORT, "trial": 0, "worker": 0, "outcome": Outcome.OK}
    return Sample(**unknown | base | known)
