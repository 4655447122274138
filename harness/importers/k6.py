"""k6: requests put together from metric points, as both of its outputs write them (k6 0.49 to 2.x).

k6 writes no row per request but some ten points, those of one request in one piece: `http_reqs`, `http_req_duration`,
then its parts, then `http_req_failed`, all stamped with the *end* of the request. The duration runs from the first byte
written to the last byte read; waiting for a connection is not in it. `k6_csv` and `k6_json` read the points.

A **check** is tied to no request. Where the points carry the VU, a failed check belongs to the last request of that VU;
otherwise to the last request of its scenario and group on which the same check has not spoken yet, which is exact for
one VU and right in number, though not always in place, for many.

A **dropped iteration** is an arrival for which no VU was free. It has no request; it becomes a `not_sent` row of the
endpoint with which its scenario begins.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping

from harness.importers.fields import DURATION_NS_MAX
from harness.importers.importer import source_of
from harness.importers.rows import Target, not_sent_row, one_line, outcome_of, request_row, target_of
from harness.importers.source import Unusable
from harness.sample import Endpoint, Outcome, Sample
from harness.sampleset import Source

REQUEST_COUNT = "http_reqs"
DURATION = "http_req_duration"  # ms
RECEIVING = "http_req_receiving"  # ms
FAILED = "http_req_failed"  # 1 when k6's own responseCallback did not expect the answer
CHECKS = "checks"  # 0 when it failed
DROPPED = "dropped_iterations"
METRICS = frozenset({REQUEST_COUNT, DURATION, RECEIVING, FAILED, CHECKS, DROPPED})
"""The metrics that are read; the others say nothing about a request of their own."""

DROPPED_MAX = 10_000_000  # in one point; more is a damaged number
OPEN_KEYS_MAX = 10_000  # VUs, or scenarios with groups, whose last requests may still meet a check
OPEN_REQUESTS = 32  # that wait for their checks where the VU is not known

NOTES = (
    "k6 stamps the end of a request; the time spent waiting for a connection is not in its duration.",
    "A dropped iteration is one not_sent row, however many requests it would have made.",
    "Its endpoint is the one with which its scenario begins, and it is due at the moment at which k6 dropped it.",
)

_CODES = {  # k6's error_code, where it says more than the text
    "1050": Outcome.TIMEOUT,
    "1211": Outcome.TIMEOUT,
    "1212": Outcome.REFUSED,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """One value of one metric."""

    metric: str
    at_ns: int  # since 1970
    exact: bool  # the stamp says more than the second
    value: float  # milliseconds, a count, or 0 and 1
    tags: Mapping[str, str]
    vu: str | None  # where the `vu` tag was asked for


@dataclasses.dataclass(slots=True)
class _Open:
    """A request that later points may still complete."""

    point: Point
    receiving_ms: float | None = None
    failed: bool | None = None
    checked: dict[str, bool] = dataclasses.field(default_factory=dict)  # by the check's name


class Assembly:
    """Puts points together."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[str, ...], deque[_Open]] = OrderedDict()
        self._last: _Open | None = None  # the parts that follow it are its own
        self._counted = 0.0
        self._requests = 0
        self._ordinal = 0
        self._begins_with: dict[str, Endpoint] = {}  # each scenario's first endpoint
        self._dropped: dict[str, dict[int, int]] = {}  # before it is known: scenario, instant, how many
        self._checks_tied_by_vu = True
        self._failed_checks = 0
        self._loose_checks = 0
        self._coarse = False

    def take(self, point: Point) -> Iterator[Sample]:
        """Take the next point of the file; yield what it completes. Raises Unusable."""
        if point.metric == REQUEST_COUNT:
            self._counted += point.value
            self._last = None
        elif point.metric == DURATION:
            yield from self._begin(point)
        elif point.metric == RECEIVING and self._is_of_last(point):
            self._last.receiving_ms = point.value  # type: ignore[union-attr]
        elif point.metric == FAILED and self._is_of_last(point):
            self._last.failed = point.value != 0  # type: ignore[union-attr]
        elif point.metric == CHECKS:
            self._check(point)
        elif point.metric == DROPPED:
            yield from self._drop(point)

    def finish(self) -> Iterator[Sample]:
        """Yield what is still open at the end of the file. Raises Unusable when requests are missing from it."""
        while self._open:
            _, waiting = self._open.popitem(last=False)
            for one in waiting:
                yield self._row(one)
        for scenario, instants in self._dropped.items():
            yield from self._not_sent(scenario, Endpoint.OTHER, instants)
        if self._counted > self._requests:
            missing = int(self._counted) - self._requests
            raise Unusable(
                f"of {int(self._counted):,} counted requests ({REQUEST_COUNT}), {missing:,} are without their "
                f"{DURATION}: the file is cut off or was filtered"
            )

    def source(self) -> Source:
        """Return what k6 cannot know."""
        notes = list(NOTES)
        if self._failed_checks:
            tied = "VU" if self._checks_tied_by_vu else "scenario and group, for the points carry no VU"
            notes.append(
                f"Failed checks, put on the last request before them of the same {tied}: {self._failed_checks:,}."
            )
        if self._loose_checks:
            notes.append(f"Failed checks that follow no request and are on none: {self._loose_checks:,}.")
        if self._coarse:
            notes.append(
                "The stamps have whole seconds, so sent_at_ns is unknown; K6_CSV_TIME_FORMAT=unix_nano would tell it."
            )
        unknown = ["response_bytes", *(["sent_at_ns", "first_byte_at_ns"] if self._coarse else [])]
        return source_of("k6", unknown, notes)

    def _key(self, point: Point) -> tuple[str, ...]:
        return (point.vu,) if point.vu else (point.tags.get("scenario", ""), point.tags.get("group", ""))

    def _begin(self, point: Point) -> Iterator[Sample]:
        self._requests += 1
        self._last = _Open(point)
        key = self._key(point)
        waiting = self._open.setdefault(key, deque())
        self._open.move_to_end(key)
        waiting.append(self._last)
        if len(waiting) > (1 if point.vu else OPEN_REQUESTS):
            yield self._row(waiting.popleft())
        if len(self._open) > OPEN_KEYS_MAX:
            for one in self._open.popitem(last=False)[1]:
                yield self._row(one)
        scenario = point.tags.get("scenario", "")
        if scenario not in self._begins_with:
            self._begins_with[scenario] = _target(point).endpoint
            yield from self._not_sent(scenario, self._begins_with[scenario], self._dropped.pop(scenario, {}))

    def _is_of_last(self, point: Point) -> bool:
        last = self._last
        return (
            last is not None and last.point.at_ns == point.at_ns and last.point.tags.get("url") == point.tags.get("url")
        )

    def _check(self, point: Point) -> None:
        name, passed = point.tags.get("check", "check"), point.value != 0
        waiting = self._open.get(self._key(point), deque())
        if not waiting and not point.vu:  # a check outside of the group of its request
            scenario = point.tags.get("scenario", "")
            waiting = next((those for key, those in reversed(self._open.items()) if key[0] == scenario), deque())
        for one in reversed(waiting):
            if name not in one.checked or point.vu:
                one.checked[name] = passed and one.checked.get(name, True)
                break
        else:
            self._loose_checks += not passed
            return
        self._failed_checks += not passed
        self._checks_tied_by_vu &= point.vu is not None

    def _drop(self, point: Point) -> Iterator[Sample]:
        if not 0 <= point.value <= DROPPED_MAX or point.value != int(point.value):
            raise Unusable(f"{point.value:g} is no number of {DROPPED}", "metric_value")
        scenario, count = point.tags.get("scenario", ""), int(point.value)
        known = self._begins_with.get(scenario)
        if known is None:
            instants = self._dropped.setdefault(scenario, {})
            instants[point.at_ns] = instants.get(point.at_ns, 0) + count
            return
        yield from self._not_sent(scenario, known, {point.at_ns: count})

    def _not_sent(self, scenario: str, endpoint: Endpoint, instants: Mapping[int, int]) -> Iterator[Sample]:
        for at_ns, count in instants.items():
            for _ in range(count):
                self._ordinal += 1
                yield not_sent_row(self._ordinal, endpoint, scenario, at_ns, "dropped iteration: no VU was free")

    def _row(self, one: _Open) -> Sample:
        point, tags = one.point, one.point.tags
        self._ordinal += 1
        service_ns = _ms_to_ns(point.value, DURATION)
        status = _status(tags.get("status", ""))
        rejected = [name for name, passed in one.checked.items() if not passed]
        expected = tags.get("expected_response", "true") != "false" and not one.failed
        fault = tags.get("error", "")
        code = _CODES.get(tags.get("error_code", ""))
        outcome = outcome_of(status, fault, accepted=expected and not rejected and (status is not None or not fault))
        if status is None and code is not None:
            outcome = code
        elif status is None and rejected and expected and not fault:
            outcome = Outcome.HTTP_ERROR
        error = fault or (f"check failed: {', '.join(rejected)}" if rejected else "")
        if not error and outcome is Outcome.HTTP_ERROR:
            error = (
                f"status {status}" if status is not None and not 200 <= status <= 299 else "not the expected response"
            )
        self._coarse |= not point.exact
        receiving_ns = None if one.receiving_ms is None else _ms_to_ns(one.receiving_ms, RECEIVING)
        answered = point.exact and status is not None and receiving_ns is not None and receiving_ns <= service_ns
        return request_row(
            ordinal=self._ordinal, target=_target(point), scenario=tags.get("scenario"), service_ns=service_ns,
            outcome=outcome, status=status, error=one_line(error),
            sent_at_ns=point.at_ns - service_ns if point.exact else None,
            first_byte_at_ns=point.at_ns - receiving_ns if answered and receiving_ns is not None else None,
            done_at_ns=point.at_ns,
        )  # fmt: skip


def _target(point: Point) -> Target:
    return target_of(point.tags.get("method"), point.tags.get("url"), point.tags.get("name"))


def _status(text: str) -> int | None:
    """Return the status of an answer; k6 writes 0 when there was none."""
    if not text or text == "0":
        return None
    if not text.isascii() or not text.isdigit() or not 100 <= int(text) <= 999:
        raise Unusable(f"{text[:40]!r} is no HTTP status", "status")
    return int(text)


def _ms_to_ns(value: float, metric: str) -> int:
    if not 0 <= value * 1e6 <= DURATION_NS_MAX:
        raise Unusable(f"{value:g} is no duration in milliseconds ({metric})", "metric_value")
    return round(value * 1e6)
