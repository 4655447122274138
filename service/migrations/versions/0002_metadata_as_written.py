"""Keep a run's metadata as the caller wrote it.

JSONB holds numbers as decimals and writes them out in full: ten characters of a request, 1e131071, became 131 kB of
every answer that shows the run.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    _change(postgresql.JSON)


def downgrade() -> None:
    _change(postgresql.JSONB)


def _change(wanted: type[sa.types.TypeEngine[object]]) -> None:
    """Turn the column into another kind of JSON."""
    op.alter_column(
        "runs", "metadata", type_=wanted(), postgresql_using=f"metadata::{wanted.__name__.lower()}", server_default="{}"
    )
