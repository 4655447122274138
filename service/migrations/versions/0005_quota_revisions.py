"""Quota revisions with their history, overrides of single workspaces, what a shadow revision would have refused."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"

_Instant = sa.TIMESTAMP(timezone=True)

_FIRST = """{
    "default": {
        "run_creation": {"per_s": 10.29, "burst": 11}, "subrun_spawn": {"per_s": 2.14, "burst": 5},
        "snapshot_poll": {"per_s": 18.49, "burst": 19}, "tick": {"per_s": 41.0, "burst": 41},
        "live_parent_runs": 5, "live_runs": 12, "pending_subruns": 4, "websockets": 20, "websockets_per_user": 5,
        "pending_tool_calls": 6, "pending_tool_calls_per_run": 1
    },
    "calibration": {
        "run_creation": null, "subrun_spawn": null, "snapshot_poll": null, "tick": null, "live_parent_runs": null,
        "live_runs": null, "pending_subruns": null, "websockets": null, "websockets_per_user": null,
        "pending_tool_calls": null, "pending_tool_calls_per_run": null
    }
}"""

_NEVER = """
    CREATE FUNCTION quota_history_is_kept() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '% of % is not allowed: quota revisions and their history are kept as they are',
            TG_OP, TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
    END $$
"""

_ONLY_THE_STATE = """
    CREATE FUNCTION quota_revision_changes_state_only() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF (NEW.revision, NEW.limits::text, NEW.provenance::text, NEW.proposed_at)
            IS DISTINCT FROM (OLD.revision, OLD.limits::text, OLD.provenance::text, OLD.proposed_at) THEN
            RAISE EXCEPTION 'quota revision % is immutable: propose another one', OLD.revision
                USING ERRCODE = 'restrict_violation';
        END IF;
        IF (OLD.state, NEW.state) NOT IN (
            ('proposed', 'shadow'), ('proposed', 'active'), ('proposed', 'rejected'), ('shadow', 'proposed'),
            ('shadow', 'active'), ('shadow', 'rejected'), ('active', 'superseded'), ('superseded', 'active')
        ) THEN
            RAISE EXCEPTION 'quota revision % cannot go from % to %', OLD.revision, OLD.state, NEW.state
                USING ERRCODE = 'restrict_violation';
        END IF;
        RETURN NEW;
    END $$
"""

_ONE_IS_ACTIVE = """
    CREATE FUNCTION one_quota_revision_is_active() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NOT EXISTS (SELECT FROM quota_revisions WHERE state = 'active') THEN
            RAISE EXCEPTION 'no quota revision would be active' USING ERRCODE = 'restrict_violation';
        END IF;
        RETURN NULL;
    END $$
"""

_TRIGGERS = (
    """
    CREATE TRIGGER quota_revisions_state BEFORE UPDATE ON quota_revisions
    FOR EACH ROW EXECUTE FUNCTION quota_revision_changes_state_only()
    """,
    # At the end of the transaction: on the way from one active revision to the next there is none.
    """
    CREATE CONSTRAINT TRIGGER quota_revisions_active AFTER UPDATE ON quota_revisions
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION one_quota_revision_is_active()
    """,
    """
    CREATE TRIGGER quota_revisions_kept BEFORE DELETE OR TRUNCATE ON quota_revisions
    FOR EACH STATEMENT EXECUTE FUNCTION quota_history_is_kept()
    """,
    """
    CREATE TRIGGER quota_changes_kept BEFORE UPDATE OR DELETE OR TRUNCATE ON quota_changes
    FOR EACH STATEMENT EXECUTE FUNCTION quota_history_is_kept()
    """,
)


def upgrade() -> None:
    op.create_table(
        "quota_revisions",
        sa.Column("revision", sa.Integer, primary_key=True, autoincrement=False),
        # JSON, not JSONB: kept as it was written.
        sa.Column("limits", postgresql.JSON, nullable=False),
        sa.Column("provenance", postgresql.JSON, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("proposed_at", _Instant, nullable=False),
        sa.CheckConstraint(
            "state IN ('proposed','shadow','active','superseded','rejected')", name="quota_revisions_state_check"
        ),
    )
    for state in ("active", "shadow"):
        op.create_index(
            f"quota_revisions_{state}_idx",
            "quota_revisions",
            ["state"],
            unique=True,
            postgresql_where=sa.text(f"state = '{state}'"),
        )
    op.create_table(
        "quota_changes",
        sa.Column("change_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("revision", sa.Integer, sa.ForeignKey("quota_revisions.revision"), nullable=False, index=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("from_state", sa.Text),
        sa.Column("to_state", sa.Text, nullable=False),
        sa.Column("replaced", sa.Integer, sa.ForeignKey("quota_revisions.revision")),
        sa.Column("at", _Instant, nullable=False),
        sa.Column("by", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("findings", postgresql.JSON, nullable=False, server_default="[]"),
    )
    op.create_table(
        "quota_overrides",
        sa.Column("workspace_id", sa.Uuid, sa.ForeignKey("workspaces.workspace_id"), primary_key=True),
        sa.Column("limit_name", sa.Text, primary_key=True),
        sa.Column("value", postgresql.JSON, nullable=False),
        sa.Column("set_at", _Instant, nullable=False),
        sa.Column("set_by", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
    )
    op.create_table(
        "quota_shadow_counts",
        sa.Column("revision", sa.Integer, sa.ForeignKey("quota_revisions.revision"), primary_key=True),
        sa.Column("limit_name", sa.Text, primary_key=True),
        sa.Column("asked", sa.BigInteger, nullable=False),
        sa.Column("refused", sa.BigInteger, nullable=False),
        sa.Column("newly_refused", sa.BigInteger, nullable=False),
        sa.Column("first_at", _Instant, nullable=False),
        sa.Column("last_at", _Instant, nullable=False),
    )
    op.execute(
        sa.text(
            "INSERT INTO quota_revisions (revision, limits, provenance, state, proposed_at)"
            " VALUES (1, CAST(:limits AS json), CAST(:provenance AS json), 'active', now())"
        ).bindparams(limits=_FIRST, provenance='{"author": "installation", "note": "the table to start with"}')
    )
    op.execute(
        "INSERT INTO quota_changes (revision, kind, to_state, at, by) VALUES (1, 'install', 'active', now(), 'migrate')"
    )
    for statement in (_NEVER, _ONLY_THE_STATE, _ONE_IS_ACTIVE, *_TRIGGERS):
        op.execute(statement)


def downgrade() -> None:
    for table in ("quota_shadow_counts", "quota_overrides", "quota_changes", "quota_revisions"):
        op.drop_table(table)
    for function in (
        "one_quota_revision_is_active",
        "quota_revision_changes_state_only",
        "quota_history_is_kept",
    ):
        op.execute(f"DROP FUNCTION {function}")
