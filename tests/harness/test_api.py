"""The calls that prepare a measurement, against a service that answers as it is told."""

from __future__ import annotations

import asyncio

import pytest

from harness.api import Api
from harness.client import Client
from tests.harness.fake_service import Asked, http, serving


def revisions(*numbers_and_states: tuple[int, str], before: int | None = None) -> bytes:
    found = [{"revision": number, "state": state, "limits": {}} for number, state in numbers_and_states]
    return http(200, {"revisions": found, "next_before": before})


async def asked_of(*pages: bytes) -> tuple[int | None, list[str]]:
    """Return what is in force by a service that has these pages, and the paths that were asked for."""
    paths: list[str] = []

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        paths.append(asked.path)
        writer.write(pages[min(len(paths), len(pages)) - 1])

    async with serving(answer) as url:
        client = Client(url)
        try:
            return await Api(client, "token").active_revision(), paths
        finally:
            await client.close()


async def test_the_revision_in_force_is_found_among_the_newest() -> None:
    assert await asked_of(revisions((4, "proposed"), (3, "active"), (2, "superseded"))) == (
        3,
        ["/api/quota-revisions/?limit=100"],
    )


async def test_one_that_is_older_is_found_on_a_later_page() -> None:
    found, paths = await asked_of(revisions((9, "rejected"), before=9), revisions((8, "active")))
    assert (found, paths[1:]) == (8, ["/api/quota-revisions/?limit=100&before=9"])


@pytest.mark.parametrize(
    "page", [http(404, {"error": "absent"}), http(403, {"error": "no"}), http(200, b"<html>"), revisions()]
)
async def test_a_service_that_does_not_tell_has_an_unknown_one(page: bytes) -> None:
    assert await asked_of(page) == (None, ["/api/quota-revisions/?limit=100"])


async def test_a_history_without_end_is_not_read_to_its_end() -> None:
    found, paths = await asked_of(revisions((9, "rejected"), before=9))
    assert (found, len(paths)) == (None, 10)
