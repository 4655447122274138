"""The users of the chaos campaign: they create, spawn, approve, pause, cancel and follow, and give up on nothing.

Every create has an idempotency key, so that whoever lost its connection asks again and learns what was accepted. A
spawn has none: whoever lost the answer looks for the child before asking again. What the users know in the end (which
runs were accepted, what each may have come to, which events were seen) is one side of the audit.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
from websockets.exceptions import WebSocketException

from service.auth import issue_token
from service.db import Database
from service.workspaces import create_agent, create_workspace
from tests.campaigns.stream_clients import dial

FINAL = ("COMPLETED", "FAILED", "CANCELED")
PAUSE_S = 0.25  # before something is asked again
ANSWER_PATIENCE_S = 40.0  # longer than the service may take for any answer; a client that gives up sooner asks again
WAIT_S = 5.0  # of a long-poll

SCRIPTS: dict[str, list[dict[str, Any]]] = {
    "plain": [
        {"kind": "PLAN"},
        {"kind": "MODEL_CALL", "latency_ms": 400},
        {"kind": "OBSERVATION", "latency_ms": 100},
        {"kind": "MESSAGE"},
    ],
    "slow": [{"kind": "MODEL_CALL", "latency_ms": 1500}, {"kind": "MESSAGE", "latency_ms": 1500}],
    "tool": [
        {"kind": "MODEL_CALL", "latency_ms": 100},
        {"kind": "TOOL_CALL", "tool": "effect", "arguments": {"seconds": 0.4}},
        {"kind": "MESSAGE", "latency_ms": 100},
    ],
    "approval": [
        {"kind": "PLAN"},
        {"kind": "TOOL_CALL", "tool": "guarded", "arguments": {"seconds": 0.1}},
        {"kind": "MESSAGE", "latency_ms": 100},
    ],
    "failing": [{"kind": "MODEL_CALL", "latency_ms": 300}, {"kind": "OBSERVATION", "error": "it is in the script"}],
}
"""What the agents do; `effect` needs no approval, `guarded` has the same effect and needs one."""

SHARES = {"plain": 40, "slow": 15, "tool": 20, "approval": 15, "failing": 10}
JOINS = ("WAIT_ALL", "WAIT_ANY", "QUORUM", "TIMEOUT")
FAILURES = ("FAIL_FAST", "IGNORE_FAILURE", "CANCEL_SIBLINGS")


@dataclass(frozen=True)
class Plan:
    """What one user wants of one run."""

    key: str
    agent: str
    children: int
    options: dict[str, Any]  # of every spawn
    child_act: str  # on the first child: none, cancel, or pause for ever (only where the join has a timeout)
    own_act: str  # on the run itself: none, cancel, or pause and resume
    watches: bool  # over a socket too
    asks_twice: bool  # creates again with the same key when it has its answer


def make_plan(seed: int, number: int) -> Plan:
    """Return the plan of one run; the same seed and number give the same plan."""
    dice = random.Random(f"{seed}/{number}")  # noqa: S311 - repeatable, not secret
    agent = dice.choices(list(SHARES), list(SHARES.values()))[0]
    children = dice.choices([0, 1, 2, 3], [40, 30, 20, 10])[0]
    join = dice.choice(JOINS)
    options: dict[str, Any] = {"join_policy": join, "failure_policy": dice.choice(FAILURES), "group_id": "group"}
    if join == "QUORUM":
        options["quorum"] = dice.randint(1, max(1, children))
    if join == "TIMEOUT":
        options["timeout_seconds"] = dice.choice([2.0, 4.0])
    child_act = dice.choices(["none", "cancel"], [80, 20])[0]
    if join == "TIMEOUT":
        child_act = dice.choices(["none", "pause"], [30, 70])[0]
    return Plan(
        key=f"{seed}-{number}",
        agent=agent,
        children=children,
        options=options,
        child_act=child_act,
        own_act=dice.choices(["none", "cancel", "pause"], [84, 6, 10])[0],
        watches=dice.random() < 0.15,
        asks_twice=dice.random() < 0.3,
    )


@dataclass
class Known:
    """What the users know."""

    accepted: dict[str, str] = field(default_factory=dict)
    """Run ids by key."""
    plans: dict[str, Plan] = field(default_factory=dict)
    """Plans by run id."""
    children: dict[str, str] = field(default_factory=dict)
    """Parents by the id of each subrun that was acknowledged."""
    cancels_asked: set[str] = field(default_factory=set)
    """Runs of which somebody asked that they be cancelled."""
    cancels_confirmed: set[str] = field(default_factory=set)
    """Those of which the answer was 200."""
    decided: dict[str, str] = field(default_factory=dict)
    """`approve` or `reject` by tool call, where the answer was 200."""
    seen: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """By way (`long-polls`, `sockets`) and run: the `seq` of every event, in the order of arrival."""
    answers: Counter[str] = field(default_factory=Counter)
    """How requests ended: by status, or by the kind of the lost connection."""
    faults: list[str] = field(default_factory=list)
    """What no user may ever see."""


@dataclass(frozen=True)
class Tenant:
    """One workspace, under the default quota."""

    workspace_id: str
    token: str  # an OPERATOR's
    agents: dict[str, str]  # ids by the names of SCRIPTS
    places: asyncio.Semaphore  # one more than the cap on live parent runs, so that the cap is met


async def make_tenant(database: Database, http: httpx.AsyncClient, name: str, quota_class: str = "default") -> Tenant:
    """Make a workspace, its tools and its agents; the tools over HTTP, since only the service has them installed."""
    async with database.begin() as connection:
        workspace_id = await create_workspace(connection, name, quota_class)
        installation = (await issue_token(connection, None, "OWNER")).token
    for tool, risk in (("effect", "SAFE"), ("guarded", "ELEVATED")):
        made = await http.post(
            f"/api/workspaces/{workspace_id}/tools/",
            json={"name": tool, "tool": "effect", "risk": risk, "timeout_seconds": 20},
            headers={"authorization": f"Bearer {installation}"},
        )
        made.raise_for_status()
    async with database.begin() as connection:
        agents = {
            name: str(await create_agent(connection, workspace_id, name, script)) for name, script in SCRIPTS.items()
        }
        token = (await issue_token(connection, workspace_id, "OPERATOR")).token
    return Tenant(str(workspace_id), token, agents, asyncio.Semaphore(6))


class Users:
    """All users of one campaign."""

    def __init__(self, url: str, http: httpx.AsyncClient) -> None:
        self.known = Known(seen={"long-polls": {}, "sockets": {}})
        self._url = url
        self._http = http

    async def ask(
        self, tenant: Tenant, method: str, path: str, body: Any = None, key: str | None = None
    ) -> httpx.Response | None:
        """Ask once; None when the connection was lost, so that nobody knows what came of it."""
        headers = {"authorization": f"Bearer {tenant.token}"} | ({"idempotency-key": key} if key else {})
        try:
            answer = await self._http.request(method, path, json=body, headers=headers)
        except httpx.TransportError as fault:
            self.known.answers[type(fault).__name__] += 1
            return None
        self.known.answers[str(answer.status_code)] += 1
        if answer.status_code == 500 or answer.status_code in (400, 401, 403, 404, 413, 422):
            self.known.faults.append(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
        return answer

    async def create(self, tenant: Tenant, plan: Plan) -> str:
        """Create a run, asking again until it is accepted; returns its id."""
        body = {
            "workspace_id": tenant.workspace_id,
            "agent_id": tenant.agents[plan.agent],
            "metadata": {"key": plan.key},
            # A group with a timeout takes no children after it, so none must be counted on.
            "expected_subruns": min(plan.children, 1) if plan.options["join_policy"] == "TIMEOUT" else plan.children,
            "max_wait_seconds": 3600,
        }
        while True:
            answer = await self.ask(tenant, "POST", "/api/runs/", body, plan.key)
            if answer is not None and answer.status_code == 200:
                run_id: str = answer.json()["run_id"]
                first = self.known.accepted.setdefault(plan.key, run_id)
                if first != run_id:
                    self.known.faults.append(f"key {plan.key} was answered with {first} and with {run_id}")
                self.known.plans[run_id] = plan
                return run_id
            await asyncio.sleep(PAUSE_S)

    async def play(self, tenant: Tenant, plan: Plan) -> None:
        """Be the user of one run, from its create to its end."""
        async with tenant.places:
            run_id = await self.create(tenant, plan)
            if plan.asks_twice:
                await self.create(tenant, plan)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow(tenant, run_id))
                if plan.watches:
                    group.create_task(self._watch(tenant, run_id))
                group.create_task(self._act(tenant, plan, run_id))

    async def _act(self, tenant: Tenant, plan: Plan, run_id: str) -> None:
        children = [child for _ in range(plan.children) if (child := await self._spawn(tenant, plan, run_id))]
        if children and plan.child_act != "none":
            await self._control(tenant, children[0], plan.child_act)
        if plan.own_act == "cancel":
            await self._control(tenant, run_id, "cancel")
        elif plan.own_act == "pause":
            await self._control(tenant, run_id, "pause")
            await asyncio.sleep(PAUSE_S)
            await self._control(tenant, run_id, "resume")

    async def _spawn(self, tenant: Tenant, plan: Plan, run_id: str) -> str | None:
        """Spawn a subrun; None when the run has ended or its group takes nobody any more."""
        before = set(self.known.children)
        while True:
            answer = await self.ask(tenant, "POST", f"/api/runs/{run_id}/spawn_subrun/", {"options": plan.options})
            if answer is not None and answer.status_code == 200:
                child: str = answer.json()["child_run_id"]
                self.known.children[child] = run_id
                return child
            if answer is not None and answer.status_code == 409:
                return None
            await asyncio.sleep(PAUSE_S)
            if answer is None or answer.status_code >= 500:  # it may have been done
                for found in await self._children(tenant, run_id):
                    if found not in before and self.known.children.get(found) is None:
                        self.known.children[found] = run_id
                        return found

    async def _children(self, tenant: Tenant, run_id: str) -> list[str]:
        while True:
            answer = await self.ask(tenant, "GET", f"/api/runs/?parent_run_id={run_id}")
            if answer is not None and answer.status_code == 200:
                return [run["run_id"] for run in answer.json()["runs"]]
            await asyncio.sleep(PAUSE_S)

    async def _control(self, tenant: Tenant, run_id: str, what: str) -> None:
        """Cancel, pause or resume, asking again until it is done or not possible any more."""
        if what == "cancel":
            self.known.cancels_asked.add(run_id)
        while True:
            answer = await self.ask(tenant, "POST", f"/api/runs/{run_id}/{what}/", {})
            if answer is not None and answer.status_code == 200:
                if what == "cancel":
                    self.known.cancels_confirmed.add(run_id)
                return
            if answer is not None and answer.status_code == 409:
                return
            await asyncio.sleep(PAUSE_S)

    async def _follow(self, tenant: Tenant, run_id: str) -> None:
        """Follow a run by long-polls until it has ended and every event of it was seen."""
        seen = self.known.seen["long-polls"].setdefault(run_id, [])
        while True:
            last = seen[-1] if seen else 0
            answer = await self.ask(tenant, "GET", f"/api/runs/{run_id}/snapshot/?since_seq={last}&wait={WAIT_S}")
            if answer is not None and answer.status_code == 200:
                snapshot = answer.json()
                seen += [event["seq"] for event in snapshot["events_since_seq"]]
                if snapshot["run"]["status"] in FINAL:
                    return
            else:
                await asyncio.sleep(PAUSE_S)

    async def _watch(self, tenant: Tenant, run_id: str) -> None:
        """Follow a run by sockets until its last event was seen."""
        seen = self.known.seen["sockets"].setdefault(run_id, [])
        while True:
            last = seen[-1] if seen else 0
            with suppress(OSError, TimeoutError, WebSocketException, EOFError):
                async with dial(self._url, f"/ws/runs/{run_id}/?since_seq={last}", tenant.token) as connection:
                    async for text in connection:
                        frame = json.loads(text)
                        seen.append(frame["seq"])
                        if frame["event"] == "state_changed" and frame["data"]["to"] in FINAL:
                            return
            await asyncio.sleep(PAUSE_S)

    async def decide(self, tenant: Tenant) -> None:
        """Approve most tool calls of a workspace and reject the others, until cancelled."""
        while True:
            answer = await self.ask(tenant, "GET", f"/api/toolcalls/?workspace_id={tenant.workspace_id}&status=PENDING")
            if answer is not None and answer.status_code == 200:
                for call in answer.json()["tool_calls"]:
                    what = "reject" if uuid.UUID(call["tool_call_id"]).int % 4 == 0 else "approve"
                    decided = await self.ask(tenant, "POST", f"/api/toolcalls/{call['tool_call_id']}/{what}/", {})
                    if decided is not None and decided.status_code == 200:
                        self.known.decided[call["tool_call_id"]] = what
            await asyncio.sleep(4 * PAUSE_S)

    async def accept_side_by_side(self, tenant: Tenant, count: int, name: str) -> float:
        """Create runs over as many new connections at once; returns the seconds until the last was accepted."""
        begun = time.monotonic()

        async def one(number: int) -> None:
            async with httpx.AsyncClient(base_url=self._url, timeout=ANSWER_PATIENCE_S) as http:
                alone = Users(self._url, http)
                alone.known = self.known
                await alone.create(
                    tenant, Plan(f"{name}-{number}", "plain", 0, {"join_policy": ""}, "", "", False, False)
                )

        await asyncio.gather(*(one(number) for number in range(count)))
        return time.monotonic() - begun
