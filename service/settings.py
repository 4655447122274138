"""Every environment variable a caller may set, read once. Commands build a `Settings`, and pass it on.

Two more are set by the service for its own children: PROMETHEUS_MULTIPROC_DIR, which prometheus-client reads by itself,
and PLIMSOLL_READY_FD, which `readiness` reads.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

from service.errors import ConfigurationError

MOST_DAYS = 36_500
"""Longest retention: a hundred years."""


@dataclass(frozen=True)
class Settings:
    """How one process of the service is set up."""

    database_url: str  # DATABASE_URL, any libpq URI
    redis_url: str  # REDIS_URL: redis://, rediss:// or unix://
    lease_s: float = 2.0  # PLIMSOLL_LEASE_S: how long a claimed run stays with its worker before another may take it
    sweep_interval_s: float = 1.0  # PLIMSOLL_SWEEP_INTERVAL_S: longest time a due run waits for a lost ring
    log_level: str = "info"  # PLIMSOLL_LOG_LEVEL
    archive_dir: Path = Path("data/archives")  # PLIMSOLL_ARCHIVE_DIR: shared by all that archive and all that serve
    archive_after_days: float = 30.0  # PLIMSOLL_ARCHIVE_AFTER_DAYS: how long after its end a worker archives a run
    archive_compact_events: str = ""  # PLIMSOLL_ARCHIVE_COMPACT_EVENTS: types that a worker then deletes; none: none
    allowed_origins: frozenset[str] = frozenset()  # PLIMSOLL_ALLOWED_ORIGINS: pages that may open sockets, besides ours
    http_get_allow: tuple[str, ...] = ()  # PLIMSOLL_HTTP_GET_ALLOW: host or host:port that the tool http_get may ask
    model_base_url: str | None = None  # PLIMSOLL_MODEL_BASE_URL: of agents that do not name an endpoint of their own
    model_key: str | None = field(default=None, repr=False)  # PLIMSOLL_MODEL_KEY: sent to allowed endpoints only
    model_allow: tuple[str, ...] = ()  # PLIMSOLL_MODEL_ALLOW: further hosts or host:port that agents may name
    redis_away_rate_percent: int = 100  # PLIMSOLL_REDIS_AWAY_RATE_PERCENT: of each rate, by each process, without Redis
    model_timeout_s: float = 120.0  # PLIMSOLL_MODEL_TIMEOUT_S: longest wait for one answer of a model

    recalibrate_days: float = 0.0  # PLIMSOLL_RECALIBRATE_DAYS: from one recalibration to the next; 0: no schedule
    recalibrate_args: tuple[str, ...] = ()  # PLIMSOLL_RECALIBRATE_ARGS: flags of `python -m harness recalibrate`

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Read the environment; raises ConfigurationError naming the variable that is missing or wrong."""
        try:
            database_url, redis_url = environment["DATABASE_URL"], environment["REDIS_URL"]
        except KeyError as missing:
            raise ConfigurationError(
                f"{missing.args[0]} is not set: set it, or start this checkout's own stack with `make up`"
            ) from None
        if not redis_url.startswith(("redis://", "rediss://", "unix://")):
            raise ConfigurationError("REDIS_URL must begin with redis://, rediss:// or unix://")
        return cls(
            database_url=database_url,
            redis_url=redis_url,
            lease_s=_positive(environment, "PLIMSOLL_LEASE_S", cls.lease_s),
            sweep_interval_s=_positive(environment, "PLIMSOLL_SWEEP_INTERVAL_S", cls.sweep_interval_s),
            log_level=_log_level(environment),
            archive_dir=Path(environment.get("PLIMSOLL_ARCHIVE_DIR") or cls.archive_dir),
            archive_after_days=_days(environment, "PLIMSOLL_ARCHIVE_AFTER_DAYS", cls.archive_after_days),
            archive_compact_events=environment.get("PLIMSOLL_ARCHIVE_COMPACT_EVENTS", cls.archive_compact_events),
            allowed_origins=_origins(environment),
            http_get_allow=_hosts(environment, "PLIMSOLL_HTTP_GET_ALLOW"),
            model_base_url=_base_url(environment, "PLIMSOLL_MODEL_BASE_URL"),
            model_key=_secret(environment, "PLIMSOLL_MODEL_KEY"),
            model_allow=_hosts(environment, "PLIMSOLL_MODEL_ALLOW"),
            model_timeout_s=_positive(environment, "PLIMSOLL_MODEL_TIMEOUT_S", cls.model_timeout_s),
            redis_away_rate_percent=_percent(
                environment, "PLIMSOLL_REDIS_AWAY_RATE_PERCENT", cls.redis_away_rate_percent
            ),
            recalibrate_days=_days(environment, "PLIMSOLL_RECALIBRATE_DAYS", cls.recalibrate_days),
            recalibrate_args=_words(environment, "PLIMSOLL_RECALIBRATE_ARGS"),
        )


def _words(environment: Mapping[str, str], name: str) -> tuple[str, ...]:
    """Return words as a shell would part them."""
    try:
        return tuple(shlex.split(environment.get(name, "")))
    except ValueError as wrong:
        raise ConfigurationError(f"{name}: give flags as on a command line ({wrong})") from None


def _positive(environment: Mapping[str, str], name: str, default: float) -> float:
    """Return a positive number of seconds from the environment."""
    text = environment.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 3600:
        raise ConfigurationError(f"{name}={text!r}: give a number of seconds above 0 and below 3600")
    return value


def _percent(environment: Mapping[str, str], name: str, default: int) -> int:
    """Return a whole percentage from the environment."""
    text = environment.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= 100):
        raise ConfigurationError(f"{name}={text!r}: give a whole number from 1 to 100")
    return int(text)


