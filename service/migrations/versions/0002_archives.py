"""Archives: bundles of finished runs, and how far a run's events were archived and compacted."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"

_Instant = sa.TIMESTAMP(timezone=True)


def upgrade() -> None:
    op.add_column("runs", sa.Column("archived_seq", sa.Integer, nullable=False, server_default="0"))
    op.add_column("runs", sa.Column("compacted_through_seq", sa.Integer, nullable=False, server_default="0"))
    # Its predicate leaves out `archived_seq < last_seq`: an index that looks at last_seq would make every appended
    # event rewrite all index entries of its run (no heap-only update).
    op.create_index("runs_ended_idx", "runs", ["ended_at", "run_id"], postgresql_where=sa.text("ended_at IS NOT NULL"))
    # A refused create gives its key back by the run that it would have made.
    op.create_index("idempotency_keys_run_id_idx", "idempotency_keys", ["run_id"])
    op.create_table(
        "run_archives",
        sa.Column("archive_id", sa.Uuid, primary_key=True),
        sa.Column("run_id", sa.Uuid, nullable=False),
        sa.Column("workspace_id", sa.Uuid, sa.ForeignKey("workspaces.workspace_id"), nullable=False),
        sa.Column("path", sa.Text, nullable=False, unique=True),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("size_bytes", sa.Integer, nullable=False),
        sa.Column("schema_version", sa.Integer, nullable=False),
        sa.Column("last_seq", sa.Integer, nullable=False),
        sa.Column("compacted_through_seq", sa.Integer, nullable=False),
        sa.Column("compacted_types", postgresql.ARRAY(sa.Text), nullable=False, server_default="{}"),
        sa.Column("created_at", _Instant, nullable=False),
        sa.UniqueConstraint("run_id", "last_seq", name="run_archives_run_id_last_seq_key"),
    )


def downgrade() -> None:
    op.drop_table("run_archives")
    op.drop_index("idempotency_keys_run_id_idx", "idempotency_keys")
    op.drop_index("runs_ended_idx", "runs")
    op.drop_column("runs", "compacted_through_seq")
    op.drop_column("runs", "archived_seq")
