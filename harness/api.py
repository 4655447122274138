"""Which requests the harness makes of the service, and what it reads in the answers: types, no decisions.

`Api` prepares a measurement (workspaces, agents, tokens: not part of the load, never a sample). `Workspace` holds the
bytes of the requests that are. Unknown fields of an answer are ignored, so a newer service can still be measured.
"""

from __future__ import annotations

import dataclasses
import datetime
from typing import Annotated, TypeVar

import msgspec

from harness.client import Client
from harness.connection import ERROR_CHARS_MAX, Exchange
from harness.errors import ServiceDeclined, ServiceUnreachable, TokenDeclined
from harness.sample import Outcome

FINAL_STATUSES = frozenset({"COMPLETED", "FAILED", "CANCELED"})
CHANNEL = "harness"  # shows in the service where a run came from
RUNS_PAGE = 100
REVISIONS_PAGE = 100
REVISION_PAGES_MAX = 10  # the one in force is seldom older than a few
TOKEN_EXPIRES_DAYS = 1  # the tokens of a measurement are of no use the day after

Answer = TypeVar("Answer", bound=msgspec.Struct)
# What the service names becomes part of the next request's first line or head, so it must not be able to end it.
Id = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.~-]{1,100}$")]
Token = Annotated[str, msgspec.Meta(pattern=r"^[!-~]{1,1000}$")]


class CreateAnswer(msgspec.Struct):
    """What `POST /api/runs/` answers."""

    run_id: Id


class SpawnAnswer(msgspec.Struct):
    """What `POST …/spawn_subrun/` answers."""

    child_run_id: Id


class RunView(msgspec.Struct):
    """A run as a snapshot shows it."""

    run_id: Id
    status: str
    created_at: datetime.datetime | None = None
    ended_at: datetime.datetime | None = None
    ticks: int | None = None
    step_count: int | None = None
    last_seq: int | None = None

    @property
    def final(self) -> bool:
        """Whether the run will never change again."""
        return self.status in FINAL_STATUSES

    @property
    def completion_ms(self) -> float | None:
        """How long the run took by the service's own clock."""
        if self.created_at is None or self.ended_at is None:
            return None
        return (self.ended_at - self.created_at) / datetime.timedelta(milliseconds=1)


class Snapshot(msgspec.Struct):
    """What `GET …/snapshot/` answers; of the steps only their number is of interest here."""

    run: RunView
    last_seq: int
    steps: list[msgspec.Raw] = []
    child_runs: list[RunView] = []

    @property
    def step_count(self) -> int:
        """The run's own counter where it has one: a page of steps need not be all of them."""
        return self.run.step_count if self.run.step_count is not None else len(self.steps)


class RunsAnswer(msgspec.Struct):
    """What `GET /api/runs/` answers; of a page only its runs are of interest here."""

    runs: list[RunView]


class _WorkspaceAnswer(msgspec.Struct):
    workspace_id: Id


class _AgentAnswer(msgspec.Struct):
    agent_id: Id


class _TokenAnswer(msgspec.Struct):
    token: Token


class _Revision(msgspec.Struct):
    revision: int
    state: str


class _RevisionPage(msgspec.Struct):
    revisions: list[_Revision]
    next_before: int | None = None


class _Problem(msgspec.Struct):
    error: str


def problem_of(exchange: Exchange) -> str:
    """Say in one line why the service declined: the problem's `error`, or the bare status."""
    try:
        text = msgspec.json.decode(exchange.body, type=_Problem).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = f"HTTP {exchange.status} without an error text"
    return " ".join(text.split())[:ERROR_CHARS_MAX]


