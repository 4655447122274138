"""Injects every fault of `tests/harness/silent_faults` and writes docs/evidence/silent-failures.md: what each came to.

Run by `make silent-failures`. Ends with 1 when a fault was silent: a pass, another exit code, or an error that does not
name it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.campaigns.flags import Flags
from tests.harness.silent_faults import FAULTS, PAPERMILL, SAMPLES, Ended, Fault, inflict

PAGE = Path(__file__).parents[2] / "docs" / "evidence" / "silent-failures.md"

SHOWN = 200
"""Characters of what was said that the page shows."""

HEAD = """# Silent failures: what a report does with a fault

Made by `make silent-failures`, which injects each fault into a checkout and a sample set that are otherwise in order
and runs `python -m harness report` on them. A fault would be silent if the command ended with 0, or with a code or
words that blame something else, or if it left a `verdict.json` behind that says PASS. The same faults are tests
(`tests/harness/test_silent_failures.py`), so that each commit is held to them.

**{silent} of {count} faults were silent.** Exit code 2 is a measurement or a report that cannot be trusted, 64 is bad
usage, refused before any notebook runs.
"""


def named(fault: Fault, ended: Ended) -> bool:
    """Say whether the fault was caught: its exit code, its name, and no verdict that anyone could take for a pass."""
    return (ended.code, fault.named in ended.said, ended.verdict in {None, "INVALID"}) == (fault.code, True, True)


def line_of(fault: Fault, ended: Ended, root: str) -> str:
    """Return the line that names the fault, shortened to its words and without a path of this machine."""
    line = next((one for one in ended.said.splitlines() if fault.named in one), "nothing")
    words = line.strip().removeprefix("python -m harness report: ").replace(root, "").replace("|", "\\|")
    return words if len(words) <= SHOWN else f"{words[:SHOWN]}…"


def main() -> int:
    """Inject, print and write; return how many were silent, at most 1."""
    Flags("silent_failures", __doc__).parse_args()
    rows: dict[str, str] = {}
    silent = 0
    with tempfile.TemporaryDirectory(prefix="plimsoll-faults-") as root:
        for number, fault in enumerate(FAULTS):
            folder = Path(root).resolve() / f"{number:02d}"
            ended = inflict(fault, folder)
            caught = named(fault, ended)
            silent += not caught
            sys.stdout.write(f"{'caught' if caught else 'SILENT'}  {ended.code:>2}  {fault.told}\n")
            said = line_of(fault, ended, f"{folder}/").replace("sets/20260101T000000Z-smoke-0190-synthetic-1", "SET")
            said = said.replace("20260101T000000Z-smoke-0190-synthetic-1", "SET")
            rows[fault.told] = f"| {fault.told} | {ended.code} | {said}{'' if caught else ' (SILENT)'} |"
    parts = [HEAD.format(silent=silent, count=len(FAULTS))]
    for title, faults in (("In the samples", SAMPLES), ("In notebooks and their parameters", PAPERMILL)):
        parts.append("\n".join([f"## {title}", "", "| fault | exit code | what was said |", "|---|---|---|",
                                *(rows[fault.told] for fault in faults), ""]))  # fmt: skip
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    return min(silent, 1)


if __name__ == "__main__":
    raise SystemExit(main())
