"""Late requests of an open loop, by cause: the generator, too few connections, or a target that was silent."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.analysis.lateness import _longest_silence, lateness
from harness.sample import Mode, Outcome
from harness.sampleset import Clock, Instant, Manifest, Source

MS = 1_000_000
CALM: dict[str, Sequence[float]] = {
    "at_ns": [2_500 * MS, 5_500 * MS],
    "generator_lag_ms": [1.0, 2.0],
    "generator_wait_percent": [5.0, 7.0],
}


def manifest(connections: int, workers: int = 1) -> Manifest:
    now = Instant(0, 0)
    return Manifest(
        measurement_id="m", mode=Mode.OPEN, parameters={"connections": connections, "workers": workers},
        planned_requests=0, attempt=1, commit=None, versions={}, machine={}, quota_revision=None,
        clock=Clock(now, now), files={}, complete=True, source=Source(),
    )  # fmt: skip


class Pool:
    """Requests every 10 ms on a pool of connections, first come first served, on a target of a given pace."""

    def __init__(self, connections: int, requests: int = 500) -> None:
        self.due = np.arange(requests, dtype=np.int64) * 10 * MS
        self.left = self.due.copy()  # when the generator took each up
        self.connections = connections
        self.service_ms = 1.0
        self.silent_ms: tuple[float, float] = (0.0, 0.0)  # nothing is answered between these

    def rows(self) -> pd.DataFrame:
        free = [0] * self.connections
        rows = []
        for due, left in zip(self.due.tolist(), self.left.tolist(), strict=True):
            place = int(np.argmin(free))
            sent = max(left, free[place])
            done = sent + int(self.service_ms * MS)
            begin, end = (int(edge * MS) for edge in self.silent_ms)
            if begin <= done < end:
                done = end + int(self.service_ms * MS)
            free[place] = done
            rows.append((due, sent, done, place))
        table = pd.DataFrame(rows, columns=["intended_at_ns", "sent_at_ns", "done_at_ns", "connection_id"])
        table = table.astype("Int64").assign(worker=0, outcome=Outcome.OK.value)
        return table.assign(error=pd.Series([None] * len(rows), dtype="string")).astype({"worker": "Int64"})


def told(rows: pd.DataFrame, connections: int, resources: Mapping[str, Sequence[float]] | None = None) -> list[str]:
    found = lateness(manifest(connections), rows, pd.DataFrame(resources or CALM))
    return [detail for detail, _ in found]


def test_a_generator_on_time_is_not_found_late() -> None:
    assert told(Pool(10).rows(), 10) == []


def test_a_target_that_is_silent_for_a_second_is_no_fault_of_the_generator() -> None:
    pool = Pool(10)
    pool.silent_ms = (1_000.0, 2_000.0)
    rows = pool.rows()
    assert (rows["sent_at_ns"] - rows["intended_at_ns"]).max() > 800 * MS  # they did wait for a connection
    assert told(rows, 10) == []


def test_too_few_connections_for_a_target_that_answers_are_named() -> None:
    pool = Pool(2)
    pool.service_ms = 30.0  # 100 a second need three
    assert told(pool.rows(), 2) == [
        (
            "484 requests of 500 (96.8 %) waited more than 50 ms for one of 2 connections while others were answered:"
            " give --connections more."
        )
    ]


def test_a_burst_on_too_few_connections_waits_for_them_and_not_for_the_generator() -> None:
    pool = Pool(4)
    pool.service_ms = 30.0
    pool.due = pool.left = np.repeat(np.arange(25, dtype=np.int64) * 200 * MS, 20)
    (detail,) = told(pool.rows(), 4)
    assert detail.startswith("200 requests of 500 (40 %) waited more than 50 ms for one of 4 connections while")


def test_enough_connections_for_a_slow_target_are_enough() -> None:
    pool = Pool(4)
    pool.service_ms = 30.0
    assert told(pool.rows(), 4) == []


def test_a_generator_that_stops_is_late_although_connections_are_free() -> None:
    pool = Pool(10)
    stopped = (pool.due >= 1_000 * MS) & (pool.due < 1_200 * MS)
    pool.left = np.where(stopped, 1_200 * MS, pool.due)
    assert told(pool.rows(), 10) == [
        (
            "16 requests of 500 (3.2 %) left more than 50 ms after they were due: the generator could not keep its"
            " schedule."
        )
    ]


def test_a_generator_that_is_often_a_little_late_is_late() -> None:
    pool = Pool(10)
    pool.left = pool.due + np.where(np.arange(500) % 10 == 0, 12 * MS, 0)  # the very first had a connection made
    assert told(pool.rows(), 10) == [
        (
            "49 requests of 500 (9.8 %) left more than 10 ms after they were due: the generator could not keep its"
            " schedule."
        )
    ]


def test_a_fresh_connection_may_take_its_time_for_it_is_the_target_that_accepts_it() -> None:
    pool = Pool(500)
    pool.left = pool.due + 20 * MS
    rows = pool.rows()
    rows["connection_id"] = pd.array(range(500), dtype="Int64")
    assert told(rows, 500) == []
    assert len(told(rows, 500, CALM | {"generator_lag_ms": [15.0, 15.0]})) == 1  # its sender was late itself
    rows["connection_id"] = pd.array([number % 10 for number in range(500)], dtype="Int64")
    assert len(told(rows, 500)) == 1


def test_requests_that_were_never_sent_for_want_of_descriptors_are_the_generators_fault() -> None:
    rows = Pool(10).rows()
    rows.loc[3, ["sent_at_ns", "connection_id"]] = pd.NA
    rows.loc[3, ["outcome", "error"]] = ["not_sent", "generator: cannot open a connection: Too many open files"]
    assert told(rows, 10) == [
        "1 request could not be sent for want of the generator's own: cannot open a connection: Too many open files."
    ]


@pytest.mark.parametrize(
    ("resources", "detail"),
    [
        (
            {"at_ns": [0, 1], "generator_lag_ms": [1.0, 151.0], "generator_wait_percent": [5.0, 5.0]},
            "In 1 second the generator's own loop woke more than 150 ms late.",
        ),
        (
            {"at_ns": [0, 1], "generator_lag_ms": [1.0, 9.0], "generator_wait_percent": [90.0, 70.0]},
            "The generator was ready and had no core for 80 % of the time.",
        ),
    ],
)
def test_what_the_generator_suffered_is_a_reason_by_itself(
    resources: Mapping[str, Sequence[float]], detail: str
) -> None:
    assert told(Pool(10).rows(), 10, resources) == [detail]


@given(
    answered=st.lists(st.integers(0, 200), max_size=30).map(sorted),
    spans=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 60)), min_size=1, max_size=10),
)
def test_the_longest_silence_is_what_looking_at_every_pair_of_answers_gives(
    answered: list[int], spans: list[tuple[int, int]]
) -> None:
    begin = np.array([at for at, _ in spans], dtype=np.int64)
    end = begin + np.array([width for _, width in spans], dtype=np.int64)

    def plainly(since: int, until: int) -> int:
        edges = [since, *(at for at in answered if since < at <= until), until]
        return max(later - earlier for earlier, later in itertools.pairwise(edges))

    found = _longest_silence(begin, end, np.array(answered, dtype=np.int64), np.ones(len(begin), dtype=bool))
    assert found.tolist() == [plainly(since, until) for since, until in zip(begin.tolist(), end.tolist(), strict=True)]
