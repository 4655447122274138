"""Definitions of tools, tool calls, agents that are a model, bounds of runs."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"

_Instant = sa.TIMESTAMP(timezone=True)


def upgrade() -> None:
    op.add_column("runs", sa.Column("tool_call_id", sa.Uuid))
    op.add_column("runs", sa.Column("tool_calls", sa.Integer, nullable=False, server_default="0"))
    op.add_column("agents", sa.Column("model", postgresql.JSONB))
    op.add_column("agents", sa.Column("max_steps", sa.Integer, nullable=False, server_default="50"))
    op.add_column("agents", sa.Column("max_tool_calls", sa.Integer, nullable=False, server_default="20"))
    # No script that was accepted before may now be too long.
    op.execute("UPDATE agents SET max_steps = greatest(50, jsonb_array_length(script))")
    op.create_table(
        "tool_definitions",
        sa.Column("workspace_id", sa.Uuid, sa.ForeignKey("workspaces.workspace_id"), primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("tool", sa.Text, nullable=False),
        sa.Column("risk", sa.Text, nullable=False),
        sa.Column("needs_approval", sa.Boolean, nullable=False),
        sa.Column("arguments_schema", postgresql.JSONB, nullable=False),
        sa.Column("timeout_seconds", sa.Float, nullable=False),
        sa.Column("created_at", _Instant, nullable=False),
    )
    op.create_table(
        "tool_calls",
        sa.Column("tool_call_id", sa.Uuid, primary_key=True),
        sa.Column("workspace_id", sa.Uuid, nullable=False),
        sa.Column("run_id", sa.Uuid, sa.ForeignKey("runs.run_id"), nullable=False),
        sa.Column("step_index", sa.Integer, nullable=False),
        sa.Column("tool", sa.Text, nullable=False),
        sa.Column("implementation", sa.Text, nullable=False),
        sa.Column("arguments", postgresql.JSONB, nullable=False),
        sa.Column("risk", sa.Text, nullable=False),
        sa.Column("timeout_seconds", sa.Float, nullable=False),
        sa.Column("model_call_id", sa.Text),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("result", postgresql.JSONB),
        sa.Column("error", sa.Text),
        sa.Column("reason", sa.Text),
        sa.Column("decided_by", sa.Uuid),
        sa.Column("created_at", _Instant, nullable=False),
        sa.Column("decided_at", _Instant),
        sa.Column("started_at", _Instant),
        sa.Column("epoch", sa.Integer),
        sa.Column("lease_until", _Instant),
        sa.Column("ended_at", _Instant),
        sa.CheckConstraint(
            "(ended_at IS NULL) = (status IN ('PENDING','APPROVED','RUNNING'))", name="tool_calls_ended_check"
        ),
        sa.CheckConstraint(
            "started_at IS NOT NULL OR status NOT IN ('RUNNING','COMPLETED')", name="tool_calls_started_check"
        ),
    )
    op.create_index(
        "tool_calls_open_idx",
        "tool_calls",
        ["run_id"],
        unique=True,
        postgresql_where=sa.text("status IN ('PENDING','APPROVED','RUNNING')"),
    )
    op.create_index(
        "tool_calls_pending_idx", "tool_calls", ["workspace_id"], postgresql_where=sa.text("status = 'PENDING'")
    )
    op.create_index("tool_calls_newest_idx", "tool_calls", ["workspace_id", sa.text("tool_call_id DESC")])
    op.create_index("tool_calls_run_idx", "tool_calls", ["run_id"])


def downgrade() -> None:
    op.drop_table("tool_calls")
    op.drop_table("tool_definitions")
    for column in ("max_tool_calls", "max_steps", "model"):
        op.drop_column("agents", column)
    for column in ("tool_calls", "tool_call_id"):
        op.drop_column("runs", column)
