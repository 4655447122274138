"""What may be asked of the notebook of quotas, checked before anything slow is imported: see `request`.

The types of parameters are checked by `notebooks`; here are the bounds that a type cannot say, and the file that holds
the table in force. Next: `quotatable`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import BadUsage
from harness.folders import find_in_checkout
from service.errors import Invalid
from service.quota.tables import LARGEST_BYTES, Tables, parse

NOTEBOOK = "quota_table"

TENANTS_MAX = 100_000


def check_quota_parameters(values: Mapping[str, Any]) -> None:
    """Raise BadUsage for parameters of the notebook that no table of quotas can have."""
    fraction = values.get("fraction")
    if fraction is not None and not 0.0 < fraction <= 1.0:
        raise BadUsage(f"--parameter: fraction lies above 0 and at most at 1, not {fraction}")
    for tenants in values.get("tenants", ()):
        if not 1 <= tenants <= TENANTS_MAX:
            raise BadUsage(f"--parameter: tenants are from 1 to {TENANTS_MAX:,}, not {tenants}")
    for share in values.get("busy_shares", ()):
        if not 0.0 <= share <= 1.0:
            raise BadUsage(f"--parameter: busy_shares lie from 0 to 1, not {share}")
    if values.get("active"):
        read_active(values["active"])


def read_active(file: str | Path) -> Tables:
    """Return the tables of a file as `quotas show --json` prints it; raises BadUsage that names what is wrong."""
    path = find_in_checkout(Path(file))
    try:
        with path.open("rb") as opened:
            return parse(opened.read(LARGEST_BYTES + 1)).limits
    except OSError as fault:
        raise BadUsage(f"--parameter: active: {file} cannot be read ({fault.strerror})") from None
    except Invalid as fault:
        raise BadUsage(f"--parameter: active: {file}: {fault}") from None
