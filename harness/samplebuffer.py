"""Holds requests as packed numbers while load is made, and turns them into Arrow columns afterwards.

Recording must not disturb what it records: one request is one `struct.pack_into` into preallocated memory, no dict, no
object that the garbage collector would have to visit. Tables are built from whole arrays. `recorder` decides when.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from harness.sample import Endpoint, Mode, Outcome

UNKNOWN = -1  # an instant, status, size or connection that is not known, inside the buffer; null on disk
NAN = float("nan")  # the same for a duration

_ENDPOINTS = list(Endpoint)
_OUTCOMES = list(Outcome)
ENDPOINT_CODE = {endpoint: code for code, endpoint in enumerate(_ENDPOINTS)}
OUTCOME_CODE = {outcome: code for code, outcome in enumerate(_OUTCOMES)}

# One row of the buffer, packed without padding. A test keeps the two descriptions in step.
_PACK = struct.Struct("<qBBdiiqqqqhBiddddqi")
_DTYPE = np.dtype(
    [
        ("run", "<i8"), ("child", "u1"), ("endpoint", "u1"), ("level", "<f8"), ("trial", "<i4"), ("worker", "<i4"),
        ("intended", "<i8"), ("sent", "<i8"), ("first_byte", "<i8"), ("done", "<i8"), ("status", "<i2"),
        ("outcome", "u1"), ("error", "<i4"), ("db", "<f8"), ("quota", "<f8"), ("publish", "<f8"), ("app", "<f8"),
        ("bytes", "<i8"), ("connection", "<i4"),
    ]
)  # fmt: skip
_CHUNK_ROWS = 4_096
DURATION_GRID = 1024.0  # per millisecond: a power of two, so that a rounded duration has few digits in binary too


def run_key(run: int, child: int = 0) -> str:
    """Name the run numbered `run` from 1, or its child numbered `child` from 1: "17", "17.2"."""
    return f"{run}.{child}" if child else str(run)


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Rows taken from the buffer: packed chunks and the error texts they point into."""

    chunks: list[tuple[bytes | bytearray, int]]  # bytes, rows used
    errors: list[str]

    def rows(self) -> np.ndarray[Any, Any]:
        """Return the rows as one array; its fields are those of `SampleBuffer.append`, unknown values as there."""
        parts = [np.frombuffer(chunk, _DTYPE, used) for chunk, used in self.chunks]
        return np.concatenate(parts) if parts else np.empty(0, _DTYPE)

    def shifted(self, by_ns: int) -> Batch:
        """Return the same rows as a clock shows them that is `by_ns` ahead; what is unknown stays so."""
        moved: list[tuple[bytes | bytearray, int]] = []
        for chunk, used in self.chunks:
            packed = bytearray(memoryview(chunk)[: used * _PACK.size])
            rows = np.frombuffer(packed, _DTYPE, used)
            for name in ("intended", "sent", "first_byte", "done"):
                rows[name] += np.where(rows[name] == UNKNOWN, 0, by_ns)
            moved.append((packed, used))
        return Batch(moved, self.errors)


class SampleBuffer:
    """Packs requests into preallocated memory. Not for two threads at once."""

    def __init__(self) -> None:
        self.rows = 0  # ever appended
        self._start_batch()

    def _start_batch(self) -> None:
        self._chunks: list[tuple[bytes | bytearray, int]] = []
        self._errors: dict[str, int] = {}
        self._chunk = bytearray(_CHUNK_ROWS * _PACK.size)
        self._used = 0

    def append(
        self,
        run: int,
        child: int,  # 0 for the run itself, else its child
        endpoint: Endpoint,
        level: float,  # NAN when the mode has no level
        trial: int,
        worker: int,
        intended_at_ns: int,
        sent_at_ns: int,
        first_byte_at_ns: int,
        done_at_ns: int,
        status: int,
        outcome: Outcome,
        error: str | None,
        timing: tuple[float, float, float, float],  # db, quota, publish, app in ms
        response_bytes: int,
        connection_id: int,
    ) -> None:
        """Add one request. Unknown integers are UNKNOWN, unknown durations NAN."""
        if self._used == _CHUNK_ROWS:
            self._chunks.append((self._chunk, self._used))
            self._chunk, self._used = bytearray(_CHUNK_ROWS * _PACK.size), 0
        code = UNKNOWN if error is None else self._errors.setdefault(error, len(self._errors))
        _PACK.pack_into(
            self._chunk, self._used * _PACK.size,
            run, child, ENDPOINT_CODE[endpoint], level, trial, worker,
            intended_at_ns, sent_at_ns, first_byte_at_ns, done_at_ns, status, OUTCOME_CODE[outcome], code,
            *timing, response_bytes, connection_id,
        )  # fmt: skip
        self._used += 1
        self.rows += 1

    def absorb(self, batch: Batch) -> None:
        """Add the rows of another buffer, for example another process's, as they are."""
        translated = np.array(
            [self._errors.setdefault(error, len(self._errors)) for error in batch.errors] or [UNKNOWN], dtype="<i4"
        )
        for chunk, used in batch.chunks:
            packed = bytearray(memoryview(chunk)[: used * _PACK.size])
            codes = np.frombuffer(packed, _DTYPE, used)["error"]
            codes[...] = np.where(codes == UNKNOWN, UNKNOWN, translated[codes])
            self._chunks.append((packed, used))
            self.rows += used

    def drain(self) -> Batch:
        """Return copies of what was appended since the last call, keep the memory: fresh memory would be paid for."""
        used = (bytes(memoryview(self._chunk)[: self._used * _PACK.size]), self._used)
        batch = Batch([*self._chunks, used] if self._used else self._chunks, list(self._errors))
        self._chunks, self._errors, self._used = [], {}, 0
        return batch

    def take(self) -> Batch:
        """Return what was appended since the last call and start afresh.

        The batch is the caller's alone, an empty one too: a thread may look into it while rows are added here.
        """
        used = [(self._chunk, self._used)] if self._used else []
        batch = Batch([*self._chunks, *used], list(self._errors))
        if batch.chunks:
            self._start_batch()
        return batch


