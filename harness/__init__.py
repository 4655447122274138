"""Makes load, records it, judges it.

Reading order: `sample` (the row everything turns on), `scenario` (what a user does) with `api` (which requests that is)
and `client` (how they reach the service), `arrivals` and `generator` (when), `recorder` and `sampleset` (how rows are
kept and read back), `measurement` (all of it, once), `analysis/` (what the rows prove), `report` (what a person and a
CI job see).
"""
