"""The bare framework: what Starlette under uvicorn costs when there is no service in it.

The same event loop, parser and settings as the service; a POST that decodes a typed body and answers JSON, a GET that
encodes a document of a snapshot's size, and a GET that answers a small one. No caller is named, nothing is stored,
nothing is timed. Run as a process of its own: `python -m harness.bench.bare_app` reads the snapshot's document from
standard input, prints `url: …` and serves until SIGTERM.
"""

from __future__ import annotations

import signal
import socket
import sys
import uuid

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

POST_PATH = "/api/runs/"
LARGE_PATH = "/large/"
SMALL_PATH = "/small/"


class Body(msgspec.Struct):
    """The body of a create, as far as the harness sends it."""

    workspace_id: uuid.UUID
    agent_id: uuid.UUID
    input_text: str | None = None
    channel: str | None = None


def bare_app(large: object) -> Starlette:
    """Build the application; `large` is the document of the larger GET."""
    decoder = msgspec.json.Decoder(Body)
    small = {"run_id": str(uuid.uuid4()), "status": "PENDING"}

    def answer(document: object) -> Response:
        return Response(msgspec.json.encode(document), media_type="application/json")

    async def create(request: Request) -> Response:
        body = decoder.decode(await request.body())
        return answer(
            {
                "run_id": uuid.uuid4(),
                "status": "PENDING",
                "workspace_id": body.workspace_id,
                "agent_id": body.agent_id,
                "correlation_id": uuid.uuid4(),
            }
        )

    async def read_large(_: Request) -> Response:
        return answer(large)

    async def read_small(_: Request) -> Response:
        return answer(small)

    return Starlette(
        routes=[
            Route(POST_PATH, create, methods=["POST"]),
            Route(LARGE_PATH, read_large),
            Route(SMALL_PATH, read_small),
        ]
    )


def main() -> int:
    """Serve until told to stop."""
    app = bare_app(msgspec.json.decode(sys.stdin.buffer.read()))
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
    )
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    for number in (signal.SIGTERM, signal.SIGINT):  # the server takes them while it runs and raises them again after
        signal.signal(number, lambda *_: None)
    sys.stdout.write(f"url: http://127.0.0.1:{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    uvicorn.Server(config).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
