"""How much a workspace may ask for, and who says so.

Reading order: `limits` (the names), `tables` (the values as a file), `revisions` and `overrides` (which values there
are), `inforce` (which hold for a workspace right now); then what holds them: `gate` and `rates` with gcra.lua (`local`
while Redis is away), `ticks` with ticks.lua for workers' turns, `caps` in PostgreSQL, `keeper` and `socket_leases` for
sockets; then what looks on: `guardrails`, `shadow` with its `tally`, `refusals`, `usage`, `history`.

What moves the values without a person has six files: `recalibration_evidence`, `recalibration` and
`recalibration_cycle` decide and are pure, `recalibration_counts` knows the traffic, `recalibration_record` carries out
and `recalibration_looks` has that done once a minute.
"""
