"""Reads the address of a service as a caller gives it, and refuses what cannot be measured at it."""

from __future__ import annotations

import urllib.parse

from harness.errors import BadUsage


def split_url(url: str) -> tuple[str, int, str]:
    """Return host, port and path prefix of the service's URL; raises BadUsage naming what is wrong with it."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or 80
    except ValueError as fault:
        raise BadUsage(f"--url {url!r} cannot be read ({fault}): give something like http://127.0.0.1:8000") from None
    if parts.scheme == "https":
        raise BadUsage("--url: https is not supported: measure the service itself, behind its TLS proxy, over http://")
    if parts.scheme != "http" or not parts.hostname:
        raise BadUsage(f"--url {url!r} is no http address: give something like http://127.0.0.1:8000")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise BadUsage("--url may hold host, port and path only: give the token with --token or PLIMSOLL_TOKEN")
    prefix = parts.path.rstrip("/")
    if not (prefix + parts.hostname).isascii() or any(c.isspace() or not c.isprintable() for c in url):
        raise BadUsage(f"--url {url!r} holds characters that an address may not: escape them")
    return parts.hostname, port, prefix
