"""Every interval of the streams, in one place; tests and campaigns shorten them."""

from __future__ import annotations

from dataclasses import dataclass

from service.quota.socket_leases import LEASE_S, RENEW_EVERY_S


@dataclass(frozen=True)
class Timing:
    """How long what may take, seconds."""

    look_every_s: float = 1.0
    """How long at most an event waits whose publication was lost: the hub looks at the database this often."""
    send_patience_s: float = 5.0
    """How long a batch of frames may wait for the client to take it, before the client is too slow."""
    lag_patience_s: float = 10.0
    """How long a client whose outbox overflowed may take to catch up, before it is too slow."""
    recheck_s: float = 30.0
    """How often the token of an open socket is checked again."""
    lease_s: float = LEASE_S
    """How long a socket's places outlive its process."""
    renew_every_s: float = RENEW_EVERY_S
    """How often places are renewed."""


USUAL = Timing()
"""What the service runs with."""
