"""How much a workspace may ask for, and who says so.

Reading order: `limits` (the names), `tables` (the values as a file), `revisions` and `overrides` (which values there
are), `inforce` (which hold for a workspace right now); then what holds them: `gate` and `rates` with gcra.lua (`local`
while Redis is away), `ticks` with ticks.lua for workers' turns, `caps` in PostgreSQL, `keeper` and `socket_leases` for
sockets; then what looks on: `guardrails`, `shadow`, `refusals`, `usage`.
"""
