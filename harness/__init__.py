"""Makes load, records it, judges it.

Reading order: `sample` (the row everything turns on), `scenario` (what a user does), `client` (how it reaches the
service), `generator` (when), `analysis/` (what the rows prove), `report` (what a person and a CI job see).
"""
