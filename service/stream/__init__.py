"""Live streams: sockets that follow a run or a workspace, and take commands (docs/streams.md).

Reading order: `admission` (who may open one), `sockets` (one socket's life), `tails` (what it must be pushed next: the
heart), `hub` (where news comes from: Redis, and a look at the database every second), `history` (what is read there),
`outbox` (what waits to be sent), `commands` (what a client may ask for), `frames` (what goes over the wire), `timing`
(every interval), `protocol` (the server below). How many sockets may be open: `quota/socket_leases.py`.

The protocol: subscribe, replay, follow. A tail first subscribes to its workspace's channel, then reads the database
from the client's `since_seq` on, then pushes what Redis brings, and falls back to reading whenever a number is missing.
Redis may lose, delay or repeat anything; numbers are given by the database under the run's row lock, so a tail that
pushes only `last + 1` and reads otherwise can neither skip an event nor push one twice.
"""
