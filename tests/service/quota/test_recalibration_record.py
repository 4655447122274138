"""Recalibrations on a real database: one at a time, resumed by whoever looks, and what a table in force answers."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import uuid
from typing import Any

import msgspec
import pytest
from sqlalchemy import text
from structlog.typing import EventDict

from service.db import Database
from service.errors import IllegalState, QuotaExceeded
from service.guarded import connect_redis
from service.quota import revisions
from service.quota.gate import Gate
from service.quota.inforce import Quotas
from service.quota.limits import DEFAULT, Limit, Rate
from service.quota.rates import Rates
from service.quota.recalibration import Outcome, Usage
from service.quota.recalibration_counts import RequestTally, observed_use, requests_under
from service.quota.recalibration_cycle import Count, Phase, Plan, Turn
from service.quota.recalibration_looks import Looks
from service.quota.recalibration_record import HandedIn, begin, hand_in, is_due, look, renew
from service.quota.shadow import ShadowTally
from service.quota.tables import FIRST, Measured, write
from tests.measuredtables import measured, measured_file
from tests.tenants import Tenant

CREATE = Limit.RUN_CREATION
AT_ONCE = Plan(needs_approval=False, shadow_s=0, canary_s=0, watch_s=0, canary_percent=100)
BY = "a test"


def lower(value: float, **changed: Any) -> Measured:
    """Return a measurement, taken just now, of which a quarter of the lower bound is this."""
    return measured(4 * value / 0.99, 0.01, measured_at=dt.datetime.now(dt.UTC), **changed)


async def handed_in(database: Database, each: Measured, plan: Plan = AT_ONCE, usage: Usage | None = None) -> HandedIn:
    """Hand a measurement of creates in."""
    async with database.begin() as connection:
        return await hand_in(connection, measured_file({CREATE: each}), plan, BY, usage=usage or {})


async def asked(database: Database, revision: int, requests: int, refused: int = 0, minutes_ago: int = 0) -> None:
    """Write down requests for creates under a revision."""
    async with database.begin() as connection:
        await connection.execute(
            text(
                "INSERT INTO quota_request_counts VALUES (date_trunc('minute', now()) - make_interval(mins => :ago),"
                " :revision, 'run_creation', :asked, :refused)"
            ),
            {"ago": minutes_ago, "revision": revision, "asked": requests, "refused": refused},
        )


async def shadowed(database: Database, revision: int, requests: int, newly_refused: int = 0) -> None:
    """Write down what a shadow said about creates."""
    async with database.begin() as connection:
        await connection.execute(
            text(
                "INSERT INTO quota_shadow_counts"
                " VALUES (:revision, 'run_creation', :asked, :newly, :newly, now(), now())"
            ),
            {"revision": revision, "asked": requests, "newly": newly_refused},
        )


async def phases(database: Database) -> list[tuple[int, str]]:
    """Return every recalibration's phase."""
    async with database.read() as connection:
        found = await connection.execute(text("SELECT recalibration_id, phase FROM quota_recalibrations ORDER BY 1"))
        return [(row.recalibration_id, row.phase) for row in found]


async def in_force(database: Database) -> tuple[int, bytes]:
    """Return the active revision with its table's bytes."""
    async with database.read() as connection:
        found = await revisions.active(connection)
    return found.revision, write(found.limits)


async def story(database: Database, revision: int) -> list[tuple[str, str, str | None]]:
    """Return what happened to a revision: change, state, the first words of the reason."""
    async with database.read() as connection:
        told = (await revisions.changes(connection, [revision]))[revision]
    return [(each.change.value, each.to_state.value, each.reason and each.reason.partition(":")[0]) for each in told]


async def test_a_measurement_that_is_handed_in_twice_does_not_agree_with_itself(database: Database) -> None:
    once = lower(8.5)
    for _ in range(2):
        found = await handed_in(database, once)
        assert (found.phase, found.decision.moves[0].outcome) == (Phase.UNCHANGED, Outcome.LEANING)
    assert (await handed_in(database, lower(8.5))).phase is Phase.SHADOW


