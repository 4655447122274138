"""What a request asked for, what became of it, and what is kept of an error."""

from __future__ import annotations

import pytest

from harness.importers.rows import Target, one_line, outcome_of, target_of
from harness.sample import Endpoint, Outcome

RUN = "018f4e2a-7b1c"


@pytest.mark.parametrize(
    ("method", "address", "target"),
    [
        ("POST", "http://x.test:8000/api/runs/", Target(Endpoint.CREATE, None)),
        ("post", "/prefix/api/runs?a=1", Target(Endpoint.CREATE, None)),
        (None, "POST /api/runs/", Target(Endpoint.CREATE, None)),
        (None, "/api/runs/", Target(Endpoint.CREATE, None)),  # no method: what load tests do
        ("GET", "/api/runs/?workspace_id=1", Target(Endpoint.OTHER, None)),  # the list
        ("POST", f"/api/runs/{RUN}/spawn_subrun/", Target(Endpoint.SPAWN, RUN)),
        ("GET", f"https://x.test/api/runs/{RUN}/snapshot?since_seq=3", Target(Endpoint.SNAPSHOT, RUN)),
        ("GET", "/api/runs/[id]/snapshot/", Target(Endpoint.SNAPSHOT, None)),
        ("GET", "/api/runs/:run_id/snapshot/", Target(Endpoint.SNAPSHOT, None)),
        ("GET", "GET /api/runs/${}/snapshot/", Target(Endpoint.SNAPSHOT, None)),
        ("POST", f"/api/runs/{RUN}/cancel/", Target(Endpoint.CANCEL, RUN)),
        ("POST", f"/api/runs/{RUN}/pause/", Target(Endpoint.OTHER, None)),
        ("GET", f"/api/runs/{RUN}/", Target(Endpoint.OTHER, None)),
        ("GET", "Snapshot", Target(Endpoint.SNAPSHOT, None)),
        ("GET", "", Target(Endpoint.OTHER, None)),
        (None, None, Target(Endpoint.OTHER, None)),
    ],
)
def test_an_address_or_a_name_tells_what_was_asked_for(method: str | None, address: str | None, target: Target) -> None:
    assert target_of(method, address) == target


def test_the_first_address_that_tells_wins() -> None:
    assert target_of("POST", "http://x.test/", "spawn", "create").endpoint is Endpoint.SPAWN


@pytest.mark.parametrize(
    ("status", "fault", "accepted", "outcome"),
    [
        (200, "", True, Outcome.OK),
        (304, "", True, Outcome.OK),
        (302, "", True, Outcome.HTTP_ERROR),  # whatever the tool thought of it
        (200, "", False, Outcome.HTTP_ERROR),  # rejected by the tool's own check
        (429, "", False, Outcome.HTTP_ERROR),
        (None, "", True, Outcome.OK),  # a tool that tells no status
        (None, "connect: connection refused", False, Outcome.REFUSED),
        (None, "ConnectionRefusedError(111)", False, Outcome.REFUSED),
        (None, "context deadline exceeded", False, Outcome.TIMEOUT),
        (None, "Read timed out", False, Outcome.TIMEOUT),
        (None, "request timeout", False, Outcome.TIMEOUT),
        (None, "connection reset by peer", False, Outcome.CONNECTION_ERROR),
        (None, "", False, Outcome.CONNECTION_ERROR),
    ],
)
def test_an_outcome_is_that_of_the_schema(status: int | None, fault: str, accepted: bool, outcome: Outcome) -> None:
    assert outcome_of(status, fault, accepted=accepted) is outcome


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a\n  b\tc", "a b c"),
        ('Get "http://me:pw@x.test/a?token=s3cret&b=1": EOF', 'Get "http://…@x.test/a?…": EOF'),
        ("Authorization: Bearer plim_abc-DEF", "Authorization: Bearer …"),
        ("token=abc, then", "token …, then"),
        ("no plim_abc_def here", "no plim_… here"),
        ("x" * 999, "x" * 300),
        (" \n", None),
        (None, None),
    ],
)
def test_an_error_is_one_line_without_secrets(text: str | None, kept: str | None) -> None:
    assert one_line(text) == kept
