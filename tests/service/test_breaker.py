"""The breaker in each of its states, by a clock that the test sets."""

from __future__ import annotations

from service.breaker import Breaker, State


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def opened() -> tuple[Breaker, Clock]:
    """Return a breaker that has just opened."""
    clock = Clock()
    breaker = Breaker(clock, first_pause_s=1.0, longest_pause_s=3.0)
    breaker.fail()
    return breaker, clock


def test_a_new_breaker_lets_everything_through() -> None:
    breaker = Breaker(Clock())
    assert (breaker.admits, breaker.take_probe()) == (True, False)


def test_the_first_failure_opens_it_and_the_next_ones_say_nothing_new() -> None:
    breaker = Breaker(Clock())
    assert [breaker.fail(), breaker.fail(), breaker.admits] == [True, False, False]


def test_failures_of_calls_that_began_before_do_not_put_the_probe_off() -> None:
    breaker, clock = opened()
    clock.now_s += 0.9
    breaker.fail()
    clock.now_s += 0.1
    assert breaker.take_probe()


def test_after_the_pause_one_asker_probes_and_all_others_still_go_without() -> None:
    breaker, clock = opened()
    assert not breaker.take_probe()
    clock.now_s += 1.0
    assert [breaker.take_probe(), breaker.take_probe(), breaker.admits] == [True, False, False]


def test_an_answered_probe_closes_it_and_the_next_outage_begins_with_the_first_pause() -> None:
    breaker, clock = opened()
    for _ in range(3):
        clock.now_s += 3.0
        breaker.take_probe()
        breaker.fail()
    clock.now_s += 3.0
    breaker.take_probe()
    breaker.answer()
    assert breaker.admits
    breaker.fail()
    clock.now_s += 1.0
    assert breaker.take_probe()


def test_each_probe_that_fails_doubles_the_pause_up_to_the_longest() -> None:
    breaker, clock = opened()
    pauses_s = []
    for _ in range(4):
        started_s = clock.now_s
        while not breaker.take_probe():
            clock.now_s += 0.5
        pauses_s.append(clock.now_s - started_s)
        assert not breaker.fail(), "it was open all along"
        assert breaker.state is State.OPEN
    assert pauses_s == [1.0, 2.0, 3.0, 3.0]
