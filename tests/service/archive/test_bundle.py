"""A bundle's bytes: the same for the same document, and refused when anything about them is not as it must be."""

from __future__ import annotations

import io
import json
import uuid
import zipfile
from collections.abc import Callable
from typing import Any

import pytest

from service.archive import Damaged
from service.archive import bundle as bundles
from service.archive.bundle import MEMBER, SCHEMA_VERSION, pack, parse, unpack

RUN, WORKSPACE, AGENT, ARCHIVE, CALL = (str(uuid.UUID(int=n)) for n in range(1, 6))
PATH = f"run_archives/{RUN}/run_snapshot_20261123T031700.123456Z.json.zip"


def document() -> dict[str, Any]:
    """Return a whole document of a run with two steps and four events, of which the second was compacted."""
    return {
        "format": "plimsoll.run_snapshot",
        "schema_version": SCHEMA_VERSION,
        "archive": {
            "archive_id": ARCHIVE, "run_id": RUN, "path": PATH, "last_seq": 4, "created_at": "2026-11-23T03:17:00Z",
        },
        "workspace": {"workspace_id": WORKSPACE},
        "agent": {"agent_id": AGENT, "workspace_id": WORKSPACE},
        "run": {
            "run_id": RUN, "workspace_id": WORKSPACE, "agent_id": AGENT, "parent_run_id": None, "status": "COMPLETED",
            "step_count": 2, "last_seq": 4, "archived_seq": 4, "compacted_through_seq": 2,
            "ended_at": "2026-11-23T03:16:00Z",
        },
        "steps": [{"run_id": RUN, "step_index": n} for n in (1, 2)],
        "events": [{"run_id": RUN, "seq": n} for n in (1, 3, 4)],
        "subrun_groups": [{"run_id": RUN, "group_id": "readers"}],
        "tool_calls": [{"run_id": RUN, "tool_call_id": CALL}],
        "children": [],
    }  # fmt: skip