async def test_without_a_person_a_measurement_goes_by_shadow_and_canaries_to_all(
    database: Database, logged: list[EventDict]
) -> None:
    found = await handed_in(database, lower(8.5))  # 17 % less than 10.29: it leans first
    assert found.phase is Phase.UNCHANGED
    found = await handed_in(database, lower(8.5))
    assert (found.revision, found.phase, await in_force(database)) == (3, Phase.SHADOW, (1, write(FIRST)))
    await shadowed(database, 3, 1_000)
    assert await look(database) == Turn(Phase.CANARY, "the shadow refused no more than it may")
    assert (await in_force(database))[0] == 1
    assert await look(database) == Turn(Phase.WATCHED, "nothing rose for the canary workspaces")
    assert (await in_force(database))[0] == 3
    assert await look(database) == Turn(Phase.KEPT, "nothing rose")
    assert await look(database) is None
    assert await phases(database) == [(1, "unchanged"), (2, "kept")]
    assert await story(database, 3) == [
        ("propose", "proposed", "run_creation moved"),
        ("shadow", "shadow", "measuring -> shadow"),
        ("recalibrate", "shadow", "measuring -> shadow"),
        ("recalibrate", "shadow", "shadow -> canary"),
        ("activate", "active", "nothing rose for the canary workspaces"),
        ("recalibrate", "active", "canary -> watched"),
        ("recalibrate", "active", "watched -> kept"),
    ]
    assert [(line["revision"], line["phase"]) for line in logged if line["event"] == "recalibration"] == [
        (2, "unchanged"),
        (3, "shadow"),
        (3, "canary"),
        (3, "watched"),
        (3, "kept"),
    ]


async def test_by_default_it_waits_for_a_person_whose_activation_is_then_watched(database: Database) -> None:
    plan = dataclasses.replace(AT_ONCE, needs_approval=True)
    await handed_in(database, lower(7.0), plan)
    await shadowed(database, 2, 1_000)
    assert await look(database) == Turn(Phase.WAITING, "a person activates or rejects it")
    assert await look(database) is None
    async with database.begin() as connection:
        assert (await revisions.activate(connection, 2, "a person")).activated
    assert await look(database) == Turn(Phase.WATCHED, "activated by hand")
    assert await look(database) == Turn(Phase.KEPT, "nothing rose")


async def test_a_measurement_that_is_not_believed_is_kept_in_the_history_and_rejected(database: Database) -> None:
    found = await handed_in(database, lower(7.0, late_share=0.5))
    assert (found.phase, await in_force(database)) == (Phase.REFUSED, (1, write(FIRST)))
    async with database.read() as connection:
        told = (await revisions.changes(connection, [2]))[2]
    assert (told[-1].to_state, [each.guardrail for each in told[-1].findings or ()]) == ("rejected", ["generator"])
    assert await phases(database) == [(1, "refused")]


async def test_what_is_not_believed_does_not_make_forget_what_the_cycle_before_it_saw(database: Database) -> None:
    assert (await handed_in(database, lower(8.5))).phase is Phase.UNCHANGED
    assert (await handed_in(database, lower(8.5, samples={}))).phase is Phase.REFUSED
    assert (await handed_in(database, lower(8.5))).phase is Phase.SHADOW


async def test_a_rise_takes_the_table_back_byte_for_byte_and_the_next_one_needs_a_person(database: Database) -> None:
    before = await in_force(database)
    await asked(database, 1, 10_000, 50, minutes_ago=10)
    await handed_in(database, lower(7.0), dataclasses.replace(AT_ONCE, watch_s=3_600))
    await shadowed(database, 2, 1_000)
    assert [(await look(database) or Turn(Phase.KEPT, "")).phase for _ in range(2)] == [Phase.CANARY, Phase.WATCHED]
    assert await look(database) is None
    await asked(database, 2, 1_000, 100)
    taken = await look(database)
    assert taken == Turn(
        Phase.ROLLED_BACK, "100 of 1,000 requests were refused by run_creation (10.0%; before 50 of 10,000)"
    )
    assert await in_force(database) == before
    await handed_in(database, lower(7.0))
    await shadowed(database, 3, 1_000)
    assert await look(database) == Turn(Phase.WAITING, "a person activates or rejects it")


