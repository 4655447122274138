"""Workspaces, agents, tokens, runs, steps, events, idempotency keys."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None

_Instant = sa.TIMESTAMP(timezone=True)


def upgrade() -> None:
    op.create_table(
        "workspaces",
        sa.Column("workspace_id", sa.Uuid, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("quota_class", sa.Text, nullable=False),
        sa.Column("created_at", _Instant, nullable=False),
    )
    op.create_table(
        "agents",
        sa.Column("agent_id", sa.Uuid, primary_key=True),
        sa.Column("workspace_id", sa.Uuid, sa.ForeignKey("workspaces.workspace_id"), nullable=False, index=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("script", postgresql.JSONB, nullable=False),
        sa.Column("created_at", _Instant, nullable=False),
    )
    op.create_table(
        "tokens",
        sa.Column("token_id", sa.Uuid, primary_key=True),
        sa.Column("prefix", sa.Text, nullable=False, index=True),
        sa.Column("token_hash", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("workspace_id", sa.Uuid, sa.ForeignKey("workspaces.workspace_id"), nullable=True),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("created_at", _Instant, nullable=False),
        sa.Column("expires_at", _Instant),
        sa.Column("revoked_at", _Instant),
    )
    op.create_table(
        "runs",
        sa.Column("run_id", sa.Uuid, primary_key=True),
        sa.Column("workspace_id", sa.Uuid, sa.ForeignKey("workspaces.workspace_id"), nullable=False),
        sa.Column("agent_id", sa.Uuid, sa.ForeignKey("agents.agent_id"), nullable=False),
        sa.Column("parent_run_id", sa.Uuid, sa.ForeignKey("runs.run_id")),
        sa.Column("depth", sa.Integer, nullable=False, server_default="0"),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("correlation_id", sa.Uuid, nullable=False),
        sa.Column("input_text", sa.Text, nullable=False, server_default=""),
        sa.Column("channel", sa.Text, nullable=False, server_default=""),
        # Text, not JSONB: that one writes numbers out in full, so that ten characters of a request, 1e131071, would
        # become 131 kB of every answer that shows the run.
        sa.Column("metadata", postgresql.JSON, nullable=False, server_default="{}"),
        sa.Column("group_id", sa.Text),
        sa.Column("expected_subruns", sa.Integer, nullable=False, server_default="0"),
        sa.Column("max_wait_seconds", sa.Float, nullable=False, server_default="60"),
        sa.Column("spawned_subruns", sa.Integer, nullable=False, server_default="0"),
        sa.Column("pending_subruns", sa.Integer, nullable=False, server_default="0"),
        sa.Column("failed_subruns", sa.Integer, nullable=False, server_default="0"),
        sa.Column("script_position", sa.Integer, nullable=False, server_default="0"),
        sa.Column("step_count", sa.Integer, nullable=False, server_default="0"),
        sa.Column("last_seq", sa.Integer, nullable=False, server_default="0"),
        sa.Column("ticks", sa.Integer, nullable=False, server_default="0"),
        sa.Column("epoch", sa.Integer, nullable=False, server_default="0"),
        sa.Column("next_tick_at", _Instant),
        sa.Column("wait_until", _Instant),
        sa.Column("error_summary", sa.Text),
        sa.Column("created_at", _Instant, nullable=False),
        sa.Column("started_at", _Instant),
        sa.Column("ended_at", _Instant),
        sa.CheckConstraint(
            "(ended_at IS NULL) = (status NOT IN ('COMPLETED','FAILED','CANCELED'))", name="runs_ended_check"
        ),
        sa.CheckConstraint("pending_subruns BETWEEN 0 AND spawned_subruns", name="runs_pending_check"),
        sa.CheckConstraint("ended_at IS NULL OR next_tick_at IS NULL", name="runs_final_is_never_due_check"),
        # Every tick rewrites the row: room on its page keeps the new version beside the old one.
        postgresql_with={"fillfactor": 80},
    )
    op.create_index("runs_due_idx", "runs", ["next_tick_at"], postgresql_where=sa.text("next_tick_at IS NOT NULL"))
    op.create_index("runs_live_idx", "runs", ["workspace_id"], postgresql_where=sa.text("ended_at IS NULL"))
    op.create_index("runs_newest_idx", "runs", ["workspace_id", sa.text("run_id DESC")])
    op.create_index(
        "runs_children_idx", "runs", ["parent_run_id"], postgresql_where=sa.text("parent_run_id IS NOT NULL")
    )
    op.create_table(
        "steps",
        sa.Column("run_id", sa.Uuid, sa.ForeignKey("runs.run_id"), primary_key=True),
        sa.Column("step_index", sa.Integer, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("payload", postgresql.JSONB, nullable=False),
        sa.Column("correlation_id", sa.Uuid, nullable=False),
        sa.Column("created_at", _Instant, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("run_id", sa.Uuid, sa.ForeignKey("runs.run_id"), primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("event_type", sa.Text, nullable=False),
        sa.Column("payload", postgresql.JSONB, nullable=False),
        sa.Column("correlation_id", sa.Uuid, nullable=False),
        sa.Column("created_at", _Instant, nullable=False),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("workspace_id", sa.Uuid, sa.ForeignKey("workspaces.workspace_id"), primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("body_hash", sa.LargeBinary, nullable=False),
        sa.Column("run_id", sa.Uuid, nullable=False),
        sa.Column("created_at", _Instant, nullable=False, index=True),
    )


def downgrade() -> None:
    for table in ("idempotency_keys", "events", "steps", "runs", "tokens", "agents", "workspaces"):
        op.drop_table(table)
