"""Who may open a socket: every close code, tickets, origins, caps, and rights that end while a socket is open."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
import redis.asyncio
from sqlalchemy import text
from websockets.exceptions import ConnectionClosed

from service.auth import issue_token, revoke_token
from service.db import Database
from service.errors import Unauthenticated, Unavailable
from service.stream.admission import may_open
from service.tickets import TICKET_S, Tickets
from tests.service.stream.conftest import NewTenant, Tenant
from tests.sockets import Client, Writer, open_socket


async def closed(url: str, path: str, token: str | None = None, **options: Any) -> tuple[int, str]:
    """Open a socket and return how the service closes it."""
    async with open_socket(url, path, token, **options) as client:
        return await client.closed()


async def works(client: Client) -> bool:
    """Tell whether a socket answers."""
    return str((await client.answer("ping"))["type"]) == "ping_ack"


async def enters(client: Client) -> int | str:
    """Return "in" once a first push has come, or the code with which the service closes the socket."""
    try:
        await client.frame()
    except ConnectionClosed as end:
        return end.rcvd.code if end.rcvd else 0
    return "in"


async def test_without_a_token_in_force_a_socket_is_closed_with_4401(
    tenant: Tenant, url: str, database: Database
) -> None:
    path = f"/ws/runs/{await tenant.create()}/"
    async with database.begin() as connection:
        revoked = (await issue_token(connection, tenant.workspace_id, "OWNER")).token
        await revoke_token(connection, revoked)
    unknown = (4401, "the token is unknown, expired or revoked")
    assert await closed(url, path) == (
        4401,
        "send an Authorization header, or a ticket from POST /api/ws-tickets/",
    )
    assert await closed(url, path, "plim_unknown") == unknown
    assert await closed(url, path, revoked) == unknown
    assert await closed(url, f"{path}?ticket=unknown") == (4401, "the ticket is unknown, used or expired")
    assert await closed(url, f"/ws/workspaces/{tenant.workspace_id}/") == await closed(url, path)


async def test_a_run_that_is_absent_or_anothers_is_closed_with_4404_alike(
    new_tenant: NewTenant, tenant: Tenant, url: str
) -> None:
    foreign = await (await new_tenant()).create()
    paths = [f"/ws/runs/{run_id}/" for run_id in (foreign, uuid.uuid4(), "no-uuid")]
    told = [await closed(url, path, tenant.token) for path in paths]
    assert told[0] == told[1] == (4404, "no such run")
    assert told[2][0] == 4404


async def test_a_workspace_that_is_absent_or_anothers_is_closed_with_4403_alike(
    new_tenant: NewTenant, tenant: Tenant, url: str
) -> None:
    foreign = (await new_tenant()).workspace_id
    paths = [f"/ws/workspaces/{workspace_id}/" for workspace_id in (foreign, uuid.uuid4(), "no-uuid")]
    told = [await closed(url, path, tenant.token) for path in paths]
    assert told[0] == told[1] == (4403, "no such workspace")
    assert told[2][0] == 4403


@pytest.mark.parametrize("since_seq", ["-1", "one", "1.5", "99999999999", ""])
async def test_a_since_seq_that_is_no_number_is_closed_with_4400(tenant: Tenant, url: str, since_seq: str) -> None:
    path = f"/ws/runs/{await tenant.create()}/?since_seq={since_seq}"
    assert await closed(url, path, tenant.token) == (4400, "since_seq: give a whole number from 0 to 2147483647")


async def test_an_installation_token_may_follow_any_workspace(tenant: Tenant, url: str, database: Database) -> None:
    async with database.begin() as connection:
        token = (await issue_token(connection, None, "VIEWER")).token
    async with open_socket(url, f"/ws/workspaces/{tenant.workspace_id}/", token) as client:
        assert await works(client)
    assert (await closed(url, f"/ws/workspaces/{uuid.uuid4()}/", token))[0] == 4403


async def test_a_ticket_opens_one_socket(tenant: Tenant, url: str) -> None:
    path = f"/ws/runs/{await tenant.create()}/?ticket={await tenant.ticket()}"
    async with open_socket(url, path) as client:
        assert await works(client)
    assert await closed(url, path) == (4401, "the ticket is unknown, used or expired")


async def test_of_many_who_use_a_ticket_at_once_one_gets_in(tenant: Tenant, url: str) -> None:
    path = f"/ws/runs/{await tenant.create()}/?ticket={await tenant.ticket()}"

    async def try_it() -> int | str:
        async with open_socket(url, path) as client:
            return await enters(client)

    outcomes = await asyncio.gather(*(try_it() for _ in range(8)))
    assert (outcomes.count("in"), outcomes.count(4401)) == (1, 7)


async def test_a_ticket_carries_its_tokens_rights_and_no_more(
    new_tenant: NewTenant, tenant: Tenant, url: str, database: Database
) -> None:
    foreign = await (await new_tenant()).create()
    assert (await closed(url, f"/ws/runs/{foreign}/?ticket={await tenant.ticket()}"))[0] == 4404
    run_id = await tenant.create()
    async with open_socket(url, f"/ws/runs/{run_id}/?ticket={await tenant.ticket('VIEWER')}") as client:
        assert (await client.answer("cancel_run"))["code"] == "role-too-low"
    ticket = await tenant.ticket("ADMIN")
    async with database.begin() as connection:
        await revoke_token(connection, tenant.tokens["ADMIN"])
    assert await closed(url, f"/ws/runs/{run_id}/?ticket={ticket}") == (4401, "the token is expired or revoked")


async def test_a_ticket_needs_a_token_and_is_told_how_long_it_lasts(tenant: Tenant, url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as nobody:
        assert (await nobody.post("/api/ws-tickets/")).status_code == 401
    answer = await tenant.http.post("/api/ws-tickets/", json={})
    assert answer.json() == {"ticket": answer.json()["ticket"], "expires_in_s": TICKET_S}
    assert answer.headers["cache-control"] == "no-store"
    assert (await tenant.http.post("/api/ws-tickets/", json={"for": "ever"})).status_code == 422


async def test_redis_keeps_no_ticket_in_clear_and_forgets_it_in_time(redis_url: str) -> None:
    async with redis.asyncio.from_url(redis_url, decode_responses=True) as client:
        tickets, token_id = Tickets(client), uuid.uuid4()
        ticket = await tickets.issue(token_id)
        keys = [key async for key in client.scan_iter("plimsoll:ticket:*")]
        assert not any(ticket in key for key in keys)
        assert all([0 < await client.ttl(key) <= TICKET_S for key in keys])
        assert await tickets.redeem(ticket) == token_id
        with pytest.raises(Unauthenticated):
            await tickets.redeem(ticket)


async def test_without_redis_there_are_no_tickets() -> None:
    async with redis.asyncio.from_url("redis://127.0.0.1:1") as nowhere:
        with pytest.raises(Unavailable):
            await Tickets(nowhere).issue(uuid.uuid4())
        with pytest.raises(Unavailable):
            await Tickets(nowhere).redeem("any")


ALLOWED = frozenset({"https://app.example.com", "http://localhost:3000"})


@pytest.mark.parametrize(
    ("origin", "host", "may", "why"),
    [
        ("https://plimsoll.example", "plimsoll.example", True, "a page of ours, behind a proxy that ends TLS"),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", True, "a page of ours, with its port"),
        ("https://plimsoll.example", "plimsoll.example:443", True, "the default port may be named"),
        ("HTTPS://Plimsoll.Example", "plimsoll.example", True, "hosts have no case"),
        ("https://app.example.com", "plimsoll.example", True, "listed"),
        ("HTTP://LOCALHOST:3000", "plimsoll.example", True, "listed, whatever its case"),
        ("http://app.example.com", "plimsoll.example", False, "listed with another scheme"),
        ("http://127.0.0.1:8001", "127.0.0.1:8000", False, "another port is another origin"),
        ("https://plimsoll.example.evil.test", "plimsoll.example", False, "begins like ours"),
        ("https://evil.test", "plimsoll.example", False, "somebody else's"),
        ("null", "plimsoll.example", False, "a page without an origin"),
        ("", "", False, "nothing"),
        ("https://", "", False, "no host"),
        ("https://[", "plimsoll.example", False, "no origin at all"),
        ("file://plimsoll.example", "plimsoll.example", False, "a scheme of no page of ours"),
    ],
)
def test_pages_of_ours_and_of_listed_origins_may_open_sockets(origin: str, host: str, may: bool, why: str) -> None:
    assert may_open(origin, host, ALLOWED) is may, why


async def test_a_page_of_a_foreign_origin_is_closed_with_4403_before_its_token_is_looked_at(
    tenant: Tenant, url: str
) -> None:
    path = f"/ws/runs/{await tenant.create()}/"
    foreign = (4403, "pages of this origin may not open sockets here")
    assert await closed(url, path, tenant.token, origin="https://evil.test") == foreign
    assert await closed(url, path, origin="https://evil.test") == foreign
    for origin in (url, "https://app.example.com"):
        async with open_socket(url, path, tenant.token, origin=origin) as client:
            assert await works(client)


async def test_a_token_may_open_five_sockets_and_a_workspace_twenty(new_tenant: NewTenant, url: str) -> None:
    tenant = await new_tenant()
    path = f"/ws/runs/{await tenant.create()}/"
    async with AsyncExitStack() as stack:
        mine = [await stack.enter_async_context(open_socket(url, path, tenant.token)) for _ in range(5)]
        assert all([await works(client) for client in mine])
        code, reason = await closed(url, path, tenant.token)
        assert (code, reason.partition(";")[0]) == (
            4429,
            "Workspace quota exceeded for websockets_per_user (5 of 5 open)",
        )
        for role in ("VIEWER", "ADMIN", "OWNER"):
            for _ in range(5):
                others = await stack.enter_async_context(open_socket(url, path, tenant.tokens[role]))
                assert await works(others)
        assert (await closed(url, f"{path}?ticket={await tenant.ticket()}"))[0] == 4429
        await mine[0].connection.close()
        again = await stack.enter_async_context(open_socket(url, path, tenant.token))
        assert await works(again)


async def test_of_many_who_open_at_once_never_more_than_the_cap_are_in(new_tenant: NewTenant, url: str) -> None:
    tenant = await new_tenant()
    path = f"/ws/runs/{await tenant.create()}/"
    inside, most_inside, outside = 0, 0, 0
    all_others_refused = asyncio.Event()

    async def try_it() -> int | str:
        nonlocal inside, most_inside, outside
        async with open_socket(url, path, tenant.token) as client:
            outcome = await enters(client)
            if outcome == "in":
                inside += 1
                most_inside = max(most_inside, inside)
                await all_others_refused.wait()
                inside -= 1
            else:
                outside += 1
                if outside == 25:
                    all_others_refused.set()
            return outcome

    outcomes = await asyncio.gather(*(try_it() for _ in range(30)))
    assert (most_inside, outcomes.count("in"), outcomes.count(4429)) == (5, 5, 25)


async def test_the_caps_are_lifted_for_calibration(tenant: Tenant, url: str) -> None:
    path = f"/ws/runs/{await tenant.create()}/"
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(open_socket(url, path, tenant.token)) for _ in range(25)]
        assert all([await works(client) for client in clients])


async def test_a_revocation_closes_open_sockets_with_4401(tenant: Tenant, url: str, database: Database) -> None:
    path = f"/ws/runs/{await tenant.create()}/"
    async with open_socket(url, path, tenant.token) as client:
        assert await works(client)
        async with database.begin() as connection:
            await revoke_token(connection, tenant.token)
        assert await client.closed() == (4401, "the token is expired or revoked")


async def test_a_token_that_expires_closes_its_sockets_at_that_instant(
    tenant: Tenant, url: str, database: Database
) -> None:
    async with database.begin() as connection:
        token = (await issue_token(connection, tenant.workspace_id, "VIEWER", expires_days=1.0 / 86_400)).token
    async with open_socket(url, f"/ws/workspaces/{tenant.workspace_id}/", token) as client:
        assert await works(client)
        assert await client.closed() == (4401, "the token is expired or revoked")
    async with database.read() as connection:
        found = await connection.execute(text("SELECT max(expires_at) FROM tokens"))
        assert dt.datetime.now(dt.UTC) >= found.scalar_one()


async def test_a_role_that_changes_is_in_force_at_the_next_commands(
    tenant: Tenant, url: str, database: Database, writer: Writer
) -> None:
    run_id = await tenant.create()
    async with open_socket(url, f"/ws/runs/{run_id}/", tenant.token) as client:
        async with database.begin() as connection:
            await connection.execute(
                text("UPDATE tokens SET role = 'VIEWER' WHERE workspace_id = :w"), {"w": tenant.workspace_id}
            )
        answer = await client.answer("spawn_subrun")
        while answer["type"] == "spawn_subrun_ack":  # what was read of a token is trusted for a second
            answer = await client.answer("spawn_subrun")
        assert answer["code"] == "role-too-low"
