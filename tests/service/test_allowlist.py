"""Which URLs a list of hosts allows: exactly what it names."""

from __future__ import annotations

import pytest

from service.allowlist import may_connect

ALLOW = ("example.org", "127.0.0.1:8000", "https://models.example:8443")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a?b#c",
        "https://EXAMPLE.org/",
        "https://example.org:443/",
        "http://127.0.0.1:8000/v1",
        "https://models.example:8443/v1",
    ],
)
def test_what_the_list_names_is_allowed(url: str) -> None:
    assert may_connect(url, ALLOW)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org:8080/",  # another port
        "http://sub.example.org/",  # another host
        "http://example.org.evil.net/",
        "http://example.org@evil.net/",
        "http://user:secret@example.org/",
        "http://evil.net/?example.org",
        "http://127.0.0.1/",  # the entry names a port
        "http://2130706433:8000/",  # the same address under another name
        "http://localhost:8000/",
        "http://0x7f000001:8000/",
        "http://127.1:8000/",
        "http://0.0.0.0:8000/",
        "http://[::ffff:127.0.0.1]:8000/",
        "http://127.0.0.1.:8000/",
        "http://example.org:0/",  # no default port
        "http://evil.net\\@example.org/",
        "http://example.org%2eevil.net/",
        "http://\uff45xample.org/",  # a wide letter
        "http://models.example:8443/v1",  # the entry names a scheme
        "ftp://example.org/",
        "file:///etc/passwd",
        "example.org",
        "//example.org/",
        "http://",
        "",
        "http://[::1",
    ],
)
def test_anything_else_is_refused(url: str) -> None:
    assert not may_connect(url, ALLOW)


def test_an_empty_list_allows_nothing() -> None:
    assert not may_connect("http://example.org/", ())
