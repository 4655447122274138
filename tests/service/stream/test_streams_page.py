"""docs/streams.md says what the code does: codes, commands, topics, numbers, metrics."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import Counter, Gauge

from service import telemetry
from service.quota.limits import DEFAULT
from service.quota.socket_leases import LEASE_S, RENEW_EVERY_S
from service.stream.admission import Code
from service.stream.commands import COMMANDS, LOCAL
from service.stream.frames import APPROVALS, Topic
from service.stream.history import PAGE
from service.stream.outbox import MOST_BYTES, MOST_FRAMES
from service.stream.protocol import MAX_FRAME_BYTES, PARTING_S, PING_PATIENCE_S
from service.stream.timing import USUAL
from service.tickets import TICKET_S

TEXT = (Path(__file__).parents[3] / "docs/streams.md").read_text(encoding="utf-8")
WORDS = " ".join(TEXT.split())


def first_column(heading: str) -> list[str]:
    """Return the first cells of the first table under a heading."""
    section = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [line.split("|")[1].strip().strip("`") for line in section.splitlines() if line.startswith("|")][2:]


def test_every_close_code_is_described() -> None:
    assert [int(code) for code in first_column("Close codes")] == sorted([*Code, 1009])


def test_every_topic_and_every_command_is_described() -> None:
    assert first_column("Frames") == list(Topic)
    assert sorted(first_column("Commands")) == sorted([*LOCAL, *COMMANDS])
    for command in COMMANDS.values():
        assert f"`{command.method} {command.path}`" in TEXT
    assert all(f"`{event_type}`" in TEXT for event_type in APPROVALS)


def test_the_numbers_are_those_of_the_code() -> None:
    for sentence in (
        f'"expires_in_s": {TICKET_S}',
        f"at each command and every {USUAL.recheck_s:g} s",
        f"a frame above {MAX_FRAME_BYTES >> 10} KiB",
        f"no answer to a ping within {PING_PATIENCE_S:g} s",
        f"{DEFAULT.websockets} sockets in a workspace, {DEFAULT.websockets_per_user} with one token",
        f"in pages of {PAGE}",
        f"the outbox ({MOST_FRAMES:,} frames, {MOST_BYTES >> 20} MiB)",
        f"does not take a batch of frames within {USUAL.send_patience_s:g} s",
        f"has not caught up {USUAL.lag_patience_s:g} s after its outbox overflowed",
        f"is cut after {PARTING_S:g} s",
        f"Places last {LEASE_S:g} s and are renewed every {RENEW_EVERY_S:g} s",
        f"are free {LEASE_S:g} s later",
    ):
        assert sentence in WORDS, sentence


def test_every_metric_that_is_named_exists() -> None:
    metrics = [value for value in vars(telemetry).values() if isinstance(value, Counter | Gauge)]
    known = {each.name for metric in metrics for each in metric.describe()}
    named = {name.removesuffix("_total") for name in re.findall(r"`(plimsoll_\w+)`", TEXT)}
    assert named <= known
