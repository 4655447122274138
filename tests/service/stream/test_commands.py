"""Commands on a socket do what the HTTP interface does, and say no in the same words."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator

import pytest

from service.api.runs import ReasonBody
from service.auth import Caller, Callers, Role
from service.db import Database
from service.exchange import Answer, Exchange, Operation, answer_json
from service.stream.commands import COMMANDS, Commands, Request
from tests.service.stream.conftest import NewTenant, Tenant
from tests.sockets import Client, open_socket


@pytest.fixture
async def run_id(tenant: Tenant) -> str:
    """A run."""
    return await tenant.create()


@pytest.fixture
async def client(tenant: Tenant, url: str, run_id: str) -> AsyncIterator[Client]:
    """A socket on the run."""
    async with open_socket(url, f"/ws/runs/{run_id}/", tenant.token) as opened:
        yield opened


async def test_ping_is_answered_with_what_was_sent(client: Client) -> None:
    assert await client.answer("ping", id="a", data={"at": 1}, more=[2]) == {
        "type": "ping_ack", "event": "ping_ack", "cmd": "ping", "id": "a", "data": {"at": 1, "more": [2]}
    }  # fmt: skip


async def test_a_snapshot_is_the_one_of_http(client: Client, tenant: Tenant, run_id: str) -> None:
    answer = await client.answer("request_snapshot", since_seq=1)
    shown = (await tenant.http.get(f"/api/runs/{run_id}/snapshot/", params={"since_seq": 1})).json()
    assert (answer["type"], answer["data"]) == ("request_snapshot_ack", shown)


async def test_a_subrun_is_spawned_with_its_options(client: Client, tenant: Tenant, run_id: str) -> None:
    answer = await client.answer("spawn_subrun", input_text="go", options={"group_id": "g"})
    child = (await tenant.http.get(f"/api/runs/{answer['data']['child_run_id']}/")).json()
    assert (answer["type"], child["parent_run_id"], child["input_text"], child["group_id"]) == (
        "spawn_subrun_ack", run_id, "go", "g"
    )  # fmt: skip


async def test_a_run_is_cancelled_and_its_end_is_pushed(client: Client, run_id: str) -> None:
    assert (await client.frame())["event"] == "run_created"
    await client.send({"type": "cmd", "cmd": "cancel_run", "data": {"reason": "enough"}})
    frames = {frame["type"]: frame for frame in await client.frames(2)}
    assert (frames["cancel_run_ack"]["data"]["run_id"], frames["cancel_run_ack"]["data"]["status"]) == (
        run_id,
        "CANCELED",
    )
    assert frames["push"]["data"] == {"from": "PENDING", "to": "CANCELED", "reason": "enough"}
    again = await client.answer("cancel_run")
    assert (again["type"], again["code"], again["status"]) == ("error", "illegal-state", 409)


async def test_a_run_is_paused_and_resumed_and_both_are_pushed(client: Client, run_id: str) -> None:
    assert (await client.frame())["event"] == "run_created"
    pushed = []
    for cmd, status in (("pause_run", "PAUSED"), ("resume_run", "PENDING")):
        await client.send({"type": "cmd", "cmd": cmd, "reason": "lunch"})
        frames = {frame["type"]: frame for frame in await client.frames(2)}
        answered = frames[f"{cmd}_ack"]["data"]
        assert (answered["run_id"], answered["status"]) == (run_id, status)
        pushed.append(frames["push"]["data"])
    assert pushed == [
        {"from": "PENDING", "to": "PAUSED", "reason": "lunch"},
        {"from": "PAUSED", "to": "PENDING", "reason": "lunch"},
    ]
    again = await client.answer("resume_run")
    assert (again["type"], again["code"], again["status"]) == ("error", "illegal-state", 409)


async def test_every_command_is_there(client: Client) -> None:
    absent = str(uuid.UUID(int=0))
    for cmd, command in COMMANDS.items():
        answer = await client.answer(cmd, **{command.target: absent})
        assert (answer["code"], answer["status"]) == ("not-found", 404), cmd


async def test_another_run_may_be_named_and_on_a_workspace_must_be(tenant: Tenant, url: str, client: Client) -> None:
    other = await tenant.create()
    assert (await client.answer("cancel_run", run_id=other))["data"]["run_id"] == other
    async with open_socket(url, f"/ws/workspaces/{tenant.workspace_id}/", tenant.token) as on_workspace:
        answer = await on_workspace.answer("request_snapshot")
        assert (answer["code"], answer["error"]) == ("invalid", "run_id: say on what the command is to be done")
        assert (await on_workspace.answer("request_snapshot", run_id=other))["data"]["run"]["run_id"] == other


async def test_what_http_refuses_is_refused_with_the_same_problem(
    client: Client, tenant: Tenant, new_tenant: NewTenant, run_id: str
) -> None:
    foreign = await (await new_tenant()).create()
    for cmd, fields, path, body in (
        ("cancel_run", {"run_id": foreign}, f"/api/runs/{foreign}/cancel/", {}),
        ("cancel_run", {"run_id": "no-uuid"}, "/api/runs/no-uuid/cancel/", {}),
        ("cancel_run", {"why": "x"}, f"/api/runs/{run_id}/cancel/", {"why": "x"}),
        ("spawn_subrun", {"input_text": 7}, f"/api/runs/{run_id}/spawn_subrun/", {"input_text": 7}),
        (
            "spawn_subrun",
            {"options": {"failure_policy": "HOPE"}},
            f"/api/runs/{run_id}/spawn_subrun/",
            {"options": {"failure_policy": "HOPE"}},
        ),
    ):
        answer = await client.answer(cmd, id=1, **fields)
        problem = (await tenant.http.post(path, json=body)).json()
        assert answer == {
            "type": "error", "event": "error", "cmd": cmd, "id": 1, "code": problem["type"].rpartition(":")[2],
            "status": problem["status"], "error": problem["error"], "retry_after_s": None, "data": problem,
        }  # fmt: skip
    wrong = await client.answer("request_snapshot", since_seq="last")
    assert (wrong["code"], wrong["data"]["field"]) == ("invalid", "since_seq")
    assert (await client.answer("request_snapshot", wait=9))["data"]["field"] == "wait"


async def test_roles_and_quotas_are_those_of_http(new_tenant: NewTenant, url: str) -> None:
    tenant = await new_tenant()
    path = f"/ws/runs/{await tenant.create()}/"
    async with open_socket(url, path, tenant.tokens["VIEWER"]) as viewer:
        for cmd in ("cancel_run", "spawn_subrun"):
            answer = await viewer.answer(cmd)
            assert (answer["code"], answer["status"]) == ("role-too-low", 403), cmd
        answers = [await viewer.answer("request_snapshot") for _ in range(60)]
        refused = [answer for answer in answers if answer["type"] == "error"]
        assert {answer["type"] for answer in answers} == {"request_snapshot_ack", "error"}
        assert {(each["status"], *each["data"]["violated-policies"]) for each in refused} == {(429, "snapshot_poll")}
        assert all(each["retry_after_s"] >= 1 for each in refused)


@pytest.mark.parametrize(
    ("frame", "code", "said"),
    [
        ("no json", "malformed", "the frame is not valid JSON"),
        ("", "malformed", "the frame is not valid JSON"),
        ("[" * 30_000, "malformed", "the frame is not valid JSON"),
        ("[1]", "malformed", "the frame must be a JSON object"),
        ("null", "malformed", "the frame must be a JSON object"),
        (b"\x00\xff", "malformed", "send text frames"),
        ("{}", "invalid", 'type: a client sends frames of type "cmd" only'),
        ('{"type": "push"}', "invalid", 'type: a client sends frames of type "cmd" only'),
        ('{"type": "cmd"}', "invalid", "cmd: name the command"),
        ('{"type": "cmd", "cmd": 7}', "invalid", "cmd: name the command"),
        ('{"type": "cmd", "cmd": "dance"}', "invalid", "cmd: give one of ping, "),
        ('{"type": "cmd", "cmd": "cancel_run", "data": [1]}', "invalid", "data: expected an object"),
        ('{"type": "cmd", "cmd": "cancel_run", "run_id": 7}', "invalid", "run_id: say on what"),
        ('{"type": "cmd", "cmd": "cancel_run", "reason": "\\u0000"}', "invalid", "reason: must not contain"),
        ('{"type": "cmd", "cmd": "cancel_run", "reason": "\\ud800"}', "malformed", "the frame is not valid JSON"),
        ('{"type": "cmd", "cmd": "subscribe_approvals"}', "invalid", "cmd: subscribe_approvals belongs to the stream"),
    ],
)
async def test_a_frame_that_means_nothing_is_answered_and_the_socket_lives(
    client: Client, frame: str | bytes, code: str, said: str
) -> None:
    assert (await client.frame())["event"] == "run_created"
    await client.connection.send(frame)
    answer = await client.frame()
    assert (answer["type"], answer["code"]) == ("error", code), answer
    assert answer["error"].startswith(said), answer
    assert (await client.answer("ping"))["type"] == "ping_ack"


async def test_a_frame_of_64_kib_is_read_and_a_larger_one_closes_with_1009(client: Client) -> None:
    frame = {"type": "cmd", "cmd": "ping", "filler": ""}
    filler = "x" * (65_536 - len(json.dumps(frame)))
    assert (await client.answer("ping", filler=filler))["data"] == {"filler": filler}
    await client.connection.send("x" * 65_537)
    assert (await client.closed())[0] == 1009


async def test_a_command_whose_operation_is_not_in_the_route_table_is_not_supported() -> None:
    caller = Caller(uuid.uuid4(), uuid.uuid4(), Role.OWNER, None)
    answers = [json.loads(await Commands({}).perform(caller, Request(cmd, 7, {}), None)) for cmd in COMMANDS]
    assert [(each["type"], each["code"], each["status"], each["cmd"], each["id"]) for each in answers] == [
        ("error", "not-supported", 501, cmd, 7) for cmd in COMMANDS
    ]


async def test_a_command_is_there_as_soon_as_its_operation_is(database: Database) -> None:
    seen = []

    async def approve(exchange: Exchange[ReasonBody]) -> Answer[None]:
        seen.append((exchange.path_id("toolcall_id", "tool call"), exchange.body.reason, exchange.caller.role))
        return answer_json({"status": "APPROVED"})

    path = "/api/toolcalls/{toolcall_id}/approve/"
    operation = Operation(path, approve, Callers(database), Role.OPERATOR, ReasonBody)
    commands, call_id = Commands({("POST", path): operation}), uuid.uuid4()
    request = Request("approve_tool_call", None, {"tool_call_id": str(call_id), "reason": "fine"})
    operator = Caller(uuid.uuid4(), uuid.uuid4(), Role.OPERATOR, None)
    answer = json.loads(await commands.perform(operator, request, None))
    assert (answer["type"], answer["data"]) == ("approve_tool_call_ack", {"status": "APPROVED"})
    assert seen == [(call_id, "fine", Role.OPERATOR)]
    viewer = operator._replace(role=Role.VIEWER)
    assert json.loads(await commands.perform(viewer, request, None))["code"] == "role-too-low"


async def test_a_frame_of_any_depth_is_answered(tenant: Tenant, url: str) -> None:
    run_id = await tenant.create()
    async with open_socket(url, f"/ws/runs/{run_id}/", tenant.token) as socket:
        for depth in range(900, 1010):
            await socket.connection.send('{"type":"cmd","cmd":"ping","a":' + "[" * depth + "]" * depth + "}")
            while (answer := str(await socket.connection.recv())).startswith('{"type":"push"'):
                pass
            # The test's own reader has a limit too: what is nested is not read.
            assert answer.startswith(('{"type":"ping_ack"', '{"type":"error","event":"error","cmd":null')), depth
