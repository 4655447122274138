"""`verdict.json`: what a CI job reads instead of trusting that a notebook ran.

The same samples give the same bytes: no times, no paths, numbers rounded, keys in order. The file carries the hash of
its own content and is checked against its types when it is written and when it is read; a file that is missing, was
edited, or contradicts itself makes the measurement invalid. `schemas/verdict.schema.json` says the same to others.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from harness.analysis.dataset import Dataset
from harness.analysis.slo import Verdict, overall
from harness.analysis.validity import Finding
from harness.errors import HarnessError
from harness.evaluation import Evaluation

SCHEMA = Path(__file__).parent / "schemas" / "verdict.schema.json"


class JudgedSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One sample set that was judged."""

    measurement_id: str
    mode: str
    attempt: int  # from 1; a rerun-until-green shows here
    complete: bool
    files: dict[str, str]  # name: sha256, so that every number can be traced to its bytes
    tool: str  # which recorded it: ours, or the one it was imported from
    notes: tuple[str, ...]  # what that tool cannot know, in sentences; empty for ours


class VerdictDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The verdict on a measurement."""

    schema_version: Literal[1]
    verdict: Literal["PASS", "FAIL", "INCONCLUSIVE", "INVALID"]
    exit_code: Literal[0, 1, 2, 3]
    measurements: Annotated[tuple[JudgedSet, ...], msgspec.Meta(min_length=1)]
    findings: tuple[Finding, ...]  # why it is invalid; empty otherwise
    checks: tuple[Verdict, ...]  # empty when invalid
    baseline: tuple[JudgedSet, ...]  # what the regression gate compared with; empty without one
    digest: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?$")]  # sha256 of all the rest


class VerdictFileError(HarnessError):
    """A verdict file cannot be trusted."""

    def __init__(self, path: Path, fault: str) -> None:
        super().__init__(f"{path}: {fault}")
        self.path = path


def verdict_document(evaluation: Evaluation) -> VerdictDocument:
    """Return what `verdict.json` says about an evaluation."""
    words: dict[int, Any] = {0: "PASS", 1: "FAIL", 2: "INVALID", 3: "INCONCLUSIVE"}
    code: Any = int(evaluation.exit_code)
    document = VerdictDocument(
        schema_version=1,
        verdict=words[code],
        exit_code=code,
        measurements=_judged(evaluation.data),
        baseline=() if evaluation.baseline is None else _judged(evaluation.baseline),
        findings=evaluation.findings,
        checks=evaluation.verdicts,
        digest="",
    )
    return msgspec.structs.replace(document, digest=_digest(document))


def _judged(data: Dataset) -> tuple[JudgedSet, ...]:
    """Return the sets of a dataset as the file names them."""
    return tuple(
        JudgedSet(
            measurement_id=one.measurement_id,
            mode=one.mode,
            attempt=one.attempt,
            complete=one.complete,
            files=dict(sorted(one.files.items())),
            tool=one.source.tool,
            notes=one.source.notes,
        )
        for one in data.manifests
    )


def write_verdict(path: Path, document: VerdictDocument) -> None:
    """Write the verdict and read it back, so that what is on disk is what was judged. Raises VerdictFileError."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")
    if read_verdict(path) != document:
        raise VerdictFileError(path, "does not hold what was written")


def read_verdict(path: Path) -> VerdictDocument:
    """Return the verdict of a file. Raises VerdictFileError when it is missing, edited or contradicts itself."""
    try:
        document = msgspec.json.decode(path.read_bytes(), type=VerdictDocument)
    except FileNotFoundError:
        raise VerdictFileError(path, "there is no verdict file, so nothing passed") from None
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as fault:
        raise VerdictFileError(path, f"is no verdict file: {fault}") from None
    if document.digest != _digest(document):
        raise VerdictFileError(path, "was changed after it was written: its digest is not that of its content")
    if document.exit_code != int(overall(document.checks, valid=not document.findings)):
        raise VerdictFileError(path, "contradicts itself: its exit code is not what its checks come to")
    return document


def verdict_schema() -> dict[str, Any]:
    """Return the JSON schema of the verdict file, derived from its types."""
    schema = msgspec.json.schema(VerdictDocument)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Plimsoll verdict", **schema}


def _digest(document: VerdictDocument) -> str:
    """Return the sha256 of the document without its digest."""
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(document, digest=""))).hexdigest()
