"""Plans are pure: every property holds for any rate, duration and seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.arrivals import (
    Arrivals,
    ClosedLoop,
    EmptyArrivals,
    Schedule,
    burst,
    bursts,
    closed_loop,
    constant,
    poisson,
)
from harness.sample import Mode

RATES = st.floats(min_value=0.1, max_value=2_000)
DURATIONS = st.floats(min_value=0.1, max_value=20)
RUNS = st.integers(min_value=1, max_value=1_000)
SIZES = st.integers(min_value=1, max_value=100)


@pytest.mark.parametrize(
    ("mode", "runs", "burst_size", "plan"),
    [
        (Mode.SMOKE, 5, 10, ClosedLoop((5,), 5, 0.0)),  # fewer runs than may be live: all at once
        (Mode.SMOKE, 25, 10, ClosedLoop((25,), 10, 0.0)),  # at most ten live, no group waits for another
        (Mode.BURST, 25, 10, ClosedLoop((10, 10, 5), 10, 0.0)),  # the last burst is what is left
        (Mode.BURST, 4, 10, ClosedLoop((4,), 4, 0.0)),  # never more side by side than there are runs
        (Mode.SOAK, 3, 10, ClosedLoop((1, 1, 1), 1, 2.5)),  # one after another, whatever the burst size
    ],
)
def test_a_closed_loop_starts_groups_as_its_mode_says(mode: Mode, runs: int, burst_size: int, plan: ClosedLoop) -> None:
    assert closed_loop(mode, runs, burst_size, 2.5) == plan


@given(mode=st.sampled_from([Mode.SMOKE, Mode.BURST, Mode.SOAK]), runs=RUNS, size=SIZES)
def test_a_closed_loop_starts_every_run_exactly_once(mode: Mode, runs: int, size: int) -> None:
    plan = closed_loop(mode, runs, size, 0.0)
    assert plan.runs == runs
    assert 1 <= plan.side_by_side <= size


def test_an_open_mode_has_no_closed_loop_plan() -> None:
    with pytest.raises(ValueError, match="open is not a closed loop"):
        closed_loop(Mode.OPEN, 1, 1, 0.0)


@given(rate=RATES, duration=DURATIONS)
def test_constant_arrivals_lie_on_the_ideal_grid_without_drift(rate: float, duration: float) -> None:
    if rate * duration < 1:
        with pytest.raises(EmptyArrivals):
            constant(rate, duration)
        return
    times = constant(rate, duration)
    assert abs(len(times) - rate * duration) <= 1
    assert np.array_equal(times, np.arange(len(times)) / rate)
    assert times[-1] < duration


@given(rate=RATES, duration=DURATIONS, seed=st.integers(min_value=0, max_value=2**32))
def test_poisson_arrivals_are_ordered_inside_the_interval_and_repeatable(
    rate: float, duration: float, seed: int
) -> None:
    if rate * duration < 1:
        with pytest.raises(EmptyArrivals):
            poisson(rate, duration, seed)
        return
    times = poisson(rate, duration, seed)
    assert np.all(np.diff(times) >= 0)
    assert np.all((times >= 0) & (times < duration))
    assert np.array_equal(times, poisson(rate, duration, seed))


def test_poisson_gaps_have_the_mean_and_the_spread_of_an_exponential() -> None:
    gaps = np.diff(poisson(1_000.0, 100.0, seed=7))
    # 100,000 gaps: the standard error of the mean is 0.3 %, so 2 % is more than six of them.
    assert gaps.mean() == pytest.approx(1e-3, rel=0.02)
    assert gaps.std() == pytest.approx(1e-3, rel=0.02)


@given(size=SIZES, at=st.floats(min_value=0, max_value=100))
def test_a_burst_is_due_at_one_instant(size: int, at: float) -> None:
    assert burst(size, at).tolist() == [at] * size


def test_less_than_one_arrival_is_refused_with_its_numbers() -> None:
    with pytest.raises(EmptyArrivals) as refused:
        constant(0.1, 5.0)
    assert (refused.value.rate_per_s, refused.value.duration_s) == (0.1, 5.0)
    assert str(refused.value) == "0.1 arrivals per second for 5 s is less than one arrival"


@given(rate=RATES, duration=DURATIONS, size=SIZES)
def test_bursts_keep_the_mean_rate_and_each_is_due_at_one_instant(rate: float, duration: float, size: int) -> None:
    if rate * duration < 1:
        with pytest.raises(EmptyArrivals):
            bursts(rate, duration, size)
        return
    times = bursts(rate, duration, size)
    assert len(times) == len(constant(rate, duration))
    assert (times < duration).all()
    sizes = np.unique(times, return_counts=True)[1]
    assert (sizes[:-1] == size).all()
    assert 1 <= sizes[-1] <= size


@given(kind=st.sampled_from(Arrivals), rate=RATES, seed=st.integers(0, 9), workers=st.integers(1, 5))
def test_the_parts_of_several_workers_are_together_the_very_schedule_of_one(
    kind: Arrivals, rate: float, seed: int, workers: int
) -> None:
    schedule = Schedule(kind, rate, 20.0, seed, burst_size=3)
    try:
        whole = schedule.offsets_ns()
    except EmptyArrivals:
        return
    merged = np.sort(np.concatenate([schedule.offsets_ns()[worker::workers] for worker in range(workers)]))
    assert merged.tolist() == whole.tolist()
    assert (np.diff(whole) >= 0).all()
    assert whole[0] >= 0


def test_a_poisson_schedule_that_happens_to_be_empty_is_refused() -> None:
    empty = [seed for seed in range(50) if not len(poisson(1.0, 1.0, seed))]
    assert empty
    with pytest.raises(EmptyArrivals):
        Schedule(Arrivals.POISSON, 1.0, 1.0, empty[0]).offsets_ns()
