"""Private PostgreSQL and Redis for one machine: the production components, nobody else's, in one folder.

`with Stack(folder) as stack:` gives `stack.database_url` and `stack.redis_url`. Reading order: `stack` (the lock, the
two servers together, what other commands are told), `place` (where files may live, and as whom), `postgres`, `redis`.
"""

from service.embedded.stack import RunningStack, Stack, StackLocked, running_stack

__all__ = ["RunningStack", "Stack", "StackLocked", "running_stack"]
