"""What one tenant sees and does of another: nothing. Each route x each caller x each object, from the route table.

A foreign object must be told exactly as one that never was, and asking for it must change nothing, take no token of
the neighbour's quota and no place of its caps. A route, parameter or field that `tests/surface.py` does not know makes
these tests fail.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from service.api.operations import Operations
from service.app import create_app
from service.archive import purge
from service.auth import Callers, Role
from service.db import Database
from service.embedded import Stack
from service.exchange import Exchange, Operation
from service.quota.limits import Quota
from service.quota.rates import Rates
from service.quota.socket_leases import Full, Lease, Leases
from service.settings import Settings
from service.stream.commands import COMMANDS, LOCAL
from tests.neighbours import Caller, Neighbourhood, open_neighbourhood
from tests.sockets import open_socket, serve
from tests.surface import HEADERS, QUERY, Entry, Filling, Kind, Place, State, Unknown, entries, streams

NOWHERE = create_app(Settings("postgresql://nowhere/none", "redis://nowhere"))
"""The application, never started: for its route table."""

ENTRIES, STREAMS = entries(NOWHERE), streams(NOWHERE)

OF_STREAMS = (State.OWN, State.FOREIGN, State.ABSENT, State.MALFORMED)

Told: TypeAlias = tuple[int, list[tuple[str, str]], str]
"""All that an answer says: status, header fields, body."""


@pytest.fixture(scope="module")
def database_url(new_database: Any) -> str:
    return str(new_database())


@pytest.fixture(scope="module")
def redis_url(stack: Stack) -> str:
    return f"{stack.redis_url}?db=14"


@pytest.fixture(scope="module")
def archive_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("archives")


@pytest.fixture(scope="module")
def url(database_url: str, redis_url: str, archive_dir: Path) -> Iterator[str]:
    with serve(create_app(Settings(database_url, redis_url, log_level="error", archive_dir=archive_dir))) as address:
        yield address


@pytest.fixture
async def neighbourhood(database: Database, redis_url: str, archive_dir: Path) -> AsyncIterator[Neighbourhood]:
    async with open_neighbourhood(database, redis_url, archive_dir) as opened:
        yield opened


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> list[uuid.UUID]:
    """Each workspace of which a token of a rate or a place of a cap on sockets is asked for, in order."""
    workspaces: list[uuid.UUID] = []
    take_token, take_place = Rates.take, Leases.take

    async def token(rates: Rates, workspace_id: uuid.UUID, *more: Any) -> dict[str, str]:
        workspaces.append(workspace_id)
        return await take_token(rates, workspace_id, *more)

    async def place(leases: Leases, lease: Lease, quota: Quota) -> Full | None:
        workspaces.append(lease.workspace_id)
        return await take_place(leases, lease, quota)

    monkeypatch.setattr(Rates, "take", token)
    monkeypatch.setattr(Leases, "take", place)
    return workspaces


@pytest.fixture
async def client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=30) as opened:
        yield opened


def expected(entry: Entry, caller: Caller, filling: Filling) -> int:
    """Return the status that a request must get, by the contract."""
    if entry.operation.role is not None and caller.role is None:
        return 401
    if not caller.may(entry):
        return 403
    states = dict(zip(entry.places, filling, strict=True))
    about = {place: state for place, state in states.items() if not place.is_filter}
    unseen = {State.ABSENT, State.MALFORMED} | (set() if caller.is_installation else {State.FOREIGN})
    if unseen & set(about.values()):
        return 404
    if len({state is State.FOREIGN for state in about.values()}) > 1:  # an agent of one tenant, a run for the other
        return 404
    if State.GUARDED in about.values() and caller.role is not None and caller.role < Role.ADMIN:
        return 403
    return 200


def masked(answer: httpx.Response, ids: Mapping[Place, str]) -> Told:
    """Return all that an answer says, apart from the ids that were asked for, the date and durations."""
    headers = sorted((name, value) for name, value in answer.headers.items() if name not in ("date", "server-timing"))
    body = answer.text
    for id_ in ids.values():
        body = body.replace(id_, "ID")
        headers = [(name, value.replace(id_, "ID")) for name, value in headers]
    return answer.status_code, headers, body


def leaks(answer: httpx.Response, marks: set[str], ids: Mapping[Place, str]) -> list[str]:
    """Return what of the neighbour's stands in an answer, apart from the ids that were sent."""
    said = answer.text + repr(answer.headers.multi_items())
    return [mark for mark in marks - set(ids.values()) if mark in said]


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


@pytest.mark.parametrize(("path", "place"), STREAMS, ids=[path for path, _ in STREAMS])
async def test_a_stream_of_another_tenants_object_is_as_absent_as_one_that_never_was(
    path: str, place: Place, neighbourhood: Neighbourhood, url: str, spent: list[uuid.UUID]
) -> None:
    neighbour = neighbourhood.neighbour.tenant.workspace_id
    marks = await neighbourhood.neighbour.marks()
    for caller in neighbourhood.callers:
        visible = [State.OWN, State.FOREIGN] if caller.is_installation else [State.OWN] if caller.role else []
        ends: dict[State, tuple[int, str]] = {}
        ids = {state: await neighbourhood.id_for(place.kind, state, caller, path) for state in OF_STREAMS}
        before = await neighbourhood.fingerprint()
        for state in [each for each in OF_STREAMS if each not in visible]:
            async with open_socket(url, path.format_map({place.name: ids[state]}), caller.bearer) as socket:
                ends[state] = await socket.closed()
        assert await neighbourhood.fingerprint() == before, f"{path} as {caller.name} changed something"
        code = 4401 if caller.role is None else {Kind.RUN: 4404, Kind.WORKSPACE: 4403}[place.kind]
        assert {end[0] for end in ends.values()} == {code}, caller.name
        assert len({end for state, end in ends.items() if state is not State.OWN}) == 1, f"{caller.name}: {ends}"
        for state in visible:
            async with open_socket(url, path.format_map({place.name: ids[state]}), caller.bearer) as socket:
                first = json.dumps(await socket.frame())
            assert ids[state] in first, caller.name
            assert caller.is_installation or [mark for mark in marks if mark in first] == [], caller.name
        assert caller.is_installation or neighbour not in spent, caller.name


