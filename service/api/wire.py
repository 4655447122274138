"""How runs, steps and events look on the wire, as the SQL that builds their JSON.

PostgreSQL builds the JSON, so a read makes no Python object for what it only passes on.
"""

RUN_JSON = """json_build_object(
    'run_id', r.run_id, 'workspace_id', r.workspace_id, 'agent_id', r.agent_id, 'parent_run_id', r.parent_run_id,
    'status', r.status, 'correlation_id', r.correlation_id, 'input_text', r.input_text, 'channel', r.channel,
    'metadata', r.metadata, 'group_id', r.group_id, 'expected_subruns', r.expected_subruns,
    'max_wait_seconds', r.max_wait_seconds, 'spawned_subruns', r.spawned_subruns,
    'pending_subruns', r.pending_subruns, 'step_count', r.step_count, 'last_seq', r.last_seq, 'ticks', r.ticks,
    'paused_from', r.paused_from, 'error_summary', r.error_summary, 'created_at', r.created_at,
    'started_at', r.started_at, 'ended_at', r.ended_at)"""
"""A run, from a row `r` of runs."""

STEPS_JSON = """(SELECT coalesce(json_agg(json_build_object(
        'step_index', s.step_index, 'kind', s.kind, 'payload', s.payload,
        'correlation_id', s.correlation_id, 'created_at', s.created_at) ORDER BY s.step_index), '[]')
    FROM steps s WHERE s.run_id = r.run_id)"""
"""All steps of `r`."""

EVENTS_JSON = """(SELECT coalesce(json_agg(json_build_object(
        'run_id', e.run_id, 'seq', e.seq, 'event_type', e.event_type, 'payload', e.payload,
        'correlation_id', e.correlation_id, 'created_at', e.created_at) ORDER BY e.seq), '[]')
    FROM events e WHERE e.run_id = r.run_id AND e.seq > q.since_seq)"""
"""The events of `r` after `q.since_seq`."""

CHILDREN_JSON = """(SELECT coalesce(json_agg(json_build_object(
        'run_id', c.run_id, 'status', c.status, 'group_id', c.group_id, 'last_seq', c.last_seq,
        'ticks', c.ticks, 'step_count', c.step_count, 'error_summary', c.error_summary,
        'created_at', c.created_at, 'ended_at', c.ended_at) ORDER BY c.run_id), '[]')
    FROM runs c WHERE c.parent_run_id = r.run_id)"""
"""The subruns of `r`, oldest first."""

GROUPS_JSON = """(SELECT coalesce(json_agg(json_build_object(
        'group_id', g.group_id, 'join_policy', g.join_policy, 'failure_policy', g.failure_policy, 'quorum', g.quorum,
        'timeout_seconds', g.timeout_seconds, 'deadline_at', g.deadline_at, 'spawned', g.spawned,
        'pending', g.pending, 'failed', g.failed, 'state', g.state, 'decided_at', g.decided_at)
        ORDER BY g.group_id), '[]')
    FROM subrun_groups g WHERE g.run_id = r.run_id)"""
"""The groups of `r`'s subruns."""
