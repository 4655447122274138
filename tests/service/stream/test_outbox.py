"""The outbox: in order, bounded in frames and in size."""

from __future__ import annotations

import asyncio

from service.stream.outbox import BATCH, Outbox


async def test_frames_leave_in_the_order_in_which_they_came() -> None:
    outbox = Outbox()
    frames = [str(n) for n in range(2 * BATCH + 1)]
    for frame in frames:
        await outbox.put(frame)
    assert [await outbox.take() for _ in range(3)] == [frames[:BATCH], frames[BATCH : 2 * BATCH], frames[2 * BATCH :]]


async def test_it_is_full_at_either_bound_and_has_room_again_when_frames_leave() -> None:
    for outbox in (Outbox(most_frames=2, most_bytes=100), Outbox(most_frames=100, most_bytes=6)):
        full = []
        for _ in range(2):
            full.append(outbox.full)
            outbox.add("abc")
        assert (full, outbox.full) == ([False, False], True)
        assert await outbox.take() == ["abc", "abc"]
        assert not outbox.full


async def test_it_is_drained_when_half_of_it_is_free() -> None:
    for outbox in (Outbox(most_frames=2 * BATCH), Outbox(most_bytes=2 * BATCH)):
        for _ in range(BATCH + 1):
            outbox.add("a")
        draining = asyncio.create_task(outbox.drained())
        await asyncio.sleep(0)
        assert not draining.done()
        await outbox.take()
        await draining


async def test_who_may_wait_waits_for_room_and_who_takes_waits_for_frames() -> None:
    outbox = Outbox(most_frames=1)
    taking = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    putting = [asyncio.create_task(outbox.put(frame)) for frame in ("a", "b", "c")]
    assert await taking == ["a"]
    assert [await outbox.take(), await outbox.take()] == [["b"], ["c"]]
    await asyncio.gather(*putting)