def read_answer(exchange: Exchange, answer: type[Answer]) -> Answer | None:
    """Read an OK answer; None, with the exchange turned into a connection error, when it is not what was promised."""
    try:
        return msgspec.json.decode(exchange.body, type=answer)
    except (msgspec.DecodeError, UnicodeDecodeError) as fault:
        exchange.outcome = Outcome.CONNECTION_ERROR
        exchange.error = f"unreadable answer: {fault}"[:ERROR_CHARS_MAX]
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class Workspace:
    """A tenant made for this measurement and the bytes of its requests. `repr` tells no token."""

    client: Client = dataclasses.field(repr=False)
    workspace_id: str
    agent_id: str
    token: str = dataclasses.field(repr=False)

    def create_wire(self, children: int) -> bytes:
        """Bytes that create a run which ends only after `children` subruns were spawned and joined."""
        body = {
            "workspace_id": self.workspace_id,
            "agent_id": self.agent_id,
            "input_text": "load test",
            "channel": CHANNEL,
        }
        expected = {"expected_subruns": children} if children else {}
        return self.client.wire("POST", "/api/runs/", self.token, msgspec.json.encode(body | expected))

    def spawn_wire(self, run_id: str) -> bytes:
        """Bytes that spawn one subrun of `run_id`."""
        body = msgspec.json.encode({"input_text": "load test, subrun"})
        return self.client.wire("POST", f"/api/runs/{run_id}/spawn_subrun/", self.token, body)

    def snapshot_wire(self, run_id: str, since_seq: int) -> bytes:
        """Bytes that ask for the run and what happened after event `since_seq`."""
        return self.client.wire("GET", f"/api/runs/{run_id}/snapshot/?since_seq={since_seq}", self.token)

    def runs_wire(self, status: str) -> bytes:
        """Bytes that ask for this workspace's newest runs in one status."""
        path = f"/api/runs/?workspace_id={self.workspace_id}&status={status}&limit={RUNS_PAGE}"
        return self.client.wire("GET", path, self.token)

    def alive_wire(self) -> bytes:
        """Bytes of a request that costs the service next to nothing: what a connection is tried with."""
        return self.client.wire("GET", "/livez")

    def cancel_wire(self, run_id: str) -> bytes:
        """Bytes that cancel the run."""
        body = msgspec.json.encode({"reason": "the load test ended before the run did"})
        return self.client.wire("POST", f"/api/runs/{run_id}/cancel/", self.token, body)


class Api:
    """Calls that prepare a measurement, made with an installation token."""

    def __init__(self, client: Client, token: str) -> None:
        self._client = client
        self._token = token

    async def make_workspace(
        self, name: str, quota_class: str | None = None, script: list[dict[str, str]] | None = None
    ) -> Workspace:
        """Make a workspace, its agent, and an OPERATOR token that the load uses.

        Without `quota_class` it is of the ordinary class; without `script` the agent does what agents do by default.
        """
        kind = {"quota_class": quota_class} if quota_class else {}
        made = await self._post("make a workspace", "/api/workspaces/", {"name": name, **kind}, _WorkspaceAnswer)
        place = f"/api/workspaces/{made.workspace_id}"
        steps = {"script": script} if script else {}
        agent = await self._post("make an agent", f"{place}/agents/", {"name": "scripted", **steps}, _AgentAnswer)
        role = {"role": "OPERATOR", "expires_days": TOKEN_EXPIRES_DAYS}
        granted = await self._post("make a token", f"{place}/tokens/", role, _TokenAnswer)
        return Workspace(self._client, made.workspace_id, agent.agent_id, granted.token)

    async def metrics_text(self) -> str | None:
        """Return the text of `/metrics`; None when the service has none or does not answer."""
        exchange = await self._client.exchange(self._client.wire("GET", "/metrics", self._token))
        return exchange.body.decode(errors="replace") if exchange.outcome is Outcome.OK else None

    async def active_revision(self) -> int | None:
        """Return the number of the quota revision in force; None when the service does not tell one."""
        before = ""
        for _ in range(REVISION_PAGES_MAX):
            path = f"/api/quota-revisions/?limit={REVISIONS_PAGE}{before}"
            exchange = await self._client.exchange(self._client.wire("GET", path, self._token))
            page = read_answer(exchange, _RevisionPage) if exchange.outcome is Outcome.OK else None
            if page is None:
                return None
            found = next((one.revision for one in page.revisions if one.state == "active"), None)
            if found is not None or page.next_before is None:
                return found
            before = f"&before={page.next_before}"
        return None

    async def _post(self, what: str, path: str, body: dict[str, object], answer: type[Answer]) -> Answer:
        """Make one preparing call; raises ServiceUnreachable, ServiceDeclined or TokenDeclined."""
        exchange = await self._client.exchange(self._client.wire("POST", path, self._token, msgspec.json.encode(body)))
        if exchange.outcome is Outcome.HTTP_ERROR:
            problem = problem_of(exchange)
            if exchange.status in {401, 403}:
                raise TokenDeclined(what, exchange.status, f"{problem}; --token must be an installation token")
            raise ServiceDeclined(what, exchange.status, problem)
        read = read_answer(exchange, answer) if exchange.outcome is Outcome.OK else None
        if read is None:
            raise ServiceUnreachable(what, exchange.error or "unknown fault")
        return read
