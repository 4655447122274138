"""Whatever a caller sends, the answer is a problem that names what is wrong; never a 500, never a traceback."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import httpx
import pytest

W, A = "{workspace_id}", "{agent_id}"
GOOD = f'"workspace_id":"{W}","agent_id":"{A}"'


@pytest.mark.parametrize(
    ("why", "body", "status", "names"),
    [
        ("the body is no JSON", b"{not json", 400, "not valid JSON"),
        ("the body is cut short", b'{"workspace_id":', 400, "not valid JSON"),
        ("the body is not UTF-8", b"\xff\xfe", 400, "not valid JSON"),
        ("the body is an array", b"[1, 2]", 400, "JSON object"),
        ("the body is a number", b"7", 400, "JSON object"),
        ("the body is null", b"null", 400, "JSON object"),
        ("the body is nested too deeply", b'{"metadata":' + b"[" * 9000 + b"]" * 9000 + b"}", 400, "nested"),
        ("the body is empty", b"", 422, "workspace_id"),
        ("a field is missing", f'{{"workspace_id":"{W}"}}'.encode(), 422, "agent_id"),
        ("a field has another type", f'{{"workspace_id":"{W}","agent_id":5}}'.encode(), 422, "agent_id"),
        ("an id is no UUID", f'{{"workspace_id":"{W}","agent_id":"x"}}'.encode(), 422, "agent_id"),
        ("a field is unknown", f'{{{GOOD},"colour":"red"}}'.encode(), 422, "colour"),
        ("a text holds U+0000", f'{{{GOOD},"input_text":"a\\u0000b"}}'.encode(), 422, "input_text"),
        ("a metadata key holds U+0000", f'{{{GOOD},"metadata":{{"a\\u0000":1}}}}'.encode(), 422, "metadata"),
        ("metadata is no object", f'{{{GOOD},"metadata":[1]}}'.encode(), 422, "metadata"),
        ("metadata is not UTF-8", f'{{{GOOD},"metadata":{{"a":"'.encode() + b'\xff"}}', 422, "metadata"),
        ("a half of a surrogate pair", f'{{{GOOD},"input_text":"\\ud800"}}'.encode(), 400, "not valid JSON"),
        ("a number is NaN", f'{{{GOOD},"max_wait_seconds":NaN}}'.encode(), 400, "not valid JSON"),
        ("a number is negative", f'{{{GOOD},"expected_subruns":-1}}'.encode(), 422, "expected_subruns"),
        ("a number is too large", f'{{{GOOD},"expected_subruns":1e99}}'.encode(), 422, "expected_subruns"),
        ("a wait is zero", f'{{{GOOD},"max_wait_seconds":0}}'.encode(), 422, "max_wait_seconds"),
    ],
)
async def test_a_bad_create_is_refused_by_name(tenant: Any, why: str, body: bytes, status: int, names: str) -> None:
    sent = body.replace(W.encode(), str(tenant.workspace_id).encode())
    sent = sent.replace(A.encode(), str(tenant.agent_id).encode())
    answer = await tenant.operator.post("/api/runs/", content=sent)
    problem = answer.json()
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), why
    assert problem.keys() >= {"type", "title", "status", "detail", "instance", "error"}
    assert names in problem["error"], why
    assert (await tenant.operator.get("/api/runs/")).json()["runs"] == []


async def test_a_body_above_one_mebibyte_is_too_large(tenant: Any) -> None:
    answer = await tenant.operator.post("/api/runs/", content=b'{"input_text":"' + b"x" * (1 << 20) + b'"}')
    assert (answer.status_code, answer.json()["type"]) == (413, "urn:plimsoll:problem:body-too-large")


async def test_a_chunked_body_above_one_mebibyte_is_too_large(tenant: Any) -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b"x" * 65_536

    answer = await tenant.operator.post("/api/runs/", content=chunks())
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("path", "status", "names"),
    [
        ("/api/runs/?limit=0", 422, "limit"),
        ("/api/runs/?limit=many", 422, "limit"),
        ("/api/runs/?status=SLEEPING", 422, "status"),
        ("/api/runs/?workspace_id=7", 422, "workspace_id"),
        ("/api/runs/?parent_run_id=7", 422, "parent_run_id"),
        ("/api/runs/?cursor=%21%21", 422, "cursor"),
        ("/api/runs/?status=%ff", 400, "query"),
        ("/api/runs/RUN/snapshot/?since_seq=-1", 422, "since_seq"),
        ("/api/runs/RUN/snapshot/?since_seq=1e3", 422, "since_seq"),
        ("/api/runs/RUN/snapshot/?since_seq=99999999999999999999", 422, "since_seq"),
        ("/api/runs/RUN/snapshot/?wait=31", 422, "wait"),
        ("/api/runs/RUN/snapshot/?wait=nan", 422, "wait"),
        ("/api/nothing/", 404, "no such path"),
    ],
)
async def test_a_bad_query_is_refused_by_name(tenant: Any, path: str, status: int, names: str) -> None:
    run_id = (await tenant.create())["run_id"]
    answer = await tenant.operator.get(path.replace("RUN", run_id))
    assert (answer.status_code, names in answer.json()["error"]) == (status, True), answer.text


async def test_another_method_is_not_allowed_and_all_that_are_are_named(tenant: Any) -> None:
    answer = await tenant.operator.delete("/api/runs/")
    assert (answer.status_code, answer.json()["type"]) == (405, "urn:plimsoll:problem:method-not-allowed")
    assert answer.headers["allow"] == "GET, HEAD, POST"


@pytest.mark.parametrize("sent", [b"", b'{"input_text":'], ids=["nothing", "a part"])
@pytest.mark.parametrize("action", ["spawn_subrun", "cancel"])
async def test_a_request_whose_body_never_came_does_nothing(tenant: Any, action: str, sent: bytes) -> None:
    run_id = (await tenant.create(expected_subruns=1))["run_id"]
    url = httpx.URL(tenant.url)
    _, writer = await asyncio.open_connection(url.host, url.port)
    head = (
        f"POST /api/runs/{run_id}/{action}/ HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {tenant.tokens['OPERATOR']}\r\nContent-Length: 60\r\n\r\n"
    )
    writer.write(head.encode() + sent)
    await writer.drain()
    await asyncio.sleep(0.1)  # the request is being read
    writer.close()
    await asyncio.sleep(0.3)
    run = (await tenant.snapshot(run_id))["run"]
    assert (run["status"], run["spawned_subruns"]) == ("PENDING", 0)


async def test_metadata_of_any_depth_is_kept_or_refused(tenant: Any) -> None:
    ids = f'"workspace_id":"{tenant.workspace_id}","agent_id":"{tenant.agent_id}"'
    for depth in range(965, 985):  # where reading a part of the body meets the recursion limit and the whole does not
        nested = "[" * depth + '"\\\\u0000"' + "]" * depth
        answer = await tenant.operator.post("/api/runs/", content=f'{{{ids},"metadata":{{"a":{nested}}}}}')
        assert answer.status_code in (200, 400, 429), (depth, answer.text)


async def test_metadata_comes_back_as_it_was_written_and_no_longer(tenant: Any) -> None:
    ids = f'"workspace_id":"{tenant.workspace_id}","agent_id":"{tenant.agent_id}"'
    numbers = ",".join(["1e131071"] * 9000)  # written out, more than PostgreSQL puts into one text
    created = await tenant.operator.post("/api/runs/", content=f'{{{ids},"metadata":{{"a":[{numbers}]}}}}')
    for path in ("", "snapshot/"):
        answer = await tenant.operator.get(f"/api/runs/{created.json()['run_id']}/{path}")
        assert (answer.status_code, len(answer.content) < 100_000, numbers in answer.text) == (200, True, True)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Basic abc", "Bearer plim_unknown", "Bearer \u00e4"])
async def test_without_a_good_token_everything_is_401(url: str, header: str | None) -> None:
    headers = [] if header is None else [(b"authorization", header.encode("utf-8"))]
    async with httpx.AsyncClient(base_url=url) as client:
        for method, path in (("POST", "/api/runs/"), ("GET", "/api/runs/"), ("POST", "/api/workspaces/")):
            answer = await client.request(method, path, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer realm="plimsoll"')
            assert answer.json()["error"]


async def test_every_answer_carries_server_timing(tenant: Any) -> None:
    run_id = (await tenant.create())["run_id"]
    for path in ("/livez", "/readyz", "/metrics", f"/api/runs/{run_id}/snapshot/", "/api/nothing/", "/api/runs/x/"):
        timing = (await tenant.operator.get(path)).headers["server-timing"]
        assert [part.split(";")[0] for part in timing.split(", ")] == ["auth", "quota", "db", "publish", "app"], path


async def test_a_refused_body_costs_no_quota(tenant: Any) -> None:
    bad = {"workspace_id": str(tenant.workspace_id), "agent_id": str(tenant.agent_id), "metadata": [1]}
    answers = [(await tenant.operator.post("/api/runs/", json=bad)).status_code for _ in range(30)]
    assert set(answers) == {422}


async def test_a_head_without_an_end_is_cut_off(url: str) -> None:
    host, port = httpx.URL(url).host, httpx.URL(url).port
    reader, writer = await asyncio.open_connection(host, port)
    told = b""
    with contextlib.suppress(ConnectionError):  # what is still on its way when the service closes is met with a reset
        writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\n")
        for _ in range(8):
            writer.write(b"x-long: " + b"y" * 65_536 + b"\r\n")
            await writer.drain()
        told = await asyncio.wait_for(reader.read(), 10)
    assert told == b"" or told.startswith(b"HTTP/1.1 400 ")
    with contextlib.suppress(ConnectionError):
        writer.close()
        await writer.wait_closed()


async def test_a_large_body_in_one_piece_is_no_large_head(tenant: Any) -> None:
    body = {"workspace_id": str(tenant.workspace_id), "agent_id": str(tenant.agent_id), "input_text": "x" * 900_000}
    for _ in range(2):
        assert (await tenant.operator.post("/api/runs/", json=body)).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nbad name: x\r\n\r\n",
        b"POST /api/runs/ HTTP/1.1\r\nhost: a\r\ncontent-length: many\r\n\r\n",
    ],
)
async def test_bytes_that_are_no_http_are_refused_as_everything_else_is(url: str, sent: bytes) -> None:
    where = httpx.URL(url)
    reader, writer = await asyncio.open_connection(where.host, where.port)
    writer.write(sent)
    answer = await reader.read()  # until the service closes
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    fields = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:])
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert (fields["content-type"], int(fields["content-length"])) == ("application/problem+json", len(body))
    assert json.loads(body) == {
        "type": "urn:plimsoll:problem:malformed",
        "title": "Malformed request",
        "status": 400,
        "detail": "Invalid HTTP request received",
        "instance": "",
        "error": "Invalid HTTP request received",
    }
    assert (fields["connection"], "server-timing" in fields) == ("close", True)
