"""Faults that a report must not swallow, each injected into a checkout and a sample set that are otherwise in order.

A fault is silent when the command that met it ends with 0, or with a code that blames something else. `inflict` runs
the real command, `python -m harness report`, in this process; `test_silent_failures` holds each to its exit code and to
the words that name it, and `tests/campaigns/silent_failures.py` writes down what was seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness import execution, report
from harness.__main__ import main
from harness.sample import Mode, Outcome
from tests.harness.synthetic import ORIGIN_NS, WALL_NS, Plan, Spoil, change, hashes, write_sample_set

ROOT = Path(__file__).parents[2]
RUNS = 12
CELL_SECONDS = 2  # for a cell that hangs; ten minutes elsewhere
PAGE_BYTES = 300_000  # for a page that is too large; two million elsewhere


@dataclasses.dataclass
class Scene:
    """A checkout in order, a sample set in order, and the words of the command that would make a report of it."""

    checkout: Path
    samples: list[Path]
    words: list[str] = dataclasses.field(default_factory=list)

    @property
    def path(self) -> Path:
        """Return the folder of the first sample set."""
        return self.samples[0]

    def notebook(self, code: str, parameters: str = "samples: list[str] = []") -> None:
        """Put one notebook in the checkout, and ask for it alone."""
        cells = f'# %% tags=["parameters"]\n{parameters}\n\n# %%\n{code}\n'
        (self.checkout / "notebooks" / "made_up.py").write_text(cells, encoding="utf-8")
        self.words += ["--notebooks", "made_up"]


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault, what it must end with and the words by which it must be named."""

    told: str
    inject: Callable[[Scene], object]
    code: int
    named: str


@dataclasses.dataclass(frozen=True)
class Ended:
    """What the command came to."""

    code: int
    said: str  # stdout and stderr
    verdict: str | None  # of the file it left behind; null without one


def inflict(fault: Fault, folder: Path) -> Ended:
    """Run the command on a scene with this fault."""
    checkout = folder / "checkout"
    shutil.copytree(ROOT / "notebooks", checkout / "notebooks", ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "data").mkdir()
    shutil.copy(ROOT / "data" / "slo.yaml", checkout / "data" / "slo.yaml")
    scene = Scene(checkout, [write_sample_set(folder / "sets", Plan(runs=RUNS))])
    fault.inject(scene)
    out, said = folder / "report", io.StringIO()
    words = ["report", "--samples", *map(str, scene.samples), "--out", str(out), *scene.words]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        patch.setattr(execution, "CELL_TIMEOUT_S", CELL_SECONDS)
        patch.setattr(report, "PAGE_BYTES_MAX", PAGE_BYTES)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                code = int(main(words))
            except SystemExit as refusal:
                code = int(refusal.code or 0)
    file = out / "verdict.json"
    return Ended(code, said.getvalue(), json.loads(file.read_bytes())["verdict"] if file.is_file() else None)


# ---- ways to spoil a file --------------------------------------------------------------------------------------------


def _rows(*spoil: Spoil, plan: Plan | None = None, **manifest: Any) -> Callable[[Scene], None]:
    """Return an injection that writes the set anew with these rows, hashed as they are."""

    def inject(scene: Scene) -> None:
        shutil.rmtree(scene.path)
        scene.samples[0] = write_sample_set(scene.path.parent, plan or Plan(runs=RUNS), spoil, manifest)

    return inject


def _file(name: str, spoil: Callable[[Path], object], *, rehash: bool = False) -> Callable[[Scene], None]:
    """Return an injection that spoils one file of the set, and then vouches for it where that is wanted."""

    def inject(scene: Scene) -> None:
        spoil(scene.path / name)
        if rehash:
            manifest = json.loads((scene.path / "manifest.json").read_bytes())
            written = json.dumps(manifest | {"files": hashes(scene.path)})
            (scene.path / "manifest.json").write_text(written, encoding="utf-8")

    return inject


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 0xFF
    file.write_bytes(content)


