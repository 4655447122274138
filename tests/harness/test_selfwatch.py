"""What a sending process knows of itself."""

import asyncio
import gc
import time

from harness.selfwatch import SelfWatch, Strain, together


async def test_a_loop_that_is_held_up_is_seen_to_wake_late_and_only_once() -> None:
    watch = SelfWatch()
    watching = asyncio.create_task(watch.watch())
    await asyncio.sleep(0)
    assert watch.take().lag_ms is None  # it has not beaten yet
    time.sleep(0.03)  # noqa: ASYNC251 - holding the loop up is the point
    beaten = asyncio.Event()
    asyncio.get_running_loop().call_later(0.02, beaten.set)
    await beaten.wait()
    late = watch.take()
    assert late.lag_ms is not None
    assert late.lag_ms >= 15.0  # it was due within 10 ms of the 30
    watch.note_lag(0.5)
    assert (watch.take().lag_ms or 0.0) >= 500.0
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_a_pause_for_garbage_is_timed_while_it_is_watched_and_not_after() -> None:
    watch = SelfWatch()
    watching = asyncio.create_task(watch.watch())
    await asyncio.sleep(0)
    watch.take()
    gc.collect()
    paused = watch.take()
    assert paused.gc_ms is not None
    assert paused.gc_ms > 0.0
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    gc.collect()
    assert watch.take().gc_ms is None


def test_of_several_processes_the_worst_is_told_and_their_processor_time_together() -> None:
    late, starved = Strain(9.0, None, 1.0, 2.0), Strain(None, 3.0, 40.0, 4.0)
    assert together([late, starved], 10.0) == Strain(lag_ms=9.0, gc_ms=3.0, wait_percent=40.0, cpu_s=16.0)
    assert together([], 1.0) == Strain(lag_ms=None, gc_ms=None, wait_percent=None, cpu_s=1.0)