def encoded(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()


def zipped(*members: tuple[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip of any kind."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return made.getvalue()


def test_a_bundle_from_before_groups_and_tool_calls_is_read() -> None:
    old = document() | {"schema_version": 1}
    del old["subrun_groups"], old["tool_calls"]

    assert (parse(encoded(old)).schema_version, list(parse(encoded(old)).parts)) == (1, ["steps", "events"])


def test_the_same_document_gives_the_same_bytes() -> None:
    content = encoded(document())
    assert pack(content) == pack(content)
    assert unpack(pack(content)) == content
    assert parse(content).head.run_id == uuid.UUID(RUN)


@pytest.mark.parametrize(
    ("packed", "sentence"),
    [
        (b"", "the zip cannot be read: File is not a zip file"),
        (b"PK\x03\x04" + b"\0" * 40, "the zip cannot be read: File is not a zip file"),
        (pack(b"{}" * 100)[:-1], "the zip cannot be read: "),
        (pack(b"{}")[:40] + b"\xff" + pack(b"{}")[41:], "the zip cannot be read: "),
        (zipped(), f"the zip must hold {MEMBER} alone, and holds 0 members"),
        (zipped((MEMBER, b"{}"), ("more", b"")), f"the zip must hold {MEMBER} alone, and holds 2 members"),
        (zipped(("../" + MEMBER, b"{}")), f"the zip must hold {MEMBER} alone, and holds 1 members"),
        (zipped((MEMBER, b"{}"), compression=zipfile.ZIP_LZMA), "the zip must be deflated"),
    ],
)
def test_a_file_that_is_no_bundle_is_refused(packed: bytes, sentence: str) -> None:
    with pytest.raises(Damaged) as refused:
        unpack(packed)
    assert str(refused.value).startswith(sentence)


def test_a_zip_that_unfolds_to_more_than_is_read_is_refused_whatever_it_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(b"x" * 1001)
    monkeypatch.setattr(bundles, "MOST_JSON_BYTES", 1000)
    with pytest.raises(Damaged, match="the zip unfolds to more than 1000 bytes"):
        unpack(packed)
    with pytest.raises(Damaged, match="its document has 1001 bytes; at most 1000 are written"):
        pack(b"x" * 1001)


def drop(*path: str | int) -> Callable[[Any], None]:
    """Return a change that deletes what is at a place."""

    def change(value: Any) -> None:
        for part in path[:-1]:
            value = value[part]
        del value[path[-1]]

    return change


def put(new: Any, *path: str | int) -> Callable[[Any], None]:
    """Return a change that puts a value in a place."""

    def change(value: Any) -> None:
        for part in path[:-1]:
            value = value[part]
        value[path[-1]] = new

    return change


OTHER = str(uuid.UUID(int=9))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put("other", "format"), "format: not plimsoll.run_snapshot"),
        (put(3, "schema_version"), "schema_version: 3 is unknown here; 1 to 2 are read"),
        (drop("schema_version"), "schema_version: None is unknown here"),
        (drop("events"), "the document has no events"),
        (drop("agent"), "the document has no agent"),
        (put(OTHER, "archive", "run_id"), "archive: names another run than the one that is bundled"),
        (put(PATH.replace(RUN, OTHER), "archive", "path"), "archive: names another run than the one that is bundled"),
        (put("../" + PATH, "archive", "path"), "archive: names another run than the one that is bundled"),
        (put(3, "archive", "last_seq"), "archive: last_seq 3 is not the run's, 4"),
        (put(3, "run", "archived_seq"), "archive: last_seq 4 is not the run's, 4"),
        (put(None, "run", "ended_at"), "run: Expected `datetime`, got `null`"),
        (put(OTHER, "workspace", "workspace_id"), "workspace: is not the one that the run refers to"),
        (put(OTHER, "agent", "agent_id"), "agent: is not the one that the run refers to"),
        (put(OTHER, "agent", "workspace_id"), "agent: is of another workspace than the run"),
        (put(OTHER, "tool_calls", 0, "workspace_id"), "tool_calls: is of another workspace than the run"),
        (put(OTHER, "events", 0, "run_id"), "events: holds a row of another run"),
        (put(OTHER, "subrun_groups", 0, "run_id"), "subrun_groups: holds a row of another run"),
        (put(OTHER, "tool_calls", 0, "run_id"), "tool_calls: holds a row of another run"),
        (drop("tool_calls"), "the document has no tool_calls"),
        (drop("steps", 0, "run_id"), "steps: holds a row of another run"),
        (drop("events", 2), "events: seq has gaps between 3 and 4"),
        (drop("events", 1), "events: seq has gaps between 3 and 4"),
        (put(5, "events", 2, "seq"), "events: seq has gaps between 3 and 4"),
        (put(3, "events", 0, "seq"), "events: seq does not rise from 1"),
        (put(0, "events", 0, "seq"), "events: seq does not rise from 1"),
        (drop("steps", 0), "steps: step_index has gaps between 1 and 2"),
        (put("one", "steps", 0, "step_index"), "steps: Expected `int | null`, got `str`"),
        (put({}, "children"), "children: Expected `array`, got `object`"),
    ],
)
def test_a_document_that_is_not_whole_is_refused_with_the_place(
    change: Callable[[dict[str, Any]], None], sentence: str
) -> None:
    changed = document()
    change(changed)
    with pytest.raises(Damaged) as refused:
        parse(encoded(changed))
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[]", "the document: Expected `object`, got `array`"),
        (b"{", "the document: Input data was truncated"),
        (b"\xff", "the document: "),
        (b'{"format": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "the document: nested too deeply"),
    ],
)
def test_what_is_no_document_is_refused(content: bytes, sentence: str) -> None:
    with pytest.raises(Damaged) as refused:
        parse(content)
    assert str(refused.value).startswith(sentence)


def test_a_compacted_event_may_be_missing_only_where_the_run_says_so() -> None:
    changed = document()
    changed["run"]["compacted_through_seq"] = 1
    with pytest.raises(Damaged, match="seq has gaps between 2 and 4"):
        parse(encoded(changed))
