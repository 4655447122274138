"""What one tenant sees and does of another: nothing. Each route x each caller x each object, from the route table.

A foreign object must be told exactly as one that never was, and asking for it must change nothing, take no token of
the neighbour's quota and no place of its caps. A route, parameter or field that `tests/surface.py` does not know makes
these tests fail.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from service.api.operations import Operations
from service.archive import purge
from service.auth import Callers, Role
from service.db import Database
from service.exchange import Exchange, Operation
from tests.isolation import ENTRIES, Told, expected, leaks, masked
from tests.neighbours import Caller, Neighbourhood
from tests.sockets import open_socket
from tests.surface import HEADERS, Entry, Filling, Kind, Place, State, Unknown, entries


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
async def test_another_tenants_object_is_as_absent_as_one_that_never_was(
    entry: Entry, neighbourhood: Neighbourhood, client: httpx.AsyncClient, spent: list[uuid.UUID]
) -> None:
    neighbour = neighbourhood.neighbour.tenant.workspace_id
    marks = await neighbourhood.neighbour.marks()
    assert {str(await neighbourhood.neighbour.id_of(kind)) for kind in Kind if kind is not Kind.TOOL_CALL} <= marks
    for caller in neighbourhood.callers:
        told: dict[Filling, Told] = {}
        changing = [each for each in entry.fillings if expected(entry, caller, each) == 200 and not entry.is_read]
        harmless = [each for each in entry.fillings if each not in changing]

        async def ask(filling: Filling, caller: Caller = caller, told: dict[Filling, Told] = told) -> None:
            ids = await neighbourhood.fill(entry, caller, filling)
            answer = await client.request(**entry.request(ids), headers=caller.headers)
            case = f"{entry} as {caller.name}, {[state.value for state in filling]}"
            assert answer.status_code == expected(entry, caller, filling), f"{case}: {answer.text}"
            if not caller.is_installation:
                assert leaks(answer, marks, ids) == [], case
            told[filling] = masked(answer, ids)

        for filling in entry.fillings:  # what is made on the way is made now
            await neighbourhood.fill(entry, caller, filling)
        before = await neighbourhood.fingerprint()
        for filling in harmless:
            await ask(filling)
        assert await neighbourhood.fingerprint() == before, f"{entry} as {caller.name} changed something"
        for filling in changing:
            others = await neighbourhood.fingerprint(apart_from=neighbourhood.own)
            await ask(filling)
            if not caller.is_installation:
                assert await neighbourhood.fingerprint(apart_from=neighbourhood.own) == others, (
                    f"{entry}: {caller.name}"
                )
            neighbourhood.spend()
        assert caller.is_installation or neighbour not in spent, f"{entry} as {caller.name} spent the neighbour's quota"
        assert sorted(told, key=entry.fillings.index) == entry.fillings
        require_alike(entry, caller, {filling: told[filling] for filling in harmless})


def require_alike(entry: Entry, caller: Caller, told: Mapping[Filling, Told]) -> None:
    """Fail where answers tell a foreign object from an absent one, or a refused caller what there is."""
    for filling, one in told.items():
        twin = tuple(State.ABSENT if state is State.FOREIGN else state for state in filling)
        if not caller.is_installation:
            assert one == told[twin], f"{entry} as {caller.name}: foreign and absent are told apart"
        if not caller.may(entry):
            assert one == told[entry.fillings[0]], f"{entry} as {caller.name}: the refusal tells what there is"


class Noted(dict[str, str]):
    """A query that notes which parameters are looked for."""

    asked: set[str]

    def __contains__(self, name: object) -> bool:
        self.asked.add(str(name))
        return super().__contains__(name)

    def __getitem__(self, name: str) -> str:
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
async def test_no_endpoint_reads_a_parameter_or_a_header_that_the_surface_does_not_know(
    entry: Entry, neighbourhood: Neighbourhood, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters, headers = set[str](), set[bytes]()
    read_query, read_header = Exchange.query, Exchange.header

    def query(exchange: Exchange[Any]) -> dict[str, str]:
        noted = Noted(read_query(exchange))
        noted.asked = parameters
        return noted

    def header(exchange: Exchange[Any], name: bytes) -> bytes | None:
        headers.add(name)
        return read_header(exchange, name)

    monkeypatch.setattr(Exchange, "query", query)
    monkeypatch.setattr(Exchange, "header", header)
    caller = neighbourhood.caller("installation OWNER")
    for filling in [each for each in entry.fillings if set(each) <= {State.OWN, State.LEFT_OUT}]:
        ids = await neighbourhood.fill(entry, caller, filling)
        answer = await client.request(**entry.request(ids), headers=caller.headers)
        assert answer.status_code == 200, answer.text
        neighbourhood.spend()
    assert parameters == set(entry.query_names)
    assert headers <= HEADERS


def test_a_route_that_the_surface_does_not_know_is_refused() -> None:
    class Body(msgspec.Struct):
        plan_id: uuid.UUID

    callers, endpoint = Callers(Database("postgresql://nowhere/none")), Operations(None, None).livez  # type: ignore[arg-type]
    for path, body in (("/api/plans/{plan_id}/", None), ("/api/plans/", Body)):
        operation = Operation(path, endpoint, callers, Role.VIEWER, body)
        with pytest.raises(Unknown, match=r"plan_id .* say in tests/surface.py"):
            entries(Starlette(routes=[Route(path, operation, methods=["GET"])]))


async def test_the_neighbours_own_requests_leave_what_is_looked_for(
    neighbourhood: Neighbourhood, client: httpx.AsyncClient, url: str, spent: list[uuid.UUID]
) -> None:
    before = await neighbourhood.fingerprint(apart_from=neighbourhood.own)
    neighbour, owner = neighbourhood.neighbour, neighbourhood.neighbours_owner
    run_id = await neighbour.id_of(Kind.RUN)
    answer = await client.get(f"/api/runs/{run_id}/snapshot/", headers=owner.headers)
    assert (answer.status_code, neighbour.label in leaks(answer, await neighbour.marks(), {})) == (200, True)
    async with open_socket(url, f"/ws/runs/{run_id}/", owner.bearer) as socket:
        await socket.frame()
    assert spent == [neighbour.tenant.workspace_id] * 2
    assert await neighbourhood.fingerprint(apart_from=neighbourhood.own) == before
    assert (await client.post(f"/api/runs/{run_id}/cancel/", json={}, headers=owner.headers)).status_code == 200
    after = await neighbourhood.fingerprint(apart_from=neighbourhood.own)
    assert {name for name, _ in set(after) - set(before)} == {"runs", "events", "subrun_groups"}


async def test_a_tag_of_the_neighbours_opens_nothing(neighbourhood: Neighbourhood, client: httpx.AsyncClient) -> None:
    neighbour = neighbourhood.neighbour
    run_id, archive_id = await neighbour.id_of(Kind.RUN), await neighbour.id_of(Kind.ARCHIVE)
    for path, id_ in ((f"/api/runs/{run_id}/snapshot/", run_id), (f"/api/archives/{archive_id}/download/", archive_id)):
        tag = (await client.get(path, headers=neighbourhood.neighbours_owner.headers)).headers["etag"]
        for sent in (tag, "*", f"W/{tag}"):
            headers = {**neighbourhood.caller("OWNER").headers, "if-none-match": sent}
            absent = str(uuid.uuid4())
            here = await client.get(path, headers=headers)
            there = await client.get(path.replace(str(id_), absent), headers=headers)
            assert here.status_code == 404
            assert masked(here, {Place("path", "id"): str(id_)}) == masked(there, {Place("path", "id"): absent})


async def test_an_idempotency_key_is_its_workspaces_own(
    neighbourhood: Neighbourhood, client: httpx.AsyncClient
) -> None:
    def body(of: Any) -> dict[str, str]:
        return {"workspace_id": str(of.tenant.workspace_id), "agent_id": str(of.tenant.agent_id)}

    key, owner = {"idempotency-key": "the same"}, neighbourhood.caller("OWNER").headers
    theirs = await client.post(
        "/api/runs/", json=body(neighbourhood.neighbour), headers={**neighbourhood.neighbours_owner.headers, **key}
    )
    mine = await client.post("/api/runs/", json=body(neighbourhood.own), headers={**owner, **key})
    assert (theirs.status_code, mine.status_code) == (200, 200)
    assert mine.json()["run_id"] != theirs.json()["run_id"]
    before = await neighbourhood.fingerprint()
    replayed = await client.post("/api/runs/", json=body(neighbourhood.neighbour), headers={**owner, **key})
    assert (replayed.status_code, theirs.json()["run_id"] in replayed.text) == (404, False)
    assert await neighbourhood.fingerprint() == before


async def test_bundles_of_the_neighbours_purged_runs_stay_the_neighbours(
    neighbourhood: Neighbourhood, client: httpx.AsyncClient
) -> None:
    archive_id = await neighbourhood.neighbour.id_of(Kind.ARCHIVE)
    (row,) = await neighbourhood.neighbour.tenant.rows(
        "SELECT run_id FROM run_archives WHERE archive_id = :id", id=archive_id
    )
    purged = await purge(neighbourhood.database, neighbourhood.folder, older_than_s=0, most=10_000)  # of all tests
    assert row["run_id"] in purged.run_ids
    marks = await neighbourhood.neighbour.marks()
    for path, id_ in (
        ("/api/runs/{}/archives/", row["run_id"]),
        ("/api/archives/{}/download/", archive_id),
        ("/api/runs/{}/", row["run_id"]),
    ):
        absent = str(uuid.uuid4())
        headers = neighbourhood.caller("OWNER").headers
        here, there = [await client.get(path.format(each), headers=headers) for each in (id_, absent)]
        sent = {Place("path", "id"): str(id_)}
        assert (here.status_code, leaks(here, marks, sent)) == (404, [])
        assert masked(here, sent) == masked(there, {Place("path", "id"): absent})
        theirs = await client.get(path.format(id_), headers=neighbourhood.neighbours_owner.headers)
        assert theirs.status_code == (404 if path == "/api/runs/{}/" else 200)


async def test_an_agent_cannot_name_the_neighbours_tool(
    neighbourhood: Neighbourhood, client: httpx.AsyncClient
) -> None:
    (theirs, *_) = await neighbourhood.neighbour.tenant.rows(
        "SELECT name FROM tool_definitions WHERE workspace_id = :id", id=neighbourhood.neighbour.tenant.workspace_id
    )
    path = f"/api/workspaces/{neighbourhood.own.tenant.workspace_id}/agents/"
    told = []
    for name in (theirs["name"], "nobody-has-a-tool-of-this-name"):
        body = {"name": "a", "script": [{"kind": "TOOL_CALL", "tool": name}]}
        answer = await client.post(path, json=body, headers=neighbourhood.caller("installation OWNER").headers)
        told.append((answer.status_code, answer.text.replace(name, "NAME")))
    assert told[0] == told[1]
    assert told[0][0] == 422
