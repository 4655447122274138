"""What the environment may say about hosts and keys, and what is refused with the variable's name."""

from __future__ import annotations

import pytest

from service.errors import ConfigurationError
from service.settings import Settings

ADDRESSES = {"DATABASE_URL": "postgresql:///db", "REDIS_URL": "redis://127.0.0.1"}


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
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_variables_name(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=name) as refused:
        Settings.from_environment({**ADDRESSES, name: value})
    assert "secret" not in str(refused.value)
    assert "\u00fc" not in str(refused.value)
