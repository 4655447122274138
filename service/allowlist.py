"""Which hosts the service may connect to for a tenant: exactly those that the installation's lists name.

An entry is `host` (the scheme's own port), `host:port`, or either of them after `http://` or `https://`. There are no
wildcards and no ranges: what is compared is the name in the URL with the name in the list. Who asks: the tool
`http_get`, and agents that name a model's endpoint.
"""

from __future__ import annotations

from collections.abc import Iterable

import httpx

_DEFAULT_PORTS = {"http": 80, "https": 443}


def may_connect(url: str, allow: Iterable[str]) -> bool:
    """Tell whether the list names exactly the host and port that an http or https URL leads to."""
    try:
        target = httpx.URL(url)
        entries = [httpx.URL(entry if "://" in entry else f"{target.scheme}://{entry}") for entry in allow]
    except (httpx.InvalidURL, ValueError):
        return False
    if target.scheme not in _DEFAULT_PORTS or not target.host or target.userinfo:
        return False
    return any(_origin(entry) == _origin(target) for entry in entries)


def _origin(url: httpx.URL) -> tuple[str, bytes, int | None]:
    port = _DEFAULT_PORTS.get(url.scheme) if url.port is None else url.port
    return url.scheme, url.raw_host.lower(), port
