"""What the service tells about itself: metrics and structured logs. Server-Timing is written in `exchange`.

With several processes on one port (`serve --processes N`) prometheus-client keeps its values in files that all of them
share; the command sets PROMETHEUS_MULTIPROC_DIR before this module is imported.
"""

from __future__ import annotations

import logging
import sys

import structlog
from prometheus_client import Counter, Gauge, Histogram

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.375, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds, seconds: the targets of data/slo.yaml are among them, so that a p95 below 375 ms can be read off."""

REQUEST_SECONDS = Histogram(
    "plimsoll_http_request_seconds",
    "Time from the request's head to the end of its response.",
    ["route", "method", "status"],
    buckets=LATENCY_BUCKETS_S,
)
DB_WRITE_SECONDS = Histogram(
    "plimsoll_db_write_seconds", "Duration of one write transaction, commit included.", ["writer"]
)
GROUP_SIZE = Histogram(
    "plimsoll_group_commit_writes",
    "Writes that shared one transaction.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)
PUBLISH_LAG_SECONDS = Histogram(
    "plimsoll_publish_lag_seconds",
    "From a commit to the moment at which Redis had handed its events to the subscribers.",
    buckets=LATENCY_BUCKETS_S,
)
ANNOUNCEMENTS_LOST = Counter(
    "plimsoll_announcements_lost_total",
    "Publications and rings that Redis did not take; the sweeper makes up for them.",
)
REDIS_AWAY = Gauge(
    "plimsoll_redis_away", "Processes that have given Redis up until it answers again.", multiprocess_mode="livesum"
)
RATES_LOCAL = Counter(
    "plimsoll_rates_local_total",
    "Requests whose rates were checked in their own process, because Redis did not answer.",
    ["outcome"],
)
OPEN_SOCKETS = Gauge("plimsoll_open_sockets", "Sockets that are open.", ["stream"], multiprocess_mode="livesum")
SOCKETS_ENDED = Counter("plimsoll_sockets_ended_total", "Sockets that ended, by the service's close code.", ["code"])
SLOW_CLIENTS_EVICTED = Counter(
    "plimsoll_slow_clients_evicted_total", "Sockets closed because their client was too slow."
)
FRAMES_SENT = Counter("plimsoll_frames_sent_total", "Frames sent to sockets: pushes and answers.")
GAPS_FILLED = Counter(
    "plimsoll_stream_gaps_filled_total", "Times at which a stream read the database for what Redis had not brought."
)
SOCKET_COMMANDS = Counter("plimsoll_socket_commands_total", "Commands answered on sockets.", ["cmd", "status"])
SHADOW_UNCHECKED = Counter(
    "plimsoll_quota_shadow_unchecked_total",
    "Requests that the shadow revision was not asked about.",
)
QUOTA_REFUSALS = Counter(
    "plimsoll_quota_refusals_total",
    "Requests refused by a rate or a cap; `quota.refusals` says which workspaces are named.",
    ["limit", "workspace"],
)


def configure_logging(level: str) -> None:
    """Write log lines as JSON to stderr, from `level` upwards."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        # One write for a line and its end: several processes and threads share standard error.
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,  # nothing is logged on a hot path, and a test may listen for a while
    )
