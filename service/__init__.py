"""Accepts runs of AI agents, advances them, and guards itself.

Reading order: `app` (where a request enters), `api/` (one file per noun), `commits` (where writes become one
transaction), `events` (what is published and followed), `stream/` (sockets that follow it), `tick` and `worker` (how a
run advances), `archive/` (what becomes of it), then the pure parts they rest on: `runs`, `joins`, `quota/`.
"""