@pytest.mark.parametrize("cmd", COMMANDS)
async def test_a_command_about_another_tenants_object_is_answered_like_one_about_nothing(
    cmd: str, neighbourhood: Neighbourhood, url: str, spent: list[uuid.UUID]
) -> None:
    command = COMMANDS[cmd]
    (entry,) = [each for each in ENTRIES if (each.method, each.path) == (command.method, command.path)]
    (place,) = entry.places
    assert place.name == command.target
    own, marks = neighbourhood.own, await neighbourhood.neighbour.marks()
    paths = [f"/ws/workspaces/{own.tenant.workspace_id}/", f"/ws/runs/{await own.run()}/"]
    for caller, path in itertools.product(
        [caller for caller in neighbourhood.callers if caller.role is not None], paths
    ):
        told: dict[State, str] = {}
        async with open_socket(url, path, caller.bearer) as socket:
            for state in [each for each in place.states if each is not State.LEFT_OUT]:
                status, id_ = (
                    expected(entry, caller, (state,)),
                    await neighbourhood.id_for(place.kind, state, caller, entry.path),
                )
                fields = {name: QUERY[name] for name in command.query} | entry.request({place: id_}).get("json", {})
                before = await neighbourhood.fingerprint(apart_from=own)

                answer = await socket.answer(cmd, id=1, **{place.name: id_}, **fields)

                case = f"{cmd} as {caller.name} on {path}, {state.value}"
                assert answer["type"] == (f"{cmd}_ack" if status == 200 else "error"), (case, answer)
                assert answer.get("status", 200) == status, (case, answer)
                told[state] = json.dumps(answer).replace(id_, "ID")
                if not caller.is_installation:
                    assert [mark for mark in marks if mark in told[state]] == [], case
                    assert await neighbourhood.fingerprint(apart_from=own) == before, case
                if status == 200:
                    neighbourhood.spend()
        if not caller.is_installation:
            assert told[State.FOREIGN] == told[State.ABSENT], f"{cmd} as {caller.name}"
            assert neighbourhood.neighbour.tenant.workspace_id not in spent, f"{cmd} as {caller.name}"
        if not caller.may(entry):
            assert len(set(told.values())) == 1, f"{cmd} as {caller.name}: the refusal tells what there is"


def test_what_a_socket_answers_by_itself_takes_no_id() -> None:
    # Were there one more, it would have to be asked about foreign objects here.
    assert LOCAL == ("ping", "subscribe_approvals", "unsubscribe_approvals")


async def test_the_approvals_of_a_workspace_are_its_own(neighbourhood: Neighbourhood, url: str) -> None:
    own, neighbour = neighbourhood.own, neighbourhood.neighbour
    marks = await neighbour.marks()
    path = f"/ws/workspaces/{own.tenant.workspace_id}/"
    async with open_socket(url, path, neighbourhood.caller("OWNER").bearer) as socket:
        await socket.answer("subscribe_approvals")
        neighbour.spend()
        await neighbour.id_of(Kind.TOOL_CALL, "guarded")
        marks |= await neighbour.marks()
        call_id = str(await own.id_of(Kind.TOOL_CALL, "guarded"))
        seen = [await socket.frame()]
        while seen[-1].get("topic") != "approvals.event":
            seen.append(await socket.frame())
    assert seen[-1]["data"]["tool_call_id"] == call_id
    assert [mark for mark in marks if mark in json.dumps(seen)] == []


async def test_a_ticket_opens_what_its_caller_may_see_and_once(
    neighbourhood: Neighbourhood, client: httpx.AsyncClient, url: str
) -> None:
    async def ticket() -> str:
        answer = await client.post("/api/ws-tickets/", json={}, headers=neighbourhood.caller("VIEWER").headers)
        return str(answer.json()["ticket"])

    neighbour = neighbourhood.neighbour
    own, theirs = await neighbourhood.own.id_of(Kind.RUN), await neighbour.id_of(Kind.RUN)
    for path, code in ((f"/ws/runs/{theirs}/", 4404), (f"/ws/workspaces/{neighbour.tenant.workspace_id}/", 4403)):
        used = await ticket()
        for address, end in ((path, code), (f"/ws/runs/{own}/", 4401)):  # it is used up, whatever came of it
            async with open_socket(url, f"{address}?ticket={used}") as socket:
                assert (await socket.closed())[0] == end

    used = await ticket()
    async with AsyncExitStack() as stack:
        sockets = await asyncio.gather(
            *(stack.enter_async_context(open_socket(url, f"/ws/runs/{own}/?ticket={used}")) for _ in range(8))
        )
        firsts = await asyncio.gather(*(socket.frame() for socket in sockets), return_exceptions=True)
    assert sum(isinstance(first, dict) for first in firsts) == 1
