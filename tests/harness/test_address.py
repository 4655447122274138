"""An address is read, or refused with what is wrong with it."""

import pytest

from harness.address import split_url
from harness.errors import BadUsage


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("http://127.0.0.1:8000", ("127.0.0.1", 8000, "")),
        ("http://host/base/", ("host", 80, "/base")),
        ("http://[::1]:9", ("::1", 9, "")),
    ],
)
def test_an_address_is_split(url: str, parts: tuple[str, int, str]) -> None:
    assert split_url(url) == parts


EXAMPLE = "give something like http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("https://host", "https is not supported: measure the service itself, behind its TLS proxy, over http://"),
        ("host:8000", f"'host:8000' is no http address: {EXAMPLE}"),
        ("http://", f"'http://' is no http address: {EXAMPLE}"),
        ("http://host:99999", f"'http://host:99999' cannot be read (Port out of range 0-65535): {EXAMPLE}"),
        ("http://me:secret@host", "may hold host, port and path only: give the token with --token or PLIMSOLL_TOKEN"),
        ("http://host/a b", "'http://host/a b' holds characters that an address may not: escape them"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_with_the_mend(url: str, error: str) -> None:
    with pytest.raises(BadUsage) as refused:
        split_url(url)
    assert str(refused.value).removeprefix("--url").lstrip(": ") == error
