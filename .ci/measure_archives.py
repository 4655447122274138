"""Measures archiving on this machine: runs per second and memory of `archive-runs`, with private servers of its own.

Usage: python .ci/measure_archives.py [RUNS] [STEPS]
(default 3000 finished runs of 8 steps each, half of them subruns)

Prints one line for each round: archive by one process, nothing left to do, archive by two at once, compact, purge.
Memory is the largest resident size of the archiving processes, read every 50 ms; `start` is it after the first tenth.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

import psutil
from sqlalchemy import text

from service.db import Database, migrate
from service.embedded import Stack
from service.workspaces import create_agent, create_workspace

FINISHED_RUNS = """
    WITH made AS (
        SELECT n, gen_random_uuid() AS run_id, gen_random_uuid() AS correlation_id FROM generate_series(1, :runs) n
    ), r AS (
        INSERT INTO runs (run_id, workspace_id, agent_id, parent_run_id, depth, status, correlation_id, step_count,
                          last_seq, created_at, started_at, ended_at, input_text)
        SELECT m.run_id, :workspace_id, :agent_id, p.run_id, CASE WHEN p.run_id IS NULL THEN 0 ELSE 1 END, 'COMPLETED',
               m.correlation_id, :steps, :steps + 3, now() - interval '41 days', now() - interval '41 days',
               now() - make_interval(days => 40, secs => m.n * 0.001), repeat('input ', 50)
        FROM made m LEFT JOIN made p ON m.n % 2 = 0 AND p.n = m.n - 1 ORDER BY m.n
    ), s AS (
        INSERT INTO steps SELECT run_id, k, 'MODEL_CALL', jsonb_build_object('text', repeat(md5(k::text || n), 8)),
               correlation_id, now() FROM made, generate_series(1, :steps) k
    )
    INSERT INTO events SELECT run_id, k, CASE k WHEN 1 THEN 'run_created' WHEN 2 THEN 'state_changed'
               WHEN :steps + 3 THEN 'state_changed' ELSE 'step_created' END,
           jsonb_build_object('step_index', k, 'kind', 'MODEL_CALL'), correlation_id, now()
    FROM made, generate_series(1, :steps + 3) k
"""


async def make_runs(database_url: str, runs: int, steps: int) -> None:
    """Insert finished runs, as the engine leaves them."""
    database = Database(database_url, pool_size=1)
    async with database.begin() as connection:
        workspace_id = await create_workspace(connection, "measured")
        agent_id = await create_agent(connection, workspace_id, "measured")
        parameters = {"runs": runs, "steps": steps, "workspace_id": workspace_id, "agent_id": agent_id}
        await connection.execute(text(FINISHED_RUNS), parameters)
    await database.close()


def watch(environment: dict[str, str], processes: int, *flags: str) -> tuple[int, float, float, float]:
    """Run `archive-runs` in so many processes; returns (paths printed, seconds, first and largest MiB of any)."""
    command = [sys.executable, "-m", "service", "archive-runs", *flags]
    started_at = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        running = [psutil.Popen(command, env=environment, stdout=said) for _ in range(processes)]
        sizes: list[int] = []
        while any(process.poll() is None for process in running):
            sizes.append(max((_rss_bytes(process) for process in running), default=0))
            time.sleep(0.05)
        elapsed_s = time.perf_counter() - started_at
        if any(process.wait() for process in running):
            raise SystemExit("archive-runs failed")
        said.seek(0)
        printed = sum(1 for _ in said)
    return printed, elapsed_s, max(sizes[: len(sizes) // 10 + 1]) / 2**20, max(sizes) / 2**20


def _rss_bytes(process: psutil.Popen) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def main() -> None:
    """Measure and print."""
    runs, steps = (int(argument) for argument in [*sys.argv[1:], *("3000", "8")[len(sys.argv) - 1 :]])
    with tempfile.TemporaryDirectory(prefix="plimsoll-archives-") as place:
        Path(place).chmod(0o711)  # PostgreSQL's user passes through it when this runs as root
        with Stack(Path(place) / "stack") as stack:
            migrate(stack.database_url)
            environment = {
                **os.environ,
                "DATABASE_URL": stack.database_url,
                "REDIS_URL": stack.redis_url,
                "PLIMSOLL_ARCHIVE_DIR": f"{place}/archives",
            }
            rounds: list[tuple[str, int, tuple[str, ...]]] = [
                ("archive, one process", 1, ()),
                ("nothing to do", 1, ()),
                ("archive, two processes", 2, ()),
                ("compact", 1, ("--compact",)),
                ("purge", 1, ("--purge-older-than", "30")),
            ]
            for name, processes, flags in rounds:
                if name.startswith("archive"):
                    asyncio.run(make_runs(stack.database_url, runs, steps))
                printed, elapsed_s, start_mib, most_mib = watch(environment, processes, *flags)
                done = {"compact": 2 * runs, "purge": 2 * runs}.get(name, printed)
                print(
                    f"{name:24} {done:6} runs {elapsed_s:7.2f} s {done / elapsed_s:7.0f} runs/s"
                    f"   RSS start {start_mib:4.0f} MiB, most {most_mib:4.0f} MiB",
                    flush=True,
                )
            files = list(Path(place).rglob("*.zip"))
            mean_bytes = sum(path.stat().st_size for path in files) / len(files)
            print(f"{len(files)} bundles of {mean_bytes:.0f} bytes in the mean")


if __name__ == "__main__":
    main()
