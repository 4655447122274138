"""What is in a bundle, and whether it is whole. Pure: SQL to read one, bytes in and out, no file and no database.

A bundle is a zip with one JSON document. PARTS is the list of what belongs to a run: a table named there is bundled,
checked, purged and rehydrated, and this is the one place to name it. PostgreSQL builds the JSON (`row_to_json`), and
rehydration hands the same JSON back to it, so no value passes through a Python type on the way.
"""

from __future__ import annotations

import datetime as dt
import io
import struct
import uuid
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import TextClause, text

from service.archive.records import is_path_of
from service.errors import PlimsollError

FORMAT = "plimsoll.run_snapshot"
"""What the document says it is."""

SCHEMA_VERSION = 2
"""Form of the document; one more whenever PARTS grows or something changes its meaning."""

MOST_ZIP_BYTES = 256 << 20
"""Largest zip file that is read: 256 MiB."""

MOST_JSON_BYTES = 256 << 20
"""Largest document that is written or unpacked: 256 MiB. A file that claims less and holds more is refused too."""

MEMBER = "run_snapshot.json"
"""The one file in the zip."""


class Part(NamedTuple):
    """Rows that belong to one run alone: its table has a column `run_id`, and is purged with the run."""

    table: str  # also the name in the document
    order: str  # column that orders the rows; they are numbered by it when `last` is given
    last: str | None = None  # the run's column with the newest number: from 1 to it there is no gap
    missing: str | None = None  # the run's column with the number up to which rows may be missing
    since_version: int = 1  # the first SCHEMA_VERSION that has this part


PARTS = (
    Part("steps", "step_index", last="step_count"),
    Part("events", "seq", last="last_seq", missing="compacted_through_seq"),
    Part("subrun_groups", "group_id", since_version=2),
    Part("tool_calls", "tool_call_id", since_version=2),
)
"""What belongs to a run, in the order in which it can be inserted: each after what it refers to."""


class Owner(NamedTuple):
    """One row that a run refers to and shares with others: restored when it is absent, never purged."""

    name: str  # in the document
    table: str
    key: str  # its primary key, which the run has as a column


OWNERS = (Owner("workspace", "workspaces", "workspace_id"), Owner("agent", "agents", "agent_id"))
"""What must exist before a run can: each after what it refers to."""

Row = dict[str, msgspec.Raw]
"""A row of a table, by column, as PostgreSQL wrote it."""


class Damaged(PlimsollError):
    """A bundle is missing, unreadable or not what it must be; the message says what is wrong."""


class Header(msgspec.Struct, frozen=True):
    """What a bundle says of itself."""

    archive_id: uuid.UUID
    run_id: uuid.UUID
    path: str  # relative to the archive folder
    last_seq: int
    created_at: dt.datetime


class RunHead(msgspec.Struct, frozen=True):
    """The columns of a run that decide whether its bundle is whole."""

    run_id: uuid.UUID
    workspace_id: uuid.UUID
    agent_id: uuid.UUID
    parent_run_id: uuid.UUID | None
    status: str
    step_count: int
    last_seq: int
    archived_seq: int
    compacted_through_seq: int
    ended_at: dt.datetime


class Child(msgspec.Struct, frozen=True):
    """A subrun, as its parent's bundle names it: its rows are in bundles of its own."""

    run_id: uuid.UUID
    status: str
    group_id: str | None
    last_seq: int
    ended_at: dt.datetime | None


class Bundle(NamedTuple):
    """A bundle that was found whole."""

    header: Header
    head: RunHead
    schema_version: int
    owners: dict[str, Row]  # by name
    run: Row
    parts: dict[str, list[Row]]  # by table
    children: list[Child]


def _rows_of(part: Part) -> str:
    return (
        f"'{part.table}', (SELECT coalesce(json_agg(row_to_json(p) ORDER BY p.{part.order}), '[]')"  # noqa: S608 - constants
        f" FROM {part.table} p WHERE p.run_id = r.run_id)"
    )


def _row_of(owner: Owner) -> str:
    return f"'{owner.name}', (SELECT row_to_json(o) FROM {owner.table} o WHERE o.{owner.key} = r.{owner.key})"  # noqa: S608 - constants


READ: TextClause = text(f"""
    SELECT r.run_id, json_build_object(
        'format', '{FORMAT}', 'schema_version', {SCHEMA_VERSION},
        'archive', json_build_object('archive_id', a.archive_id, 'run_id', r.run_id, 'path', a.path,
                                     'last_seq', r.last_seq, 'created_at', CAST(:created_at AS timestamptz)),
        {", ".join(map(_row_of, OWNERS))},
        'run', row_to_json(r),
        {", ".join(map(_rows_of, PARTS))},
        'children', (SELECT coalesce(json_agg(json_build_object(
                'run_id', c.run_id, 'status', c.status, 'group_id', c.group_id, 'last_seq', c.last_seq,
                'ended_at', c.ended_at) ORDER BY c.run_id), '[]')
            FROM runs c WHERE c.parent_run_id = r.run_id))::text AS document
    FROM json_to_recordset(CAST(:archives AS json)) AS a(run_id uuid, archive_id uuid, path text)
    JOIN runs r ON r.run_id = a.run_id
""")  # noqa: S608 - constants
"""The documents of some runs, one row each."""


