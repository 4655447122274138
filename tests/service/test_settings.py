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


def test_the_part_of_a_rate_that_a_process_gives_without_redis_is_read() -> None:
    settings = Settings.from_environment({**ADDRESSES, "PLIMSOLL_REDIS_AWAY_RATE_PERCENT": "25"})
    assert settings == Settings("postgresql://db", "redis://here", redis_away_rate_percent=25)


def test_the_schedule_of_recalibrations_and_its_flags_are_read() -> None:
    settings = Settings.from_environment(
        {**ADDRESSES, "PLIMSOLL_RECALIBRATE_DAYS": "7", "PLIMSOLL_RECALIBRATE_ARGS": "--quick --slo 'my slos.yaml'"}
    )
    args = ("--quick", "--slo", "my slos.yaml")
    assert settings == Settings("postgresql://db", "redis://here", recalibrate_days=7.0, recalibrate_args=args)


def test_hosts_endpoints_and_keys_are_read() -> None:
    settings = Settings.from_environment(
        {
            **ADDRESSES,
            "PLIMSOLL_HTTP_GET_ALLOW": "example.org, http://127.0.0.1:8000/ ,",
            "PLIMSOLL_MODEL_BASE_URL": "https://models.example/v1/",
            "PLIMSOLL_MODEL_KEY": " sk-secret\n",
            "PLIMSOLL_MODEL_ALLOW": "[::1]:9000",
            "PLIMSOLL_MODEL_TIMEOUT_S": "30",
        }
    )
    assert settings == Settings(
        ADDRESSES["DATABASE_URL"],
        ADDRESSES["REDIS_URL"],
        http_get_allow=("example.org", "http://127.0.0.1:8000"),
        model_base_url="https://models.example/v1",
        model_key="sk-secret",
        model_allow=("[::1]:9000",),
        model_timeout_s=30.0,
    )
    assert "sk-secret" not in repr(settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PLIMSOLL_HTTP_GET_ALLOW", "*.example.org"),
        ("PLIMSOLL_HTTP_GET_ALLOW", "example.org/path"),
        ("PLIMSOLL_HTTP_GET_ALLOW", "ftp://example.org"),
        ("PLIMSOLL_HTTP_GET_ALLOW", "user@example.org"),
        ("PLIMSOLL_HTTP_GET_ALLOW", "example.org:99999"),
        ("PLIMSOLL_MODEL_ALLOW", ":8000"),
        ("PLIMSOLL_MODEL_BASE_URL", "models.example/v1"),
        ("PLIMSOLL_MODEL_BASE_URL", "https://user:secret@models.example/v1"),
        ("PLIMSOLL_MODEL_BASE_URL", "https://models.example/v1?a=b"),
        ("PLIMSOLL_MODEL_KEY", "sk-\u00fc"),
        ("PLIMSOLL_MODEL_TIMEOUT_S", "0"),
        ("PLIMSOLL_RECALIBRATE_DAYS", "-1"),
        ("PLIMSOLL_RECALIBRATE_ARGS", "--url 'unclosed"),
        ("PLIMSOLL_REDIS_AWAY_RATE_PERCENT", "0"),
        ("PLIMSOLL_REDIS_AWAY_RATE_PERCENT", "101"),
        ("PLIMSOLL_REDIS_AWAY_RATE_PERCENT", "33.3"),
        ("PLIMSOLL_REDIS_AWAY_RATE_PERCENT", "9" * 5000),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_variables_name(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=name) as refused:
        Settings.from_environment({**ADDRESSES, name: value})
    assert "secret" not in str(refused.value)
    assert "\u00fc" not in str(refused.value)