def _rewrite(edit: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        pq.write_table(edit(pq.read_table(file)), file)

    return spoil


def _metadata(key: bytes, value: bytes) -> Callable[[Path], None]:
    return _rewrite(lambda table: table.replace_schema_metadata({**table.schema.metadata, key: value}))


def _copy_as(name: str) -> Callable[[Path], object]:
    return lambda file: shutil.copy(file, file.with_name(name))


def _edit_notebook(name: str, *pairs: tuple[str, str]) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        file = scene.checkout / "notebooks" / f"{name}.py"
        text = file.read_text(encoding="utf-8")
        for old, new in pairs:
            assert old in text
            text = text.replace(old, new)
        file.write_text(text, encoding="utf-8")

    return inject


def _cell(code: str) -> Callable[[Scene], None]:
    return lambda scene: scene.notebook(code)


def _words(*words: str) -> Callable[[Scene], None]:
    return lambda scene: scene.words.extend(words)


def _another(plan: Plan) -> Callable[[Scene], None]:
    """Return an injection that gives a second set."""
    return lambda scene: scene.samples.append(write_sample_set(scene.path.parent, plan))


def _clock(wall_step_s: float) -> dict[str, Any]:
    start = {"monotonic_ns": ORIGIN_NS, "wall_ns": WALL_NS}
    end = {"monotonic_ns": ORIGIN_NS + 2_000_000_000, "wall_ns": WALL_NS + int((2.0 + wall_step_s) * 1e9)}
    return {"clock": {"start": start, "end": end}}


def _late(rows: Any) -> None:
    """Send a fifth of the requests 0.3 s after they were due."""
    for index, row in enumerate(rows.samples[: len(rows.samples) // 5]):
        rows.samples[index] = dataclasses.replace(
            row, intended_at_ns=row.intended_at_ns - 300_000_000, latency_ms=row.latency_ms + 300.0
        )


def _stale(scene: Scene) -> None:
    """Leave an older report that passed in the folder of the next, whose samples are cut off."""
    out = scene.path.parent.parent / "report"
    out.mkdir()
    (out / "verdict.json").write_text('{"verdict": "PASS", "exit_code": 0}', encoding="utf-8")
    _truncate(scene.path / "samples-00001.parquet")


def _quoted_fraction(scene: Scene) -> None:
    """Give a fraction in quotes, which papermill would take."""
    scene.notebook("share", "share: float = 0.5")
    scene.words += ["--parameter", "share='1.0'"]


REPORT = "pathlib.Path('.').resolve().parent / 'report'"
SAMPLES: Sequence[Fault] = (
    Fault("the manifest is missing", _file("manifest.json", Path.unlink), 2, "has no manifest.json"),
    Fault("the manifest is cut off", _file("manifest.json", _truncate), 2, "manifest.json cannot be read"),
    Fault("a Parquet file is cut off", _file("samples-00001.parquet", _truncate), 2, "samples-00001.parquet cannot be"),
    Fault("a Parquet file is empty", _file("runs.parquet", lambda file: file.write_bytes(b"")), 2, "runs.parquet"),
    Fault("a byte of a Parquet file is flipped", _file("samples-00001.parquet", _flip), 2, "samples-00001.parquet"),
    Fault("rows were taken out afterwards", _file("runs.parquet", _rewrite(lambda table: table.slice(1))), 2,
          "runs.parquet was altered: its sha256"),
    Fault("a listed file is missing", _file("resources.parquet", Path.unlink), 2, "resources.parquet cannot be read"),
    Fault("a file was copied beside itself", _file("samples-00001.parquet", _copy_as("samples-00002.parquet")), 2,
          "samples-00002.parquet is not listed"),
    Fault("a file was copied beside itself and vouched for",
          _file("samples-00001.parquet", _copy_as("samples-00002.parquet"), rehash=True), 2, "recorded twice"),
    Fault("the schema is of another version",
          _file("runs.parquet", _metadata(b"plimsoll.schema_version", b"99"), rehash=True), 2, "schema version 99"),
    Fault("a column is missing", _file("runs.parquet", _rewrite(lambda table: table.drop_columns(["ticks"])),
                                       rehash=True), 2, "runs.parquet cannot be read"),
    Fault("a file is of another measurement",
          _file("runs.parquet", _metadata(b"plimsoll.measurement_id", b"another"), rehash=True), 2,
          "belongs to measurement another"),
    Fault("planned requests have no row", _rows(lambda rows: rows.samples.__delitem__(slice(-3, None))), 2,
          "3 rows of 48 planned requests are missing"),
    Fault("a create has no record of its run", _rows(lambda rows: rows.runs.__delitem__(0)), 2,
          "1 create without a record of the run"),
    Fault("a run is recorded twice", _rows(lambda rows: rows.runs.append(rows.runs[0])), 2, "recorded twice"),
    Fault("one row is there twice and another is lost",
          _rows(lambda rows: rows.samples.__setitem__(-1, rows.samples[0])), 2, "recorded twice"),
    Fault("the harness was killed", _rows(complete=False), 2, "cut short (complete: false)"),
    Fault("rows of another load are among them", _rows(change(0, mode=Mode.SOAK)), 2, "measured in another mode"),
    Fault("the wall clock stepped", _rows(**_clock(3.0)), 2, "wall clock stepped by 3 s"),
    Fault("the monotonic clock ran backwards",
          _rows(clock={"start": {"monotonic_ns": ORIGIN_NS, "wall_ns": WALL_NS},
                       "end": {"monotonic_ns": ORIGIN_NS - 10**9, "wall_ns": WALL_NS + 10**9}}), 2, "ran backwards"),
    Fault("a row lies before the measurement",
          _rows(change(0, intended_at_ns=ORIGIN_NS - 10**10, sent_at_ns=None, latency_ms=None, service_ms=None,
                       status=None, outcome=Outcome.TIMEOUT)), 2, "outside of the measurement's time"),
    Fault("an answer came before its question",
          _rows(change(0, sent_at_ns=ORIGIN_NS + 900_000_000, service_ms=None, status=None, outcome=Outcome.TIMEOUT)),
          2, "done before they were sent"),
    Fault("a latency was made shorter", _rows(change(0, latency_ms=1.0)), 2, "latency_ms that their instants do not"),
    Fault("a latency is no number", _rows(change(0, latency_ms=float("nan"))), 2, "latency_ms that their instants do"),
    Fault("an error was made a success", _rows(change(0, status=503)), 2, "ok without a good status"),
    Fault("a success was made an error", _rows(change(0, outcome=Outcome.HTTP_ERROR)), 2, "errors with a good status"),
    Fault("an outcome that nobody knows", _rows(change(0, outcome="excellent")), 2, "no outcome that is known"),
    Fault("the generator could not keep its schedule", _rows(_late), 2, "could not keep its schedule"),
    Fault("the same set was given twice", lambda scene: scene.samples.append(scene.path), 2, "given twice"),
    Fault("sets of two commits were given as one", _another(Plan(runs=RUNS, measurement_id="other", commit="bbb")), 2,
          "no repetitions of one smoke measurement"),
    Fault("an older report that passed lies in the folder", _stale, 2, "samples-00001.parquet cannot be read"),
)  # fmt: skip

PAPERMILL: Sequence[Fault] = (
    Fault("a parameter that no notebook has", _words("--parameter", "slwoest=3"), 64, "no notebook has a parameter"),
    Fault("a text for a whole number", _words("--parameter", "slowest='3'"), 64, "'slowest': expected int, got str"),
    Fault("a fraction for a whole number", _words("--parameter", "slowest=1.5"), 64, "'slowest': expected int, got"),
    Fault("a date for a whole number", _words("--parameter", "slowest=2026-01-01"), 64, "'slowest': expected int, got"),
    Fault("the text 1.0 for a fraction", _quoted_fraction, 64, "'share': expected float, got str"),
    Fault("the cell of parameters has lost its tag", _edit_notebook("run_overview", (' tags=["parameters"]', "")), 64,
          "has no cell tagged `parameters`"),
    Fault("two cells are tagged parameters",
          _edit_notebook("run_overview", ("# %%\nevaluation", '# %% tags=["parameters"]\nevaluation')), 64,
          "has 2 cells tagged `parameters`"),
    Fault("a parameter is derived from another, which would stay stale",
          lambda scene: scene.notebook("double", "count: int = 3\ndouble: int = 2 * count"), 64,
          "computed, not written"),
    Fault("a parameter is a tuple, which would become a text",
          lambda scene: scene.notebook("pair", "pair: tuple[int, int] = (1, 2)"), 64,
          "is a tuple[int, int], known are"),
    Fault("the file of SLOs has a typo",
          lambda scene: (scene.checkout / "data" / "slo.yaml").write_text("apiVersion: openslo/v2", encoding="utf-8"),
          64, "data/slo.yaml, document 1"),
    Fault("a cell raises", _cell("raise ValueError('nothing to see')"), 2,
          "made_up failed: ValueError: nothing to see"),
    Fault("a cell leaves with sys.exit(0)", _cell("import sys\nsys.exit(0)"), 2, "made_up failed: it ended early"),
    Fault("the kernel is killed", _cell("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"), 2,
          "made_up failed: DeadKernelError"),
    Fault("a cell hangs", _cell("import time\ntime.sleep(600)"), 2, "made_up failed: CellTimeoutError"),
    Fault("a page is too large", _cell(f"print('x' * {PAGE_BYTES})"), 2, "made_up made a page of"),
    Fault("a notebook takes the verdict away", _cell(f"import pathlib\n({REPORT} / 'verdict.json').unlink()"), 2,
          "there is no verdict file, so nothing passed"),
    Fault("a notebook makes the verdict better",
          _cell(f"import pathlib\nfile = {REPORT} / 'verdict.json'\n"
                "file.write_text(file.read_text().replace('INCONCLUSIVE', 'PASS'))"), 2,
          "was changed after it was written"),
)  # fmt: skip

FAULTS = (*SAMPLES, *PAPERMILL)