def pack(document: bytes) -> bytes:
    """Return the zip of a document: the same document gives the same bytes, whenever and wherever it is packed.

    Raises Damaged for a document that could not be read back.
    """
    if len(document) > MOST_JSON_BYTES:
        raise Damaged(f"its document has {len(document)} bytes; at most {MOST_JSON_BYTES} are written")
    member = zipfile.ZipInfo(MEMBER, date_time=(1980, 1, 1, 0, 0, 0))  # the earliest instant that a zip can name
    member.compress_type = zipfile.ZIP_DEFLATED
    member.create_system = 3  # Unix, on every system
    member.external_attr = 0o644 << 16
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(member, document)
    return packed.getvalue()


def unpack(packed: bytes) -> bytes:
    """Return the document of a zip; raises Damaged, also for a zip that unfolds to more than MOST_JSON_BYTES."""
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            members = archive.infolist()
            if [member.filename for member in members] != [MEMBER]:
                raise Damaged(f"the zip must hold {MEMBER} alone, and holds {len(members)} members")
            if members[0].compress_type != zipfile.ZIP_DEFLATED:
                raise Damaged("the zip must be deflated")
            with archive.open(MEMBER) as member:
                document = member.read(MOST_JSON_BYTES + 1)
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError) as fault:
        raise Damaged(f"the zip cannot be read: {fault}") from None
    if len(document) > MOST_JSON_BYTES:
        raise Damaged(f"the zip unfolds to more than {MOST_JSON_BYTES} bytes")
    return document


def parse(document: bytes) -> Bundle:
    """Return the bundle that a document holds, checked for being whole; raises Damaged."""
    fields = _decode(document, dict[str, msgspec.Raw], "the document")
    if _decode(fields.get("format", _NULL), str | None, "format") != FORMAT:
        raise Damaged(f"format: not {FORMAT}")
    version = _decode(fields.get("schema_version", _NULL), int | None, "schema_version")
    if version is None or not 1 <= version <= SCHEMA_VERSION:
        raise Damaged(f"schema_version: {version} is unknown here; 1 to {SCHEMA_VERSION} are read")
    held = [part for part in PARTS if part.since_version <= version]
    needed = ["archive", *(owner.name for owner in OWNERS), "run", *(part.table for part in held), "children"]
    if absent := [name for name in needed if name not in fields]:
        raise Damaged(f"the document has no {absent[0]}")
    bundle = Bundle(
        _decode(fields["archive"], Header, "archive"),
        _decode(fields["run"], RunHead, "run"),
        version,
        {owner.name: _decode(fields[owner.name], Row, owner.name) for owner in OWNERS},
        _decode(fields["run"], Row, "run"),
        {part.table: _decode(fields[part.table], list[Row], part.table) for part in held},
        _decode(fields["children"], list[Child], "children"),
    )
    _check(bundle, held)
    return bundle


def _check(bundle: Bundle, held: Sequence[Part]) -> None:
    """Raise Damaged unless ids agree everywhere and nothing that is numbered is missing."""
    header, head = bundle.header, bundle.head
    if header.run_id != head.run_id or not is_path_of(header.path, head.run_id):
        raise Damaged("archive: names another run than the one that is bundled")
    if not header.last_seq == head.last_seq == head.archived_seq:
        raise Damaged(f"archive: last_seq {header.last_seq} is not the run's, {head.last_seq}")
    for owner in OWNERS:
        if _decode(bundle.owners[owner.name].get(owner.key, _NULL), Any, owner.name) != str(getattr(head, owner.key)):
            raise Damaged(f"{owner.name}: is not the one that the run refers to")
        _require_own(head, owner.name, [bundle.owners[owner.name]])
    for part in held:
        rows = bundle.parts[part.table]
        _require_own(head, part.table, rows)
        if any(_decode(row.get("run_id", _NULL), Any, part.table) != str(head.run_id) for row in rows):
            raise Damaged(f"{part.table}: holds a row of another run")
        if part.last is not None:
            missing = 0 if part.missing is None else getattr(head, part.missing)
            numbers = [_decode(row.get(part.order, _NULL), int | None, part.table) or 0 for row in rows]
            _check_numbers(part, numbers, missing, getattr(head, part.last))


def _require_own(head: RunHead, name: str, rows: Sequence[Row]) -> None:
    """Raise Damaged for a row that names another workspace than the run's: it would be another tenant's."""
    for row in rows:
        if "workspace_id" in row and _decode(row["workspace_id"], Any, name) != str(head.workspace_id):
            raise Damaged(f"{name}: is of another workspace than the run")


def _check_numbers(part: Part, numbers: list[int], missing: int, last: int) -> None:
    """Raise Damaged unless the numbers rise, and from `missing` on to `last` none is left out."""
    if sorted(set(numbers)) != numbers or (numbers and numbers[0] < 1):
        raise Damaged(f"{part.table}: {part.order} does not rise from 1")
    if [number for number in numbers if number > missing] != list(range(missing + 1, last + 1)):
        raise Damaged(f"{part.table}: {part.order} has gaps between {missing + 1} and {last}")


_NULL = msgspec.Raw(b"null")


def _decode(raw: bytes | msgspec.Raw, its_type: Any, where: str) -> Any:
    """Return a value of the document; raises Damaged naming where it stands."""
    try:
        return msgspec.json.decode(raw, type=its_type)
    except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
        raise Damaged(f"{where}: {wrong}") from None
    except RecursionError:
        raise Damaged(f"{where}: nested too deeply") from None
