"""Bundles over HTTP: listed, downloaded, and pointed at by whoever no longer has the events."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from service.api.answers import ArchivePage, ArchiveView
from service.archive import Folder, Made, compact_events, create_checkpoint, purge
from service.archive.bundle import SCHEMA_VERSION, unpack
from service.db import Database
from service.events import EventType

COMPACTED = (EventType.STATE_CHANGED,)


@pytest.fixture
def folder(archive_dir: Path) -> Folder:
    """The folder of the service that is called."""
    return Folder(archive_dir)


Archive = Callable[[], Awaitable[tuple[str, Made]]]


@pytest.fixture
def archive(tenant: Any, database: Database, folder: Folder) -> Archive:
    """Return a function that makes a final run and its bundle."""

    async def make() -> tuple[str, Made]:
        run_id = (await tenant.create())["run_id"]
        assert (await tenant.operator.post(f"/api/runs/{run_id}/cancel/", json={})).status_code == 200
        (made,) = (await create_checkpoint(database, folder, uuid.UUID(run_id))).made
        return run_id, made

    return make


def masked(answer: httpx.Response, *ids: object) -> tuple[int, str]:
    """Return status and body with the ids masked."""
    body = answer.text
    for id_ in ids:
        body = body.replace(str(id_), "ID")
    return answer.status_code, body


async def test_a_runs_bundles_are_listed(tenant: Any, archive: Archive) -> None:
    run_id, made = await archive()
    answer = await tenant.as_role("VIEWER").get(f"/api/runs/{run_id}/archives/")
    assert msgspec.json.decode(answer.content, type=ArchivePage, strict=True).archives[0].archive_id == made.archive_id
    (listed,) = answer.json()["archives"]
    assert list(listed) == [field.name for field in msgspec.structs.fields(ArchiveView)]
    assert {**listed, "created_at": None} == {
        "archive_id": str(made.archive_id),
        "run_id": run_id,
        "created_at": None,
        "last_seq": 3,
        "compacted_through_seq": 0,
        "schema_version": SCHEMA_VERSION,
        "sha256": made.sha256,
        "size_bytes": made.size_bytes,
        "path": made.path,
        "download": f"/api/archives/{made.archive_id}/download/",
    }
    assert (await tenant.operator.get(f"/api/runs/{(await tenant.create())['run_id']}/archives/")).json() == {
        "archives": []
    }


async def test_a_bundle_is_downloaded_with_its_hash_as_tag(tenant: Any, archive: Archive, folder: Folder) -> None:
    run_id, made = await archive()
    path = f"/api/archives/{made.archive_id}/download/"
    answer = await tenant.as_role("VIEWER").get(path)
    assert (answer.status_code, answer.content) == (200, (folder.root / made.path).read_bytes())
    digest = base64.b64encode(hashlib.sha256(answer.content).digest()).decode()
    names = ("content-type", "content-length", "content-disposition", "etag", "repr-digest")
    assert {name: answer.headers[name] for name in names} == {
        "content-type": "application/zip",
        "content-length": str(made.size_bytes),
        "content-disposition": f'attachment; filename="{made.path.rpartition("/")[2]}"',
        "etag": f'"{made.sha256}"',
        "repr-digest": f"sha-256=:{digest}:",
    }
    assert json.loads(unpack(answer.content))["run"]["run_id"] == run_id
    again = await tenant.operator.get(path, headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


async def test_a_large_bundle_arrives_whole(tenant: Any, database: Database, archive: Archive, folder: Folder) -> None:
    _, made = await archive()
    content = hashlib.shake_256(b"seed").digest(1_000_000)  # several pieces; what they hold does not matter here
    (folder.root / made.path).write_bytes(content)
    async with database.begin() as connection:
        await connection.exec_driver_sql(
            "UPDATE run_archives SET sha256 = $1, size_bytes = $2 WHERE archive_id = $3",
            (hashlib.sha256(content).hexdigest(), len(content), made.archive_id),
        )
    assert (await tenant.operator.get(f"/api/archives/{made.archive_id}/download/")).content == content


def _pipe_instead_of(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (Path.unlink, "its file is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"), "its file does not have the recorded hash"),
        (lambda file: file.write_bytes(b""), "its file has 0 bytes, not "),
        (_pipe_instead_of, "its file cannot be opened: it is no regular file"),
        (lambda file: (file.unlink(), file.mkdir()), "its file cannot be opened: it is no regular file"),
    ],
)
async def test_a_missing_or_harmed_bundle_is_gone_and_says_why(
    tenant: Any, archive: Archive, folder: Folder, harm: Callable[[Path], object], reason: str
) -> None:
    _, made = await archive()
    harm(folder.root / made.path)
    answer = await tenant.operator.get(f"/api/archives/{made.archive_id}/download/")
    assert (answer.status_code, answer.headers["content-type"]) == (410, "application/problem+json")
    assert answer.json()["error"].startswith(f"the bundle cannot be given: {reason}")


async def test_an_archive_folder_that_is_not_there_is_503(tenant: Any, archive: Archive, folder: Folder) -> None:
    _, made = await archive()
    folder.root.rename(folder.root.with_name("away"))
    try:
        answer = await tenant.operator.get(f"/api/archives/{made.archive_id}/download/")
    finally:
        folder.root.with_name("away").rename(folder.root)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "60")


async def test_foreign_and_absent_bundles_are_told_alike(
    tenant: Any, new_tenant: Callable[..., Awaitable[Any]], archive: Archive, database: Database, folder: Folder
) -> None:
    run_id, made = await archive()
    purged_run_id, _ = await archive()
    async with database.begin() as connection:
        await connection.exec_driver_sql(
            "UPDATE runs SET ended_at = ended_at - interval '9 days' WHERE run_id = $1", (uuid.UUID(purged_run_id),)
        )
    assert [str(each) for each in (await purge(database, folder, 8 * 86_400.0)).run_ids] == [purged_run_id]
    stranger = (await new_tenant()).as_role("OWNER")
    absent = uuid.uuid4()
    for foreign, path in (
        (run_id, "/api/runs/{}/archives/"),
        (purged_run_id, "/api/runs/{}/archives/"),
        (made.archive_id, "/api/archives/{}/download/"),
    ):
        answers = [await stranger.get(path.format(each)) for each in (foreign, absent, "none-at-all")]
        assert len({masked(answer, foreign, absent, "none-at-all") for answer in answers}) == 1
        assert answers[0].status_code == 404


async def test_events_that_were_compacted_are_gone_with_the_bundles_link(
    tenant: Any, database: Database, archive: Archive, folder: Folder
) -> None:
    run_id, made = await archive()
    before = await tenant.snapshot(run_id, since_seq=2)
    await compact_events(database, folder, COMPACTED, 0.0)
    download = f"/api/archives/{made.archive_id}/download/"
    for query in ("", "?since_seq=0", "?since_seq=1", "?since_seq=1&wait=5"):
        answer = await tenant.operator.get(f"/api/runs/{run_id}/snapshot/{query}")
        assert (answer.status_code, answer.headers["content-type"]) == (410, "application/problem+json"), query
        assert answer.headers["link"] == f'<{download}>; rel="archives"'
        assert answer.json() == {
            "type": "urn:plimsoll:problem:gone",
            "title": "Gone",
            "status": 410,
            "detail": "events up to 2 are archived: take them from the bundle, or ask with since_seq=2 or more",
            "instance": f"/api/runs/{run_id}/snapshot/",
            "error": "events up to 2 are archived: take them from the bundle, or ask with since_seq=2 or more",
            "archive": download,
            "compacted_through_seq": 2,
        }
    events = json.loads(unpack((await tenant.operator.get(download)).content))["events"]
    assert [event["seq"] for event in events] == [1, 2, 3]
    assert await tenant.snapshot(run_id, since_seq=2) == before
    assert [event["seq"] for event in before["events_since_seq"]] == [3]


async def test_a_snapshot_that_was_kept_before_compaction_is_not_served_after_it(
    tenant: Any, database: Database, archive: Archive, folder: Folder
) -> None:
    run_id, _ = await archive()
    path = f"/api/runs/{run_id}/snapshot/"
    first = await tenant.operator.get(path)
    assert first.status_code == 200
    await compact_events(database, folder, COMPACTED, 0.0)
    for headers in ({}, {"if-none-match": first.headers["etag"]}):
        assert (await tenant.operator.get(path, headers=headers)).status_code == 410


async def test_a_purged_run_is_absent_and_its_bundles_are_not(
    tenant: Any, database: Database, archive: Archive, folder: Folder
) -> None:
    run_id, made = await archive()
    assert (await tenant.operator.get(f"/api/runs/{run_id}/snapshot/")).status_code == 200
    await purge(database, folder, 0.0)
    for method, path in (("GET", ""), ("GET", "snapshot/"), ("POST", "cancel/"), ("POST", "spawn_subrun/")):
        answer = await tenant.operator.request(method, f"/api/runs/{run_id}/{path}", json={})
        assert (answer.status_code, answer.json()["error"]) == (404, "no such run"), path
    assert [run["run_id"] for run in (await tenant.operator.get("/api/runs/")).json()["runs"]] == []
    (listed,) = (await tenant.operator.get(f"/api/runs/{run_id}/archives/")).json()["archives"]
    assert (await tenant.operator.get(listed["download"])).content == (folder.root / made.path).read_bytes()


async def test_a_purged_child_leaves_its_parents_snapshot(tenant: Any, database: Database, folder: Folder) -> None:
    parent = (await tenant.create())["run_id"]
    for _ in range(2):
        assert (await tenant.operator.post(f"/api/runs/{parent}/spawn_subrun/", json={})).status_code == 200
    await tenant.operator.post(f"/api/runs/{parent}/cancel/", json={})
    children = [child["run_id"] for child in (await tenant.snapshot(parent))["child_runs"]]
    for run_id in (parent, *children):
        await create_checkpoint(database, folder, uuid.UUID(run_id))
    seen = await tenant.operator.get(f"/api/runs/{parent}/snapshot/")
    etag = seen.headers["etag"]
    assert len(seen.json()["child_runs"]) == 2

    await purge(database, folder, 0.0)

    changed = await tenant.operator.get(f"/api/runs/{parent}/snapshot/", headers={"if-none-match": etag})
    assert (changed.status_code, changed.json()["child_runs"]) == (200, [])
