"""A run's tail, whatever is lost, repeated, reordered or late: each event is pushed once, in order."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import uuid
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.stream.frames import Happened, instant
from service.stream.history import History
from service.stream.outbox import Outbox
from service.stream.tails import Overflow, RunTail

NOW = dt.datetime(2026, 1, 2, 3, 4, 5, 120_000, tzinfo=dt.UTC)
WORKSPACE_ID, RUN_ID = uuid.UUID(int=1), uuid.UUID(int=2)


def happened(seq: int) -> Happened:
    """Return the run's event of that number."""
    return Happened(WORKSPACE_ID, RUN_ID, seq, "step_created", {"n": seq}, NOW)


class Committed:
    """What the database holds: grows with every commit, and answers a read a turn later, as it stood then."""

    def __init__(self) -> None:
        self.last_seq = 0

    async def events(self, run_id: uuid.UUID, since_seq: int) -> list[Happened]:
        await asyncio.sleep(0)
        found = [happened(seq) for seq in range(since_seq + 1, self.last_seq + 1)]
        await asyncio.sleep(0)
        return found


async def pushed_by(steps: list[tuple[str, int]]) -> tuple[list[int], int]:
    """Let things happen to a tail one after the other; returns the numbers pushed, and the last number committed."""
    database, outbox, too_slow = Committed(), Outbox(), asyncio.Event()
    overflow = Overflow(10.0, too_slow.set)
    tail = RunTail(WORKSPACE_ID, RUN_ID, 0, outbox, cast("History", database), overflow)
    pumping = asyncio.create_task(tail.pump())
    for step, number in steps:
        match step:
            case "commit":  # so many events, whose messages are lost
                database.last_seq += number
            case "publish":  # a message arrives, in time or late, once or again
                if number <= database.last_seq:
                    tail.hear(happened(number))
            case "commit and publish":
                database.last_seq += 1
                tail.hear(happened(database.last_seq))
            case "subscribe anew":
                tail.doubt()
            case "turn":
                for _ in range(number):
                    await asyncio.sleep(0)
    tail.stands_at(RUN_ID, database.last_seq)  # the look that comes every second
    for _ in range(20):
        await asyncio.sleep(0)
    pumping.cancel()
    seen: list[int] = []
    while len(seen) < tail.seq:
        seen += [json.loads(frame)["seq"] for frame in await outbox.take()]
    assert not too_slow.is_set()
    return seen, database.last_seq


STEPS = st.one_of(
    st.tuples(st.just("commit"), st.integers(1, 3)),
    st.tuples(st.just("publish"), st.integers(1, 40)),
    st.tuples(st.just("commit and publish"), st.just(0)),
    st.tuples(st.just("subscribe anew"), st.just(0)),
    st.tuples(st.just("turn"), st.integers(1, 4)),
)


@given(steps=st.lists(STEPS, max_size=60))
@settings(max_examples=400, deadline=None)
def test_whatever_is_lost_repeated_or_late_each_event_is_pushed_once_and_in_order(steps: list[tuple[str, int]]) -> None:
    seen, last_seq = asyncio.run(pushed_by(steps))
    assert seen == list(range(1, last_seq + 1))


async def test_a_client_whose_outbox_is_full_is_behind_until_it_has_caught_up_or_has_had_its_time() -> None:
    database, outbox, too_slow = Committed(), Outbox(most_frames=2), asyncio.Event()
    overflow = Overflow(0.0, too_slow.set)
    tail = RunTail(WORKSPACE_ID, RUN_ID, 0, outbox, cast("History", database), overflow)
    database.last_seq = 3
    pumping = asyncio.create_task(tail.pump())
    for _ in range(5):
        await asyncio.sleep(0)
    assert (tail.seq, too_slow.is_set()) == (2, False)
    await outbox.take()
    for _ in range(5):
        await asyncio.sleep(0)
    assert (tail.seq, too_slow.is_set()) == (3, False)
    for database.last_seq in (4, 5):
        tail.hear(happened(database.last_seq))
    assert tail.seq == 4
    await outbox.take()
    for _ in range(5):
        await asyncio.sleep(0)
    tail.stands_at(RUN_ID, 5)
    assert (tail.seq, too_slow.is_set()) == (5, False), "it has caught up"
    for database.last_seq in (6, 7):
        tail.hear(happened(database.last_seq))
    tail.stands_at(RUN_ID, 7)
    assert (tail.seq, too_slow.is_set()) == (6, True)
    pumping.cancel()


@pytest.mark.parametrize(
    ("at", "written"),
    [
        (NOW, "2026-01-02T03:04:05.12+00:00"),
        (NOW.replace(microsecond=0), "2026-01-02T03:04:05+00:00"),
        (NOW.replace(microsecond=1), "2026-01-02T03:04:05.000001+00:00"),
        (NOW.astimezone(dt.timezone(dt.timedelta(hours=2))), "2026-01-02T03:04:05.12+00:00"),
    ],
)
def test_instants_are_written_as_postgresql_writes_them(at: dt.datetime, written: str) -> None:
    assert instant(at) == written
