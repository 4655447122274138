"""Did the generator keep its schedule? And if requests left late, was it the generator's doing or the target's?

In a closed loop lateness only lengthens latencies. In an open loop it changes the load, so it is judged strictly there,
and by cause: a request may leave late because the generator was stopped, starved or too slow; because all connections
were taken although answers came (too few of them); or because the target was silent, which is what is being measured
and no fault of the measuring. Called by `validity`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from harness.analysis.slo import number, percent, plural
from harness.client import OWN_FAULT
from harness.sample import Mode, Outcome
from harness.sampleset import Manifest

CLOSED_LOOP = frozenset({Mode.SMOKE, Mode.BURST, Mode.SOAK})
"""Modes in which the next request waits for the last, and every create has a record of its run."""

LATE_MS = {True: 250.0, False: 50.0}
LATE_SHARE = {True: 0.05, False: 0.01}
"""A generator is late when more than this share of requests left more than so long after they were due (closed loop:
True). Open loop is strict, for lateness changes the load. In a closed loop it only lengthens latencies, which count
from the intended moment; there it is judged when the numbers would speak of the generator more than of the service."""

OFTEN_LATE_MS = 10.0
OFTEN_LATE_SHARE = 0.05
"""An open loop is late, too, when more than this share left a little late: that many decide the p95, and so long is a
twentieth of the tightest latency target, the margin of a regression."""

STALL_MS = 150.0
"""In open loop, a second in which the generator's own loop woke so late lost its schedule. Not asked of burst-limits:
its only schedule is the instant of each burst, whose lateness every row shows, and sending it is itself a stall."""

LOOK_NS = 1_500_000_000
"""What a sender suffered is told so much later at the latest: a look a second, on reports four times a second."""

PROMPT_NS = 1_000_000
"""So soon after it was due a request that need not wait has left a generator that is on time."""

STARVED_PERCENT = 60.0
"""An open loop whose sending thread, on the mean of all seconds, was ready and without a core for so much of the time
was starved: more often than not it could not have been on time. On a machine that it shares with the service, fully
busy, half of that was seen."""

Sentences = Iterator[tuple[str, int]]
Instants = npt.NDArray[np.int64]


def lateness(manifest: Manifest, samples: pd.DataFrame, resources: pd.DataFrame) -> Sentences:
    """Return each reason to say that the generator was late, in a sentence, with the number of rows that show it.

    Not asked of a capacity search: there each level answers for itself (`capacity.judge_rate`), because rates that the
    generator cannot keep are found out by trying them.
    """
    if manifest.mode == Mode.CAPACITY:
        return
    if manifest.mode == Mode.OPEN:
        yield from _open_loop(manifest, samples, resources)
    else:
        yield from _plainly_late(manifest, samples)
    if manifest.mode in CLOSED_LOOP or manifest.mode in {Mode.IMPORT, Mode.BURST_LIMITS}:
        return
    stalls = int((resources["generator_lag_ms"] > STALL_MS).fillna(value=False).sum())
    if stalls:
        detail = f"In {plural(stalls, 'seconds')} the generator's own loop woke more than {number(STALL_MS)} ms late."
        yield detail, stalls
    waited = resources["generator_wait_percent"].dropna() if "generator_wait_percent" in resources else pd.Series([])
    if len(waited) and float(waited.mean()) > STARVED_PERCENT:
        yield f"The generator was ready and had no core for {number(float(waited.mean()))} % of the time.", 0


def _plainly_late(manifest: Manifest, samples: pd.DataFrame) -> Sentences:
    """Judge by sent - intended alone."""
    closed = manifest.mode in CLOSED_LOOP
    lag_ms = ((samples["sent_at_ns"] - samples["intended_at_ns"]) / 1e6).dropna()
    late = int((lag_ms > LATE_MS[closed]).sum())
    if late > LATE_SHARE[closed] * len(lag_ms):
        yield _late_sentence(late, len(lag_ms), LATE_MS[closed]), late


def _late_sentence(late: int, requests: int, limit_ms: float) -> str:
    return (
        f"{plural(late, 'requests')} of {requests:,} ({percent(late / requests)}) left more than "
        f"{number(limit_ms)} ms after they were due: the generator could not keep its schedule."
    )


def _open_loop(manifest: Manifest, samples: pd.DataFrame, resources: pd.DataFrame) -> Sentences:
    """Judge each late request by what it waited for."""
    error = samples["error"].fillna("").astype(str)
    own = int(((samples["outcome"] == Outcome.NOT_SENT.value) & error.str.startswith(OWN_FAULT)).sum())
    if own:
        first = str(error[error.str.startswith(OWN_FAULT)].iloc[0]).removeprefix(OWN_FAULT)
        yield f"{plural(own, 'requests')} could not be sent for want of the generator's own: {first}.", own
    due = samples[samples["intended_at_ns"].notna() & samples["done_at_ns"].notna() & ~error.str.startswith(OWN_FAULT)]
    # A request that never found a connection waited until patience ended.
    unsent = due["sent_at_ns"].isna() & (due["outcome"] == Outcome.NOT_SENT.value)
    due = due.assign(sent_at_ns=due["sent_at_ns"].mask(unsent, due["done_at_ns"]))
    due = due.loc[due["sent_at_ns"].notna()]
    if not len(due):
        return
    late_ms, for_connection = _own_lateness(due, resources, manifest)
    limits = ((LATE_MS[False], LATE_SHARE[False]), (OFTEN_LATE_MS, OFTEN_LATE_SHARE))
    for limit_ms, share in limits:
        late = (late_ms > limit_ms) & ~for_connection
        if int(late.sum()) > share * len(due):
            yield _late_sentence(int(late.sum()), len(due), limit_ms), int(late.sum())
            break
    for limit_ms, share in limits:
        waited = int(((late_ms > limit_ms) & for_connection).sum())
        if waited > share * len(due):
            connections = manifest.parameters.get("connections")
            detail = (
                f"{plural(waited, 'requests')} of {len(due):,} ({percent(waited / len(due))}) waited more than "
                f"{number(limit_ms)} ms for one of {connections} connections while others were answered: give "
                "--connections more."
            )
            yield detail, waited
            break


def _own_lateness(
    due: pd.DataFrame, resources: pd.DataFrame, manifest: Manifest
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return how late each request left, in ms, without what the target's silence explains; and if it was for a place.

    Shapes (n_requests,). A request for which a new connection was made waited for the target's kernel as well: it was
    late by no more than its sender itself was at that time.
    """
    late_ms = np.zeros(len(due))
    for_connection = np.zeros(len(due), dtype=bool)
    workers, connections = _whole(manifest, "workers"), _whole(manifest, "connections")
    numbers = due["worker"].to_numpy(dtype=np.int64, na_value=0)
    for worker in np.unique(numbers):
        place = np.flatnonzero(numbers == worker)
        rows = due.iloc[place]
        intended, sent, done = (
            rows[name].to_numpy(dtype=np.int64) for name in ("intended_at_ns", "sent_at_ns", "done_at_ns")
        )
        lag_ns = sent - intended
        on_wire = rows["connection_id"].notna().to_numpy()
        busy = _under_way(intended, sent[on_wire], done[on_wire]) + _place_in_burst(intended, sent)
        full = busy >= connections // workers + (worker < connections % workers) if connections else busy < 0
        # An answer is what frees a connection; a request that was given up tells nothing of the target.
        answered = np.sort(done[on_wire & (rows["outcome"] != Outcome.TIMEOUT.value).to_numpy(dtype=bool)])
        waiting = full & (lag_ns > OFTEN_LATE_MS * 1e6)
        lag_ns = np.where(waiting, lag_ns - _longest_silence(intended, sent, answered, waiting), lag_ns)
        fresh = (
            bool(connections)
            & on_wire
            & ~rows.sort_values("sent_at_ns")["connection_id"].duplicated().reindex(rows.index).to_numpy()
        )
        late_ms[place] = lag_ns / 1e6
        for row in np.flatnonzero(fresh & ~waiting & (lag_ns > OFTEN_LATE_MS * 1e6)):
            itself_ms = _lag_between(resources, int(intended[row]), int(sent[row]))
            late_ms[place[row]] = min(late_ms[place[row]], itself_ms)
        for_connection[place] = waiting
    return late_ms, for_connection


