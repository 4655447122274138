"""Real processes of the service for a campaign: HTTP processes that share a port and their metrics, and workers."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx

from service.serve import address_of, http_children, listen, shared_metrics, worker_children
from service.settings import Settings, child_environment

PATIENCE_S = 60.0


@contextmanager
def running(settings: Settings, http: int, workers: int) -> Iterator[str]:
    """Run processes of the service; yields their URL. They are ended by their ids."""
    with ExitStack() as stack:
        folder = stack.enter_context(shared_metrics())
        environment = child_environment(settings, PLIMSOLL_LOG_LEVEL="error")
        shared = {**environment, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
        listener = stack.enter_context(listen("127.0.0.1", 0))
        processes: list[subprocess.Popen[bytes]] = []

        def end() -> None:
            for process in processes:
                process.terminate()
            for process in processes:
                try:
                    process.wait(PATIENCE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

        stack.callback(end)
        children = [*http_children(shared, listener, http), *worker_children(environment, workers)]
        processes += [
            subprocess.Popen(child.command, env=child.environment, pass_fds=child.pass_fds)  # noqa: S603 - our own
            for child in children
        ]
        url = address_of(listener)
        httpx.get(f"{url}/livez", timeout=PATIENCE_S).raise_for_status()
        yield url


def figure(url: str, name: str) -> float:
    """Return the sum of a metric over its labels, all HTTP processes together."""
    lines = httpx.get(f"{url}/metrics", timeout=PATIENCE_S).raise_for_status().text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))
