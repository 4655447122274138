"""The life of a socket: accepted, admitted, followed and served by four tasks, closed by whichever ends first.

The tasks: *read* takes commands, one after the other; *write* empties the outbox; *pump* fills it from the database;
*guard* asks every half minute whether the token is still in force. Nothing one socket does can hold up another: what is
pushed live never waits (`outbox`), and a write that makes no progress for some seconds, or a client that does not keep
up, ends this socket alone. The intervals are in `timing`.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from redis.exceptions import RedisError
from starlette.websockets import WebSocket, WebSocketDisconnect

from service.auth import Caller, Callers
from service.db import is_outage
from service.errors import ApiError, Invalid, Malformed, Unauthenticated, Unavailable
from service.quota.keeper import Keeper
from service.quota.socket_leases import Full, Lease
from service.stream.admission import Admission, Code, Place, Refused, refusal_of, since_seq
from service.stream.admission import path_id as path_id_of
from service.stream.commands import Commands, Request, parse, refused
from service.stream.frames import ack
from service.stream.history import Compacted, History
from service.stream.hub import Hub
from service.stream.outbox import Outbox
from service.stream.tails import Overflow, RunTail, WorkspaceTail
from service.stream.timing import Timing
from service.telemetry import FRAMES_SENT, OPEN_SOCKETS, SLOW_CLIENTS_EVICTED, SOCKETS_ENDED

log = structlog.get_logger()

RETRY_S = 1.0
"""Pause before the database is tried again, seconds."""

FindRun = Callable[[Caller, uuid.UUID], Awaitable[uuid.UUID]]
"""Returns the workspace of a run that the caller may see; raises NotFound."""


class Sockets:
    """The endpoints of the two streams."""

    def __init__(
        self,
        admission: Admission,
        callers: Callers,
        find_run: FindRun,
        keeper: Keeper,
        hub: Hub,
        history: History,
        commands: Commands,
        timing: Timing,
    ) -> None:
        self.admission = admission
        self.callers = callers
        self.find_run = find_run
        self.keeper = keeper
        self.hub = hub
        self.history = history
        self.commands = commands
        self.timing = timing
        self.leaving = False  # the process is about to end: nobody should stay
        self._served: set[Socket] = set()

    def let_go(self) -> None:
        """Close every socket, once its command is answered: the process is about to end."""
        self.leaving = True
        for socket in list(self._served):
            socket.leave()

    async def run(self, websocket: WebSocket) -> None:
        """Follow one run: /ws/runs/<id>/?since_seq=N."""

        async def find(caller: Caller) -> Place:
            run_id = path_id_of(websocket, "run_id")
            return Place(await self.find_run(caller, run_id), run_id, since_seq(websocket))

        await self._open(websocket, "run", find, Code.NOT_FOUND)

    async def workspace(self, websocket: WebSocket) -> None:
        """Follow all runs of a workspace: /ws/workspaces/<id>/."""

        async def find(caller: Caller) -> Place:
            return await self.admission.workspace(websocket, caller)

        await self._open(websocket, "workspace", find, Code.FORBIDDEN)

    async def _open(
        self, websocket: WebSocket, stream: str, find: Callable[[Caller], Awaitable[Place]], absent: Code
    ) -> None:
        """Accept a socket, admit it or close it with the reason."""
        await websocket.accept()
        OPEN_SOCKETS.labels(stream).inc()
        end: Refused | None = None
        try:
            caller = await self.admission.caller(websocket)
            place = await find(caller)
            socket = Socket(self, websocket, caller, place)
            lease = Lease(uuid.uuid4().hex, place.workspace_id, caller.token_id)
            async with self.keeper.hold(lease, socket.lose_place):
                self._served.add(socket)
                try:
                    end = await socket.serve()
                finally:
                    self._served.discard(socket)
        except Exception as fault:
            end = refusal_of(fault, absent)
            if end is None:
                log.error("a socket failed", path=websocket.url.path, exc_info=fault)
                end = Refused(Code.FAULT, "the stream failed; the fault is logged")
        finally:
            OPEN_SOCKETS.labels(stream).dec()
        SOCKETS_ENDED.labels("client" if end is None else end.code).inc()
        if end is not None:
            await _close(websocket, end)


class Socket:
    """One admitted socket."""

    def __init__(self, sockets: Sockets, websocket: WebSocket, caller: Caller, place: Place) -> None:
        self._sockets = sockets
        self._websocket = websocket
        self._caller = caller
        self._place = place
        self._outbox = Outbox()
        self._end: asyncio.Future[Refused | None] = asyncio.get_running_loop().create_future()
        self._answering = False
        self._tail: RunTail | WorkspaceTail
        overflow = Overflow(sockets.timing.lag_patience_s, self._evict)
        if place.run_id is None:
            self._tail = WorkspaceTail(place.workspace_id, self._outbox, sockets.history, overflow)
        else:
            self._tail = RunTail(
                place.workspace_id, place.run_id, place.since_seq, self._outbox, sockets.history, overflow
            )

    async def serve(self) -> Refused | None:
        """Serve until the client goes (None) or is to be closed (why)."""
        with self._sockets.hub.attach(self._tail):
            work = [self._read(), self._write(), self._pump(), self._guard()]
            tasks = [asyncio.create_task(each) for each in work]
            for task in tasks:
                task.add_done_callback(self._note)
            if self._sockets.leaving:
                self.leave()
            try:
                return await self._end
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def lose_place(self, full: Full) -> None:
        """End: the socket's place lapsed while Redis was away, and others have filled the pool."""
        self._finish(Refused(Code.TOO_MANY, f"{full.limit}: the socket's place lapsed and all are taken; reconnect"))

    def leave(self) -> None:
        """End as soon as no command waits for its answer: the process is about to end."""
        if not self._answering:
            self._finish(Refused(Code.RESTART, "the service restarts; reconnect with since_seq"))

    def _evict(self) -> None:
        if not self._end.done():
            SLOW_CLIENTS_EVICTED.inc()
        self._finish(Refused(Code.TOO_SLOW, "the client is too slow; reconnect with since_seq"))

    def _finish(self, why: Refused | None) -> None:
        if not self._end.done():
            self._end.set_result(why)

    def _note(self, task: asyncio.Task[None]) -> None:
        """Let the first task that ends, end the socket."""
        if task.cancelled() or self._end.done():
            return
        fault = task.exception()
        if fault is None or isinstance(fault, WebSocketDisconnect):
            self._finish(None)
        else:
            self._end.set_exception(fault)

    async def _read(self) -> None:
        """Take commands until the client goes."""
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect" or self._end.done():  # what is begun now has no time to end
                return
            self._answering = True
            await self._outbox.put(await self._answer(message.get("text")))
            if self._sockets.leaving:
                await self._outbox.sent()
            self._answering = False
            if self._sockets.leaving:
                self.leave()

    async def _write(self) -> None:
        """Send what waits."""
        while True:
            frames = await self._outbox.take()
            try:
                async with asyncio.timeout(self._sockets.timing.send_patience_s):
                    for frame in frames:
                        await self._websocket.send_text(frame)
                self._outbox.note_sent()
            except TimeoutError:
                self._evict()
                return
            FRAMES_SENT.inc(len(frames))
            await asyncio.sleep(0)  # sending waits only for a full buffer: let others have their turn

    async def _pump(self) -> None:
        """Push what the database holds and the client has not seen; while it is away, wait."""
        while True:
            try:
                await self._tail.pump()
            except Compacted as gone:
                where = f"/api/runs/{self._place.run_id}/archives/"
                raise Refused(Code.COMPACTED, f"events up to {gone.through_seq} are archived: {where}") from None
            except Exception as fault:
                if not is_outage(fault):  # of an outage the hub tells, once for all sockets
                    raise
            await asyncio.sleep(RETRY_S)
            self._tail.doubt()

    async def _guard(self) -> None:
        """End the socket when its token is revoked or expires; while the database is away, nobody can tell."""
        while True:
            wait_s = self._sockets.timing.recheck_s
            if self._caller.expires_at is not None:
                left = (self._caller.expires_at - dt.datetime.now(dt.UTC)).total_seconds()
                wait_s = min(wait_s, max(left, 0.0) + 0.01)
            await asyncio.sleep(wait_s)
            try:
                self._caller = await self._sockets.callers.again(self._caller.token_id)
            except Exception as fault:
                if not is_outage(fault):
                    raise

    async def _answer(self, text: str | None) -> str:
        """Return the frame that answers a frame; raises Unauthenticated when the token is no longer in force."""
        request: Request | None = None
        try:
            request = parse(text)
            self._caller = await self._sockets.callers.again(self._caller.token_id)
            local = self._answer_here(request)
            if local is not None:
                return local
            return await self._sockets.commands.perform(self._caller, request, self._place.run_id)
        except Unauthenticated:
            raise
        except ApiError as refusal:
            return refused(request, refusal)
        except RecursionError:  # it could just be read, and an answer that repeats it cannot be written
            return refused(None, Malformed("the frame is nested too deeply"))
        except Exception as fault:
            if not is_outage(fault):
                raise
            return refused(request, Unavailable("a dependency does not answer; try again"))

    def _answer_here(self, request: Request) -> str | None:
        """Answer what concerns this socket alone; None for a command that is an operation."""
        data: dict[str, Any] = {}
        if request.cmd == "ping":
            data = request.fields
        elif request.cmd in ("subscribe_approvals", "unsubscribe_approvals"):
            if not isinstance(self._tail, WorkspaceTail):
                raise Invalid("cmd", f"{request.cmd} belongs to the stream of a workspace, /ws/workspaces/<id>/")
            self._tail.approvals = request.cmd == "subscribe_approvals"
        else:
            return None
        return ack(request.cmd, request.request_id, data)


async def _close(websocket: WebSocket, end: Refused) -> None:
    """Close a socket, unless its client has gone meanwhile."""
    reason = end.reason.encode()[:123].decode(errors="ignore")  # RFC 6455, section 5.5: a close frame holds 125 bytes
    try:
        await websocket.close(end.code, reason)
    except (WebSocketDisconnect, RuntimeError, OSError, RedisError) as gone:
        log.debug("a client went before it could be told why", code=end.code, fault=str(gone))
