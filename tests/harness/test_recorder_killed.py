"""A harness that is killed in the middle of its work leaves a set that can be read."""

import subprocess
import sys
from pathlib import Path

import pytest

from harness.sampleset import read_sample_set

# Records one row at a time, writes after every tenth, and says after each write how many rows are on disk.
RECORD = """
import sys
from pathlib import Path
from harness import tablefiles
from harness.recorder import Recorder
from harness.sample import Endpoint, Mode, Outcome, RunRecord
tablefiles.PART_ROWS = int(sys.argv[2])
recorder = Recorder(Path(sys.argv[1]), Mode.SOAK, "scenario", {})
for run in range(1, 1_000_000):
    recorder.plan(1)
    stamps = (run, run, run, run)
    recorder.samples.append(run, 0, Endpoint.CREATE, 1.0, 0, 0, *stamps, 200, Outcome.OK, None, (1.0,) * 4, 1, 1)
    unknown = (None,) * 5
    recorder.add_run(RunRecord(str(run), None, None, None, 0, 0, *unknown, False, None, None, None, 0))
    if run % 10 == 0:
        recorder.write(recorder.collect())
        print(run, flush=True)
"""


@pytest.mark.parametrize("part_rows", [25, 1_000])
@pytest.mark.parametrize("writes", [1, 4, 7])
def test_a_killed_recorder_leaves_every_written_row_once_and_says_that_it_is_not_complete(
    tmp_path: Path, part_rows: int, writes: int
) -> None:
    with subprocess.Popen(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", RECORD, str(tmp_path), str(part_rows)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        told = 0
        for _ in range(writes):
            told = int(process.stdout.readline())
        process.kill()  # SIGKILL, wherever it is by now
        rest = process.stdout.read().split()
    if rest:
        told = int(rest[-1])  # it came further before the kill reached it
    [path] = tmp_path.iterdir()
    measured = read_sample_set(path)
    assert not measured.manifest.complete
    for table in (measured.samples, measured.runs):
        keys = table["run_key"].to_pylist()
        assert keys == [str(run) for run in range(1, len(keys) + 1)]
        assert len(keys) in {told, told + 10}  # a write may have ended without our being told