def _lag_between(resources: pd.DataFrame, begin_ns: int, end_ns: int) -> float:
    """Return how late the senders were at most between two instants, ms; nothing where nobody looked meanwhile."""
    at_ns = resources["at_ns"]
    looked = resources[(at_ns >= begin_ns) & (at_ns <= end_ns + LOOK_NS)]["generator_lag_ms"].dropna()
    return float(looked.max()) if len(looked) else 0.0


def _whole(manifest: Manifest, name: str) -> int:
    value: Any = manifest.parameters.get(name)
    return value if isinstance(value, int) else int(name == "workers")


def _under_way(at: Instants, sent: Instants, done: Instants) -> Instants:
    """Return how many requests were on a connection at each instant, or on the way to one: sent before, done after."""
    begun = np.searchsorted(np.sort(sent), at + PROMPT_NS, side="right")
    ended = np.searchsorted(np.sort(done), at, side="right")
    return (begun - ended).astype(np.int64)


def _place_in_burst(intended: Instants, sent: Instants) -> Instants:
    """Return how many requests that were due at the very same instant left before each."""
    order = np.lexsort((sent, intended))
    begins = np.flatnonzero(np.diff(intended[order], prepend=intended[order[0]] - 1))
    lengths = np.diff(begins, append=len(order))
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order)) - np.repeat(begins, lengths)
    return places


def _longest_silence(begin: Instants, end: Instants, answered: Instants, asked: npt.NDArray[np.bool_]) -> Instants:
    """Return the longest time without an answer between `begin` and `end`, where it is asked for, else 0.

    Shape as `begin`; `answered` is sorted. The maxima over ranges are read off a sparse table (Bender and Farach-Colton
    2000), one level of it at a time.
    """
    longest = np.zeros(len(begin), dtype=np.int64)
    if not asked.any():
        return longest
    begin, end = begin[asked], end[asked]
    first = np.searchsorted(answered, begin, side="right")
    last = np.searchsorted(answered, end, side="right") - 1  # of the answers within
    silent = first > last
    found = np.where(silent, end - begin, 0)
    some = np.flatnonzero(~silent)
    found[some] = np.maximum(answered[first[some]] - begin[some], end[some] - answered[last[some]])
    level, width = np.diff(answered), 1
    counts = last - first  # gaps that lie within wholly
    while len(level):
        here = some[(counts[some] >= width) & (counts[some] < 2 * width)]
        if len(here):
            inner = np.maximum(level[first[here]], level[last[here] - width])
            found[here] = np.maximum(found[here], inner)
        level, width = np.maximum(level[:-width], level[width:]), 2 * width
    longest[asked] = found
    return longest
