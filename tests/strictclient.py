"""An HTTP client that forgives nothing: what it has sent must be answered, and it sends nothing twice.

It keeps its connection as long as it may. A connection that the server has closed between two requests, or whose last
answer said `Connection: close`, is opened anew: that is how HTTP says goodbye. Anything else (a refused connection, a
reset, an end before the answer) is a fault, told as an exception.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Reply(NamedTuple):
    """An answer, read to its end."""

    status: int
    fields: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        """Return what the body holds."""
        return json.loads(self.body)

    @property
    def is_last(self) -> bool:
        """Whether the server closes the connection after it."""
        return self.fields.get("connection", "").lower() == "close"


class StrictClient:
    """One connection to the service, opened when it is needed."""

    def __init__(self, url: str, token: str | None = None) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._token = token
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.connections = 0
        """How many it has opened."""

    async def send(self, method: str, path: str, body: Any = None) -> Reply:
        """Send one request and return its answer; raises OSError or EOFError when there is none."""
        content = b"" if body is None else json.dumps(body).encode()
        await self.begin(method, path, len(content))
        self.write(content)
        return await self.reply()

    async def begin(self, method: str, path: str, size_bytes: int) -> None:
        """Send the head of a request."""
        if self._reader is None or self._reader.at_eof():
            self.close()
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
            self.connections += 1
        fields = {"host": f"{self._host}:{self._port}", "content-length": str(size_bytes)}
        if self._token is not None:
            fields["authorization"] = f"Bearer {self._token}"
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode())

    def write(self, piece: bytes) -> None:
        """Send bytes as they are."""
        assert self._writer is not None
        self._writer.write(piece)

    async def reply(self) -> Reply:
        """Return the next answer."""
        assert self._reader is not None
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status_line, *lines = head.rstrip().split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status = int(status_line.split(" ", 2)[1])
        size_bytes = 0 if status == 304 else int(fields["content-length"])
        reply = Reply(status, fields, await self._reader.readexactly(size_bytes))
        if reply.is_last:
            self.close()
        return reply

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None
