"""Groups of subruns; pauses; when a step is due, claimed or not; how often a turn was tried in vain."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_Instant = sa.TIMESTAMP(timezone=True)


def upgrade() -> None:
    op.add_column("runs", sa.Column("step_due_at", _Instant))
    op.add_column("runs", sa.Column("paused_from", sa.Text))
    op.add_column("runs", sa.Column("paused_at", _Instant))
    op.add_column("runs", sa.Column("vain_attempts", sa.Integer, nullable=False, server_default="0"))
    op.execute("UPDATE runs SET step_due_at = next_tick_at WHERE status IN ('PENDING', 'RUNNING')")
    op.create_check_constraint("runs_paused_from_check", "runs", "(status = 'PAUSED') = (paused_from IS NOT NULL)")
    op.create_check_constraint("runs_paused_at_check", "runs", "(status = 'PAUSED') = (paused_at IS NOT NULL)")
    op.create_check_constraint("runs_paused_is_never_due_check", "runs", "status <> 'PAUSED' OR next_tick_at IS NULL")
    op.create_table(
        "subrun_groups",
        sa.Column("run_id", sa.Uuid, sa.ForeignKey("runs.run_id"), primary_key=True),
        sa.Column("group_id", sa.Text, primary_key=True),
        sa.Column("join_policy", sa.Text, nullable=False),
        sa.Column("failure_policy", sa.Text, nullable=False),
        sa.Column("quorum", sa.Integer),
        sa.Column("timeout_seconds", sa.Float),
        sa.Column("deadline_at", _Instant),
        sa.Column("spawned", sa.Integer, nullable=False),
        sa.Column("pending", sa.Integer, nullable=False),
        sa.Column("failed", sa.Integer, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("decided_at", _Instant),
        sa.CheckConstraint(
            "pending >= 0 AND failed >= 0 AND pending + failed <= spawned", name="subrun_groups_counts_check"
        ),
        sa.CheckConstraint("(state = 'WAITING') = (decided_at IS NULL)", name="subrun_groups_decided_check"),
        sa.CheckConstraint("(join_policy = 'QUORUM') = (quorum IS NOT NULL)", name="subrun_groups_quorum_check"),
        postgresql_with={"fillfactor": 80},
    )
    # Until now every child was waited for and every failure counted.
    op.execute("""
        INSERT INTO subrun_groups (run_id, group_id, join_policy, failure_policy, spawned, pending, failed,
                                   state, decided_at)
        SELECT parent_run_id, group_id, 'WAIT_ALL', 'FAIL_FAST', count(*),
               count(*) FILTER (WHERE ended_at IS NULL),
               count(*) FILTER (WHERE status IN ('FAILED', 'CANCELED')),
               CASE WHEN count(*) FILTER (WHERE status IN ('FAILED', 'CANCELED')) > 0 THEN 'FAILED'
                    WHEN count(*) FILTER (WHERE ended_at IS NULL) = 0 THEN 'JOINED' ELSE 'WAITING' END,
               CASE WHEN count(*) FILTER (WHERE status IN ('FAILED', 'CANCELED')) > 0
                      OR count(*) FILTER (WHERE ended_at IS NULL) = 0 THEN now() END
        FROM runs WHERE parent_run_id IS NOT NULL AND group_id IS NOT NULL GROUP BY parent_run_id, group_id
    """)


def downgrade() -> None:
    op.drop_table("subrun_groups")
    for column in ("vain_attempts", "paused_at", "paused_from", "step_due_at"):
        op.drop_column("runs", column)
