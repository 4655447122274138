"""Under which tick rate a run's step was delayed: whoever was delayed under another one than is in force is called."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("runs", sa.Column("delayed_under", sa.Text))
    op.create_check_constraint(
        "runs_only_a_step_is_delayed_check", "runs", "delayed_under IS NULL OR step_due_at IS NOT NULL"
    )
    # Until now the least that the clock knows, between a run's step and the time at which it was due, was the mark. A
    # rate of that code is in force nowhere, so these are called, and queue again.
    op.execute(
        "UPDATE runs SET delayed_under = 'unknown', next_tick_at = step_due_at"
        " WHERE next_tick_at = step_due_at + interval '1 microsecond'"
    )
    op.create_index(
        "runs_delayed_idx",
        "runs",
        ["workspace_id", "delayed_under"],
        postgresql_where=sa.text("delayed_under IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("runs_delayed_idx", "runs")
    op.drop_constraint("runs_only_a_step_is_delayed_check", "runs")
    op.drop_column("runs", "delayed_under")
