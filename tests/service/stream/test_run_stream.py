"""The stream of a run: replayed, then followed; nothing missing, nothing twice."""

from __future__ import annotations

from typing import Any

from tests.sockets import Writer, open_socket


async def test_what_happened_is_replayed_and_what_happens_is_pushed(tenant: Any, url: str, writer: Writer) -> None:
    run_id = await tenant.create()
    await writer.append(run_id, payload={"step_index": 1, "kind": "PLAN"})
    async with open_socket(url, f"/ws/runs/{run_id}/", tenant.token) as client:
        created, step = await client.frames(2)
        await writer.append(run_id, payload={"step_index": 2, "kind": "PLAN"})
        live = await client.frame()
    snapshot = (await tenant.http.get(f"/api/runs/{run_id}/snapshot/")).json()
    assert [created, step, live] == [
        {
            "type": "push",
            "topic": "run.event",
            "event": event["event_type"],
            "data": event["payload"],
            "seq": event["seq"],
            "run_id": run_id,
            "workspace_id": str(tenant.workspace_id),
            "ts": event["created_at"],
        }
        for event in snapshot["events_since_seq"]
    ]