async def nine_runs_a_second_for_a_minute(tenant: Tenant) -> None:
    """Have an ordinary workspace make 540 runs within one minute."""
    await tenant.runs(540)
    async with tenant.database.begin() as connection:
        await connection.execute(text("UPDATE workspaces SET quota_class = 'default'"))
        await connection.execute(
            text("UPDATE runs SET created_at = date_trunc('minute', now()) - interval '5 minutes'")
        )


async def test_use_is_what_a_workspace_makes_in_its_busy_minutes(tenant: Tenant) -> None:
    async with tenant.database.read() as connection:
        now = (await connection.execute(revisions.CLOCK)).scalar_one()
        assert await observed_use(connection, now) == {}
    await nine_runs_a_second_for_a_minute(tenant)
    async with tenant.database.read() as connection:
        assert await observed_use(connection, now) == {CREATE: 9.0}


async def test_a_rate_that_is_used_meanwhile_is_not_lowered(tenant: Tenant) -> None:
    await handed_in(tenant.database, lower(7.0))  # decided when nobody was there
    await shadowed(tenant.database, 2, 1_000)
    await nine_runs_a_second_for_a_minute(tenant)
    assert await look(tenant.database) == Turn(Phase.REFUSED, "guardrails refuse it: below use")
    assert await in_force(tenant.database) == (1, write(FIRST))
    async with tenant.database.read() as connection:
        told = (await revisions.changes(connection, [2]))[2]
    assert [each.refusal for each in told[-1].findings or ()] == [
        "default.run_creation.per_s 8.232, of which workspaces use 9 (p99): a rate in use is not taken away"
    ]


async def test_two_recalibrations_never_run_at_once(database: Database) -> None:
    async def one() -> int | str:
        try:
            async with database.begin() as connection:
                return await begin(connection, AT_ONCE, BY)
        except IllegalState as refusal:
            return refusal.detail.partition(" since")[0]

    found = await asyncio.gather(*(one() for _ in range(8)))
    assert sorted(map(str, found)) == ["1", *["recalibration 1 is under way: measuring"] * 7]
    await handed_in_under(database, 1)
    with pytest.raises(IllegalState, match="recalibration 1 is under way: shadow since"):
        await handed_in(database, lower(7.0))


async def handed_in_under(database: Database, recalibration_id: int) -> HandedIn:
    """Hand a measurement in under a lease."""
    async with database.begin() as connection:
        file = measured_file({CREATE: lower(7.0)})
        return await hand_in(connection, file, AT_ONCE, BY, usage={}, recalibration_id=recalibration_id)


async def test_who_dies_while_measuring_is_cleaned_up_when_the_lease_is_over_and_comes_too_late(
    database: Database,
) -> None:
    async with database.begin() as connection:
        assert await begin(connection, AT_ONCE, BY, lease_s=0.0) == 1
    async with database.begin() as connection:
        assert await begin(connection, AT_ONCE, BY) == 2
        await renew(connection, 2)
    assert await phases(database) == [(1, "abandoned"), (2, "measuring")]
    with pytest.raises(IllegalState, match="recalibration 1 is not measuring any more"):
        await handed_in_under(database, 1)
    assert (await handed_in_under(database, 2)).phase is Phase.SHADOW


async def test_two_who_look_at_once_take_one_turn(database: Database) -> None:
    await handed_in(database, lower(7.0), dataclasses.replace(AT_ONCE, canary_s=3_600))
    await shadowed(database, 2, 1_000)
    taken = await asyncio.gather(*(look(database) for _ in range(4)))
    assert [each.phase for each in taken if each is not None] == [Phase.CANARY]


async def test_a_worker_takes_every_turn_that_is_due(database: Database, database_url: str) -> None:
    await handed_in(database, lower(7.0))
    await shadowed(database, 2, 1_000)
    looks = Looks(database_url)
    looks.ring()
    await looks.idle()
    assert await phases(database) == [(1, "kept")]
    assert (await in_force(database))[0] == 2


