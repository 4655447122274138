"""Recalibrations, one at a time, and the requests that were admitted and refused under each quota revision."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"

_Instant = sa.TIMESTAMP(timezone=True)


def upgrade() -> None:
    op.create_table(
        "quota_recalibrations",
        sa.Column("recalibration_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("phase", sa.Text, nullable=False),
        sa.Column("begun_at", _Instant, nullable=False),
        sa.Column("entered_at", _Instant, nullable=False),
        sa.Column("ended_at", _Instant),
        sa.Column("lease_until", _Instant),
        sa.Column("by", sa.Text, nullable=False),
        sa.Column("revision", sa.Integer, sa.ForeignKey("quota_revisions.revision")),
        sa.Column("against", sa.Integer, sa.ForeignKey("quota_revisions.revision")),
        sa.Column("plan", postgresql.JSON, nullable=False),
        sa.Column("moves", postgresql.JSON, nullable=False, server_default="[]"),
        sa.CheckConstraint(
            "phase IN ('measuring','shadow','waiting','canary','watched','unchanged','kept','rolled_back','refused',"
            "'overtaken','abandoned')",
            name="quota_recalibrations_phase_check",
        ),
        sa.CheckConstraint(
            "(ended_at IS NULL) = (phase IN ('measuring','shadow','waiting','canary','watched'))",
            name="quota_recalibrations_ended_check",
        ),
        sa.CheckConstraint(
            "(lease_until IS NOT NULL) = (phase = 'measuring')", name="quota_recalibrations_lease_check"
        ),
    )
    # Two at once are impossible, whatever a program does.
    op.create_index(
        "quota_recalibrations_open_idx",
        "quota_recalibrations",
        [sa.text("(ended_at IS NULL)")],
        unique=True,
        postgresql_where=sa.text("ended_at IS NULL"),
    )
    op.create_table(
        "quota_request_counts",
        sa.Column("minute", _Instant, primary_key=True),
        sa.Column("revision", sa.Integer, sa.ForeignKey("quota_revisions.revision"), primary_key=True),
        sa.Column("limit_name", sa.Text, primary_key=True),
        sa.Column("asked", sa.BigInteger, nullable=False),
        sa.Column("refused", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("quota_request_counts")
    op.drop_table("quota_recalibrations")