def _integers(values: np.ndarray[Any, Any]) -> pa.Array:
    wide = values.astype(np.int64)
    return pa.array(wide, mask=wide == UNKNOWN)


def _floats(values: np.ndarray[Any, Any]) -> pa.Array:
    return pa.array(np.ascontiguousarray(values), mask=np.isnan(values))


def _durations(values: np.ndarray[Any, Any]) -> pa.Array:
    """Round to 1/1024 ms, about a microsecond: on disk the bytes that are then zero cost nothing, nearly two thirds."""
    return _floats(np.rint(values * DURATION_GRID) / DURATION_GRID)


def _elapsed_ms(rows: np.ndarray[Any, Any], since: str) -> pa.Array:
    """Return done - since in milliseconds, null where either is unknown."""
    known = (rows["done"] != UNKNOWN) & (rows[since] != UNKNOWN)
    return _durations(np.where(known, (rows["done"] - rows[since]) / 1e6, NAN))


def _codes(values: np.ndarray[Any, Any], names: Sequence[str]) -> pa.Array:
    plain = pa.array([str(name) for name in names], pa.string())
    return pa.DictionaryArray.from_arrays(pa.array(values.astype(np.int8)), plain)


def _run_keys(rows: np.ndarray[Any, Any]) -> pa.Array:
    """Build `run_key` of every row without a Python loop."""
    run = pc.cast(pa.array(np.ascontiguousarray(rows["run"])), pa.string())
    child = pa.array(rows["child"].astype(np.int64))
    both = pc.binary_join_element_wise(run, pc.cast(child, pa.string()), ".")
    return pc.if_else(pc.equal(child, 0), run, both)


def sample_table(batch: Batch, mode: Mode, scenario: str, schema: pa.Schema) -> pa.Table:
    """Turn packed rows into the columns of `sample.Sample`."""
    rows = batch.rows()
    errors = pa.array(batch.errors, pa.string())
    zeros = np.zeros(len(rows), np.int8)
    columns = {
        "run_key": _run_keys(rows),
        "scenario": pc.cast(_codes(zeros, [scenario]), pa.string()),
        "endpoint": _codes(rows["endpoint"], _ENDPOINTS),
        "mode": _codes(zeros, [mode]),
        "level": _floats(rows["level"]),
        "trial": _integers(rows["trial"]),
        "worker": _integers(rows["worker"]),
        "intended_at_ns": _integers(rows["intended"]),
        "sent_at_ns": _integers(rows["sent"]),
        "first_byte_at_ns": _integers(rows["first_byte"]),
        "done_at_ns": _integers(rows["done"]),
        "latency_ms": _elapsed_ms(rows, "intended"),
        "service_ms": _elapsed_ms(rows, "sent"),
        "status": _integers(rows["status"]),
        "outcome": _codes(rows["outcome"], _OUTCOMES),
        "error": errors.take(_integers(rows["error"])),
        "server_db_ms": _durations(rows["db"]),
        "server_quota_ms": _durations(rows["quota"]),
        "server_publish_ms": _durations(rows["publish"]),
        "server_app_ms": _durations(rows["app"]),
        "response_bytes": _integers(rows["bytes"]),
        "connection_id": _integers(rows["connection"]),
    }
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)
