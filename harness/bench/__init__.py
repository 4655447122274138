"""What each part costs beside its floor: ratios measured in one run (`python -m harness bench`).

A floor is the least that the same machine, at the same moment, needs for the same kind of work: the bare framework
without a service in it, PostgreSQL's own benchmark, a Redis pipeline, a server that answers canned bytes. Absolute
rates belong to a machine and a moment; the ratio of a path to its floor travels. So everything is repeated in turn,
path beside floor, and no rate is ever asserted.

Reading order: `session` (what is measured in which order), `service_paths`, `ticks`, `recording` (the paths),
`floors` and the two small servers `bare_app` and `null_server`, `load` (the closed-loop generator), `stage` (private
servers and processes), `results` (statistics, the file, the table: pure).
"""

GROUPS = ("create", "spawn", "snapshot", "304", "ticks", "harness", "analysis")
"""What can be measured by itself; floors come along as they are needed."""
