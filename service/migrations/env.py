"""Alembic's entry: runs the migrations on the connection that `service.db.migrate` hands over."""

from alembic import context

import service.archive
import service.auth
import service.events
import service.joins
import service.quota.overrides
import service.quota.shadow
from service.db import Base

# Importing them registers every table on Base.
_MAPPED = (
    service.archive.RunArchive,
    service.auth.Token,
    service.events.Event,
    service.joins.SubrunGroup,
    service.quota.overrides.QuotaOverride,
    service.quota.shadow.QuotaShadowCount,
)

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()
