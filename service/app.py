"""The Starlette application: its life, its one layer of middleware, and the whole route table.

A request enters here: `Boundary` makes the trailing slash optional, the table below finds the `Operation`, which
names the caller, reads the body, and calls the endpoint in `api/`.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
import structlog
from redis.exceptions import RedisError
from sqlalchemy import TextClause
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service.announce import Announcer
from service.api.archives import Archives
from service.api.openapi import Description
from service.api.operations import Operations
from service.api.quotas import QuotaPages
from service.api.runs import CreateBody, ReasonBody, Runs, SpawnBody
from service.api.sight import READ as READ_RUNS
from service.api.sight import Sight
from service.api.snapshot import Snapshots, Views
from service.api.tickets import TicketBody, TicketOffice
from service.api.toolcalls import ToolBody, ToolCalls
from service.api.workspaces import AgentBody, TokenBody, WorkspaceBody, WorkspacePatch, Workspaces
from service.archive import Folder
from service.auth import READ_TOKENS, Caller, Callers, Role
from service.commits import WARM_UP as WRITES
from service.commits import Commits
from service.conduct import calm_collector
from service.db import Database
from service.doorbell import Doorbell
from service.errors import ApiError, Malformed, MethodNotAllowed, NotFound
from service.events import Following
from service.exchange import NO_TIME, Endpoint, Operation, refusal
from service.guarded import connect_redis
from service.quota.gate import Gate
from service.quota.inforce import READ as READ_WORKSPACES
from service.quota.inforce import Quotas
from service.quota.keeper import Keeper
from service.quota.local import LocalBuckets
from service.quota.rates import Rates
from service.quota.recalibration_counts import RequestTally
from service.quota.shadow import ShadowTally
from service.quota.socket_leases import Leases
from service.quota.usage import Usage
from service.settings import Settings
from service.stream.admission import Admission
from service.stream.commands import Commands
from service.stream.history import History
from service.stream.hub import Hub
from service.stream.sockets import Sockets
from service.stream.timing import USUAL, Timing
from service.telemetry import configure_logging
from service.tickets import Tickets
from service.workspaces import READ_AGENTS, Agents

log = structlog.get_logger()

NOBODY: dict[str, Any] = {"ids": []}
LOOK_UPS: list[tuple[TextClause, dict[str, Any]]] = [
    (READ_TOKENS, {"digests": [], "now": dt.datetime.now(dt.UTC)}),
    (READ_WORKSPACES, NOBODY),
    (READ_AGENTS, NOBODY),
    (READ_RUNS, NOBODY),
]
"""What a request asks before it reads or writes, for nobody: to be prepared before the first one."""


def create_app(settings: Settings, timing: Timing = USUAL) -> Starlette:
    """Build the application; connections are opened when it starts and closed when it stops."""
    database = Database(settings.database_url)
    client = connect_redis(settings.redis_url)
    announcer = Announcer(client, Doorbell(settings.redis_url))
    callers, sight, following = Callers(database), Sight(database), Following(settings.redis_url)
    quotas, rates = Quotas(database), Rates(client, LocalBuckets(settings.redis_away_rate_percent))
    tally = ShadowTally(database)
    requests = RequestTally(database)
    gate = Gate(rates, client, tally, requests)
    commits = Commits(database, announcer, tally)
    runs = Runs(database, commits, gate, quotas, sight, announcer, Agents())
    views = Views(database)
    snapshots = Snapshots(views, gate, quotas, sight, following)
    quota_pages = QuotaPages(database, quotas, Usage(database, client))
    workspaces = Workspaces(database, settings)
    tool_calls = ToolCalls(database, quotas, announcer)
    operations = Operations(database, client)
    archives = Archives(database, Folder(settings.archive_dir))
    description = Description(lambda: table)
    tickets = Tickets(client)
    office = TicketOffice(tickets)
    history = History(database)
    hub = Hub(following, history, timing.look_every_s)
    keeper = Keeper(Leases(client, timing.lease_s), quotas.of, timing.renew_every_s, tally)

    operations_by_route: dict[tuple[str, str], Operation] = {}

    def route(
        method: str,
        path: str,
        endpoint: Endpoint,
        role: Role | None,
        body: type | None = None,
        *,
        installation: bool = False,
    ) -> Route:
        operation = Operation(path, endpoint, callers, role, body, installation=installation)
        operations_by_route[method, path] = operation
        return Route(path, operation, methods=[method])

    def administration(method: str, path: str, endpoint: Endpoint, body: type) -> Route:
        return route(method, path, endpoint, Role.ADMIN, body, installation=True)

    async def find_run(caller: Caller, run_id: uuid.UUID) -> uuid.UUID:
        return (await sight.find(caller, run_id)).workspace_id

    # The busiest first: the table is searched from the top.
    table = [
        route("GET", "/api/runs/{run_id}/snapshot/", snapshots.get, Role.VIEWER),
        route("POST", "/api/runs/", runs.create, Role.OPERATOR, CreateBody),
        route("POST", "/api/runs/{run_id}/spawn_subrun/", runs.spawn, Role.OPERATOR, SpawnBody),
        route("GET", "/api/runs/", runs.list, Role.VIEWER),
        route("GET", "/api/runs/{run_id}/", runs.get, Role.VIEWER),
        route("POST", "/api/runs/{run_id}/cancel/", runs.cancel, Role.OPERATOR, ReasonBody),
        route("POST", "/api/runs/{run_id}/pause/", runs.pause, Role.OPERATOR, ReasonBody),
        route("POST", "/api/runs/{run_id}/resume/", runs.resume, Role.OPERATOR, ReasonBody),
        route("GET", "/api/toolcalls/", tool_calls.list, Role.VIEWER),
        route("POST", "/api/toolcalls/{tool_call_id}/approve/", tool_calls.approve, Role.OPERATOR, ReasonBody),
        route("POST", "/api/toolcalls/{tool_call_id}/reject/", tool_calls.reject, Role.OPERATOR, ReasonBody),
        route("GET", "/api/workspaces/{workspace_id}/tools/", tool_calls.list_tools, Role.VIEWER),
        administration("POST", "/api/workspaces/{workspace_id}/tools/", tool_calls.create_tool, ToolBody),
        route("GET", "/api/runs/{run_id}/archives/", archives.list, Role.VIEWER),
        route("GET", "/api/archives/{archive_id}/download/", archives.download, Role.VIEWER),
        route("POST", "/api/ws-tickets/", office.issue, Role.VIEWER, TicketBody),
        route("GET", "/api/workspaces/{workspace_id}/quotas/", quota_pages.workspace, Role.VIEWER),
        route("GET", "/api/quota-revisions/", quota_pages.list, Role.VIEWER),
        route("GET", "/api/quota-revisions/{revision}/", quota_pages.revision, Role.VIEWER),
        administration("POST", "/api/workspaces/", workspaces.create, WorkspaceBody),
        administration("PATCH", "/api/workspaces/{workspace_id}/", workspaces.patch, WorkspacePatch),
        administration("POST", "/api/workspaces/{workspace_id}/agents/", workspaces.create_agent, AgentBody),
        administration("POST", "/api/workspaces/{workspace_id}/tokens/", workspaces.create_token, TokenBody),
        route("GET", "/", description.index, None),
        route("GET", "/livez", operations.livez, None),
        route("GET", "/readyz", operations.readyz, None),
        route("GET", "/metrics", operations.metrics, None),
        route("GET", "/openapi.json", description.openapi, None),
        route("GET", "/docs", description.docs, None),
    ]

    commands = Commands(operations_by_route)
    admission = Admission(callers, tickets, quotas, settings.allowed_origins)
    sockets = Sockets(admission, callers, find_run, keeper, hub, history, commands, timing)
    streams: list[BaseRoute] = [
        WebSocketRoute("/ws/runs/{run_id}/", sockets.run),
        WebSocketRoute("/ws/workspaces/{workspace_id}/", sockets.workspace),
    ]

    @asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        configure_logging(settings.log_level)
        await _warm(database, rates, views)
        async with AsyncExitStack() as ends:  # each is reached, whatever the ones before raised; the last comes first
            ends.enter_context(calm_collector())
            for end in (
                database.close, views.close, client.aclose, following.close, hub.close, tally.close, keeper.close,
                requests.close, gate.drain, commits.drain,
            ):  # fmt: skip
                ends.push_async_callback(end)
            yield

    app = Application(routes=[*table, *streams], lifespan=life)
    app.router.redirect_slashes = False

    def let_go() -> None:  # `server.Server` calls it when the process is asked to stop
        following.let_go()
        sockets.let_go()

    app.state.let_go = let_go
    return app


async def _warm(database: Database, rates: Rates, views: Views) -> None:
    """Pay before the first request for what it would wait for; a dependency that is away is met later."""
    try:
        await database.warm([*WRITES, *LOOK_UPS])
        await views.warm()
        await rates.warm()
    except* (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, RedisError, OSError) as faults:
        log.warning("started cold: a dependency does not answer yet", fault=str(faults.exceptions[0]))


class Application(Starlette):
    """Starlette with one layer around its router instead of three.

    An `Operation` answers every error by itself, so nothing is left to catch but what the table refuses. The layers
    that would catch it cost as much as naming the caller (docs/performance.md).
    """

    def build_middleware_stack(self) -> ASGIApp:
        """Put the boundary around the router, and nothing else."""
        return Boundary(self.router)


class Boundary:
    """Makes the trailing slash optional below /api/ and /ws/ without a redirect, and answers what the table lacks.

    A redirect is no 200.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on under its canonical path."""
        if scope["type"] in ("http", "websocket"):
            path = scope["path"]
            if path.startswith(("/api/", "/ws/")):
                if not path.endswith("/"):
                    scope = {**scope, "path": path + "/"}
            elif path.endswith("/") and path != "/":
                scope = {**scope, "path": path.rstrip("/")}
        try:
            await self._app(scope, receive, send)
        except HTTPException as refused:  # by the table, before any answer has begun
            await _no_route(scope, refused)(scope, receive, send)


def _no_route(scope: Scope, refused: HTTPException) -> Response:
    """Answer what the table does not hold."""
    known: ApiError
    if refused.status_code == 404:
        known = NotFound("no such path")
    elif refused.status_code == 405:
        known = MethodNotAllowed(f"{scope['method']} is not allowed here")
    else:
        known = Malformed("the request cannot be routed")
    answer = refusal(known, scope)
    headers = {name.lower(): value for name, value in (refused.headers or {}).items()}
    if refused.status_code == 405:  # the route that refused knows its own method only
        headers["allow"] = ", ".join(sorted(_methods_of(scope)))
    headers["server-timing"] = NO_TIME
    return Response(answer.body, answer.status, headers, answer.content_type.decode())


def _methods_of(scope: Scope) -> set[str]:
    """Return every method that the table has for a request's path (RFC 9110, section 15.5.6)."""
    routes = [route for route in scope["app"].routes if isinstance(route, Route)]
    return {method for route in routes if route.matches(scope)[0] is not Match.NONE for method in route.methods or ()}
