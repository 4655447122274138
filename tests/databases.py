"""Databases for tests, given in turn: new ones, and such as are again what they were when they were new.

To make a database takes PostgreSQL a fifth of a second and some three hundred files, and to take all of them away took
longer than a test may last on a busy machine. One that a test is done with is therefore emptied and given to a later
test, if nothing tells it from a new one: nobody is connected, its tables are truncated (so that rows lie and plans come
out as in new tables) and hold what migrations wrote, and its catalogue is word for word what it was. Any other is left
alone, and a new one is made. Several are in use in turn, so that what one test left running does not meet the next.
"""

from __future__ import annotations

import collections
import itertools
import subprocess

from service.db import migrate
from service.embedded.postgres import Postgres

IN_TURN = 8

CATALOGUE = """
SELECT md5(string_agg(line, ',' ORDER BY line)) FROM (
    SELECT concat_ws(' ', 'table', oid, relname, relkind, relowner, relpersistence, relchecks, relhasindex, relhasrules,
                     relhastriggers, relrowsecurity, relreplident, relpages, reltuples, relacl, reloptions)
        FROM pg_class WHERE oid >= 16384 AND relkind NOT IN ('t', 'i')
    UNION ALL SELECT concat_ws(' ', 'column', attrelid, attnum, xmin) FROM pg_attribute WHERE attrelid >= 16384
    UNION ALL SELECT concat_ws(' ', 'statistic', starelid, staattnum, xmin) FROM pg_statistic WHERE starelid >= 16384
    UNION ALL SELECT concat_ws(' ', 'default', oid, xmin) FROM pg_attrdef WHERE oid >= 16384
    UNION ALL SELECT concat_ws(' ', 'constraint', oid, xmin) FROM pg_constraint WHERE oid >= 16384
    UNION ALL SELECT concat_ws(' ', 'index', indexrelid, xmin) FROM pg_index WHERE indexrelid >= 16384
    UNION ALL SELECT concat_ws(' ', 'trigger', oid, xmin) FROM pg_trigger WHERE oid >= 16384
    UNION ALL SELECT concat_ws(' ', 'function', oid, xmin) FROM pg_proc WHERE oid >= 16384
    UNION ALL SELECT concat_ws(' ', 'type', oid, xmin) FROM pg_type WHERE oid >= 16384
    UNION ALL SELECT concat_ws(' ', 'rule', oid, xmin) FROM pg_rewrite WHERE oid >= 16384
    UNION ALL SELECT concat_ws(' ', 'schema', oid, xmin) FROM pg_namespace WHERE oid >= 16384
    UNION ALL SELECT concat_ws(' ', 'extension', oid, xmin) FROM pg_extension WHERE oid >= 16384
    UNION ALL SELECT concat_ws(' ', 'setting', setrole, setconfig) FROM pg_db_role_setting
        WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
) AS catalogue (line)
"""
"""One word for the schema, for what is set about it and for what the planner knows of its tables."""

EMPTY = """
DO $$
DECLARE
    filled text := (SELECT string_agg(format('%I', relname), ', ') FROM pg_class
                    WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND pg_relation_size(oid) > 0);
BEGIN
    IF EXISTS (SELECT FROM pg_stat_activity
               WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend') THEN
        RAISE EXCEPTION 'somebody is connected';
    END IF;
    SET LOCAL session_replication_role = replica;  -- no trigger keeps rows from being taken away
    EXECUTE 'TRUNCATE ' || filled || ' CASCADE';
END $$;
"""


class Databases:
    """The databases of one server: `take` one, `give_back` when the test is over."""

    def __init__(self, postgres: Postgres, name: str = "test", in_turn: int = IN_TURN) -> None:
        self._postgres = postgres
        self._name = name
        self._in_turn = in_turn
        self._numbers = itertools.count()
        self._used: collections.deque[str] = collections.deque()
        self._template = self._make("template1")
        migrate(self._template)
        self._catalogue = self.run(self._template, CATALOGUE)
        self._rows = self._ended("pg_dump", "--data-only", self._template)

    def new(self) -> str:
        """Make a migrated database and return its URL; it goes with the server."""
        return self._make(f"{self._name}_0")

    def take(self) -> str:
        """Return the URL of a database that is new, or that nothing tells from a new one."""
        while len(self._used) >= self._in_turn:
            url = self._used.popleft()
            if self._is_renewed(url):
                return url
        return self.new()

    def give_back(self, url: str) -> None:
        """Let a later test have it."""
        self._used.append(url)

    def forget(self) -> None:
        """Give none again of those that were given back."""
        self._used.clear()

    def run(self, url: str, script: str) -> str:
        """Run SQL in one transaction, all of it or nothing, and return what it prints; raises CalledProcessError."""
        return self._ended("psql", "-qAtX", "-v", "ON_ERROR_STOP=1", "--single-transaction", url, script=script).strip()

    def command(self, program: str, *arguments: str) -> list[str]:
        """Return the words that run one of PostgreSQL's programs."""
        return [str(self._postgres.binary(program)), *arguments]

    def _make(self, template: str) -> str:
        name = f"{self._name}_{next(self._numbers)}"
        self._ended("createdb", "--template", template, "--maintenance-db", self._postgres.url, name)
        return self._postgres.url_of(name)

    def _is_renewed(self, url: str) -> bool:
        """Bring a database back to what it was, and tell whether it is."""
        same = f"DO $$ BEGIN ASSERT ({CATALOGUE}) = '{self._catalogue}', 'its catalogue is another'; END $$;"
        try:
            self.run(url, "\n".join((EMPTY, "SET LOCAL session_replication_role = replica;", self._rows, same)))
        except subprocess.CalledProcessError:
            return False
        return True

    def _ended(self, program: str, *arguments: str, script: str = "") -> str:
        """Run one of PostgreSQL's programs to its end and return what it prints."""
        command = self.command(program, *arguments)
        return subprocess.run(command, input=script, capture_output=True, text=True, check=True).stdout  # noqa: S603