def _days(environment: Mapping[str, str], name: str, default: float) -> float:
    """Return a number of days from the environment."""
    text = environment.get(name)
    if text is None:
        return default
    try:
        return parse_days(text)
    except ValueError as wrong:
        raise ConfigurationError(f"{name}={text!r}: {wrong}") from None


def parse_days(text: str) -> float:
    """Return a number of days, fractions allowed; raises ValueError with what to give."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= MOST_DAYS:
        raise ValueError(f"give a number of days from 0 to {MOST_DAYS}")
    return value


def _hosts(environment: Mapping[str, str], name: str) -> tuple[str, ...]:
    """Return a comma-separated list of hosts, each with an optional port and scheme."""
    entries = tuple(entry.strip().rstrip("/") for entry in environment.get(name, "").split(",") if entry.strip())
    for entry in entries:
        try:
            parts = urlsplit(entry if "://" in entry else f"//{entry}")
            sound = bool(parts.hostname) and parts.scheme in ("", "http", "https") and parts.port != 0
            sound = sound and not (parts.path or parts.query or parts.fragment or "@" in entry or "*" in entry)
        except ValueError:
            sound = False
        if not sound:
            raise ConfigurationError(
                f"{name} holds {entry!r}: give hosts such as example.org, example.org:8443 or http://127.0.0.1:8000,"
                " separated by commas; there are no wildcards"
            )
    return entries


def _base_url(environment: Mapping[str, str], name: str) -> str | None:
    """Return an http or https URL, without the slash at its end."""
    url = environment.get(name, "").strip()
    if not url:
        return None
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
        sound = sound and parts.port != 0 and not (parts.query or parts.fragment)
    except ValueError:
        sound = False
    if not sound:
        raise ConfigurationError(f"{name}: give a URL such as https://example.org/v1, without user and query")
    return url.rstrip("/")


def _secret(environment: Mapping[str, str], name: str) -> str | None:
    """Return a secret that can stand in a header; it is never shown."""
    secret = environment.get(name, "").strip()
    if not (secret.isascii() and secret.isprintable()):
        raise ConfigurationError(f"{name}: give printable ASCII characters only (its value is not shown)")
    return secret or None


def _log_level(environment: Mapping[str, str]) -> str:
    """Return the log level's name in lower case."""
    level = environment.get("PLIMSOLL_LOG_LEVEL", "info").lower()
    if level not in ("debug", "info", "warning", "error"):
        raise ConfigurationError(f"PLIMSOLL_LOG_LEVEL={level!r}: give debug, info, warning or error")
    return level


_PARAMETERS = {
    "host": "host",
    "port": "port",
    "user": "user",
    "password": "password",
    "sslmode": "ssl",
    "target_session_attrs": "target_session_attrs",
}
"""Parameters of a libpq URI, and what the driver calls them."""


def _origins(environment: Mapping[str, str]) -> frozenset[str]:
    """Return the origins listed, in lower case (RFC 6454, section 4: scheme, host and port; no path)."""
    listed = [each.strip().lower() for each in environment.get("PLIMSOLL_ALLOWED_ORIGINS", "").split(",")]
    for origin in filter(None, listed):
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}" or not parts.netloc:
            raise ConfigurationError(
                f"PLIMSOLL_ALLOWED_ORIGINS: {origin!r} is no origin; give a list such as"
                " https://app.example.com,http://localhost:3000"
            )
    return frozenset(filter(None, listed))


def sqlalchemy_url(libpq_url: str) -> str:
    """Turn a libpq URI, `?host=/socket/dir` included, into SQLAlchemy's form for asyncpg, which calls `sslmode` `ssl`.

    Source: PostgreSQL manual, 32.1.1.2 "Connection URIs".
    """
    try:
        parts = urlsplit(libpq_url)
        _ = parts.port
    except ValueError as wrong:
        raise ConfigurationError(f"DATABASE_URL is not an address: {wrong}") from None
    if parts.scheme.split("+")[0] not in ("postgresql", "postgres"):
        raise ConfigurationError("DATABASE_URL must begin with postgresql://")
    given = parse_qsl(parts.query)
    for key, _ in given:
        if key not in _PARAMETERS:
            raise ConfigurationError(f"DATABASE_URL: the parameter {key} is not known; give {', '.join(_PARAMETERS)}")
    query = "&".join(f"{_PARAMETERS[key]}={quote(value, safe='/')}" for key, value in given)
    return f"postgresql+asyncpg://{parts.netloc}{parts.path}" + (f"?{query}" if query else "")


def is_utf8(text: str) -> bool:
    """Tell whether a text of the command line or the environment was valid UTF-8; Python keeps other bytes in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def stack_folder(name: str = "up", environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of an embedded stack: PLIMSOLL_STACK_DIR, or else `data/stack/<name>` of this checkout."""
    given = environment.get("PLIMSOLL_STACK_DIR")
    if given and not is_utf8(given):
        raise ConfigurationError("PLIMSOLL_STACK_DIR is not valid UTF-8")
    return Path(given) if given else Path("data") / "stack" / name


def given_addresses(environment: Mapping[str, str] = os.environ) -> tuple[str | None, str | None]:
    """Return DATABASE_URL and REDIS_URL, None where unset: what an embedded stack has to bring itself."""
    return environment.get("DATABASE_URL"), environment.get("REDIS_URL")


def settings_for(database_url: str, redis_url: str, environment: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings with these addresses and all else from the environment."""
    return Settings.from_environment({**environment, "DATABASE_URL": database_url, "REDIS_URL": redis_url})


def child_environment(settings: Settings, **additions: str) -> dict[str, str]:
    """Return the environment of a process of the service that is to work with these settings."""
    return {**os.environ, "DATABASE_URL": settings.database_url, "REDIS_URL": settings.redis_url, **additions}
