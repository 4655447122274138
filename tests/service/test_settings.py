"""What the environment says, and how an address reaches the driver."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy.dialects.postgresql.asyncpg import dialect
from sqlalchemy.engine import make_url

from service.errors import ConfigurationError
from service.settings import Settings, sqlalchemy_url

ADDRESSES = {"DATABASE_URL": "postgresql://db", "REDIS_URL": "redis://here"}


@pytest.mark.parametrize(
    ("libpq_url", "wanted"),
    [
        ("postgresql://me:p%40ss@db:5433/runs", {"user": "me", "password": "p@ss", "host": "db", "port": 5433}),
        ("postgresql://me@/runs?host=/run/a%20b", {"user": "me", "host": "/run/a b"}),
        ("postgres://me@db/runs?sslmode=require", {"user": "me", "host": "db", "ssl": "require"}),
    ],
)
def test_an_address_reaches_the_driver_as_it_was_meant(libpq_url: str, wanted: dict[str, Any]) -> None:
    asyncpg: Any = dialect
    _, options = asyncpg().create_connect_args(make_url(sqlalchemy_url(libpq_url)))
    assert options == {"database": "runs", **wanted}


def test_what_is_not_set_has_its_default() -> None:
    assert Settings.from_environment(ADDRESSES) == Settings("postgresql://db", "redis://here")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"REDIS_URL": "redis://here"}, "DATABASE_URL is not set"),
        ({**ADDRESSES, "PLIMSOLL_LEASE_S": "0"}, "PLIMSOLL_LEASE_S='0': give a number of seconds"),
        ({**ADDRESSES, "PLIMSOLL_SWEEP_INTERVAL_S": "soon"}, "PLIMSOLL_SWEEP_INTERVAL_S='soon'"),
        ({**ADDRESSES, "PLIMSOLL_LOG_LEVEL": "loud"}, "PLIMSOLL_LOG_LEVEL='loud'"),
    ],
)
def test_a_setting_that_is_missing_or_wrong_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Settings.from_environment(environment)