async def test_a_plan_that_a_later_version_has_written_is_carried_out_by_what_is_known_of_it(
    database: Database, database_url: str
) -> None:
    await handed_in(database, lower(7.0))
    await shadowed(database, 2, 1_000)
    async with database.begin() as connection:
        await connection.execute(
            text("UPDATE quota_recalibrations SET plan = CAST(CAST(plan AS jsonb) || CAST(:more AS jsonb) AS json)"),
            {"more": '{"mood": "calm"}'},
        )
    looks = Looks(database_url)
    looks.ring()
    await looks.idle()
    assert await phases(database) == [(1, "kept")]


async def test_missed_schedules_are_caught_up_once(database: Database) -> None:
    async with database.begin() as connection:
        assert await is_due(connection, 7 * 86_400)
    await handed_in(database, lower(7.0))
    async with database.begin() as connection:
        assert not await is_due(connection, 7 * 86_400)
        await connection.execute(text("UPDATE quota_recalibrations SET begun_at = now() - interval '50 days'"))
        assert await is_due(connection, 7 * 86_400)


async def test_what_a_person_activates_meanwhile_overtakes_it(database: Database) -> None:
    await handed_in(database, lower(7.0))
    async with database.begin() as connection:
        other = msgspec.structs.replace(FIRST, default=msgspec.structs.replace(FIRST.default, live_runs=13))
        await revisions.propose(connection, measured_file({}, other), "a person")
        await revisions.activate(connection, 3, "a person")
    assert await look(database) == Turn(Phase.OVERTAKEN, "revision 3 was put in force by hand")
    assert (await story(database, 2))[-1][:2] == ("recalibrate", "rejected")


async def test_canaries_and_they_alone_are_under_the_proposed_table(tenant: Tenant) -> None:
    database = tenant.database
    async with database.begin() as connection:
        await connection.execute(text("UPDATE workspaces SET quota_class = 'default'"))
    half = dataclasses.replace(AT_ONCE, canary_s=3_600, canary_percent=50)
    await handed_in(database, lower(7.0), half)
    await shadowed(database, 2, 1_000)
    assert await look(database) is not None
    ids = [uuid.UUID(int=(0x7F << 100) + number) for number in range(100)]
    async with database.begin() as connection:
        await connection.execute(
            text(
                "INSERT INTO workspaces (workspace_id, name, quota_class, created_at)"
                " SELECT each, each::text, 'default', now() FROM unnest(CAST(:ids AS uuid[])) AS each"
            ),
            {"ids": ids},
        )
    quotas = Quotas(database)
    found = [await quotas.of(each) for each in ids]
    assert [each.revision for each in found] == [2] * 50 + [1] * 50
    assert {each.rates[CREATE].per_s for each in found[:50]} == {Rate(DEFAULT.rates[CREATE].per_s * 4 / 5, 11).per_s}
    assert ({each.shadow for each in found[:50]}, found[50].shadow is not None) == ({None}, True)


async def test_each_request_is_counted_under_the_revision_that_decided_on_it(
    tenant: Tenant, redis_url: str, logged: list[EventDict]
) -> None:
    database, client = tenant.database, connect_redis(redis_url)
    requests, shadow_tally = RequestTally(database), ShadowTally(database)
    gate = Gate(Rates(client), client, shadow_tally, requests)
    quota = dataclasses.replace(DEFAULT, revision=1)
    refused = 0
    for _ in range(14):
        try:
            await gate.take(tenant.workspace_id, quota, CREATE, Limit.SNAPSHOT_POLL)
        except QuotaExceeded:
            refused += 1
    await requests.close()
    await shadow_tally.close()
    await client.aclose()
    async with database.read() as connection:
        now = (await connection.execute(revisions.CLOCK)).scalar_one()
        found = await requests_under(connection, 1, now - dt.timedelta(minutes=1))
    assert refused > 0
    assert found == {"run_creation": Count(14, refused), "snapshot_poll": Count(14, 0)}
