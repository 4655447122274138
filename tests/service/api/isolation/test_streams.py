"""What one tenant sees and does of another on a socket: nothing. Each stream and each command x caller x object."""

from __future__ import annotations

import asyncio
import itertools
import json
import uuid
from contextlib import AsyncExitStack

import httpx
import pytest

from service.stream.commands import COMMANDS, LOCAL
from tests.isolation import ENTRIES, STREAMS, expected
from tests.neighbours import Neighbourhood
from tests.sockets import open_socket
from tests.surface import QUERY, Kind, Place, State

OF_STREAMS = (State.OWN, State.FOREIGN, State.ABSENT, State.MALFORMED)


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
