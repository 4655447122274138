"""A database that a test is done with is given again only where nothing tells it from a new one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from service.embedded import Stack
from tests.databases import CATALOGUE, Databases

IN_TURN = 2

TABLES = "SELECT format('SELECT %L, t::text FROM %I t', relname, relname) FROM pg_class WHERE relkind = 'r'"
OF_OURS = "AND relnamespace = 'public'::regnamespace ORDER BY relname"
SEQUENCES = "SELECT sequencename, last_value FROM pg_sequences ORDER BY 1"
WORKSPACE = "INSERT INTO workspaces VALUES (gen_random_uuid(), 'left', 'default', now())"
CHANGE = "INSERT INTO quota_changes (revision, kind, to_state, at, by) VALUES (1, 'x', 'active', now(), 'a test')"


@pytest.fixture(scope="module")
def own(stack: Stack) -> Databases:
    """Databases that no other test is given."""
    assert stack.postgres is not None
    return Databases(stack.postgres, "own", IN_TURN)


@pytest.fixture
def taken(own: Databases) -> Iterator[list[str]]:
    """As many databases as are in use in turn, all given back, in that order."""
    urls = [own.new() for _ in range(IN_TURN)]
    for url in urls:
        own.give_back(url)
    yield urls
    own.forget()


def content(own: Databases, url: str) -> list[str]:
    """Return every row of every table, where each sequence stands, and the catalogue."""
    asked = own.run(url, f"{TABLES} {OF_OURS}").splitlines()
    return [own.run(url, statement) for statement in (*asked, SEQUENCES, CATALOGUE)]


def test_it_comes_back_in_turn_with_the_rows_and_the_numbers_of_a_new_one(own: Databases, taken: list[str]) -> None:
    new = content(own, own.new())
    for url in taken:
        own.run(url, f"{WORKSPACE}; {CHANGE}")
        assert content(own, url) != new
    assert own.take() == taken[0]
    assert content(own, taken[0]) == new


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE runs ADD COLUMN more text",
        "DROP TRIGGER quota_changes_kept ON quota_changes",
        "CREATE TABLE left_behind (n int)",
        "ALTER TABLE runs DROP CONSTRAINT runs_pkey CASCADE",
        "CREATE FUNCTION more() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "ALTER TABLE events SET (fillfactor = 50)",
        f"{WORKSPACE}; ANALYZE workspaces",
    ],
)
def test_one_whose_catalogue_is_another_is_left_alone(own: Databases, taken: list[str], change: str) -> None:
    own.run(taken[0], change)
    assert own.take() not in taken  # fewer are left than are in use in turn


def test_one_to_which_somebody_is_connected_is_left_alone(own: Databases, taken: list[str]) -> None:
    command = own.command("psql", "-qAtX", taken[0])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as somebody:  # noqa: S603
        assert somebody.stdin is not None
        assert somebody.stdout is not None
        somebody.stdin.write("SELECT 'here';\n")
        somebody.stdin.flush()
        assert somebody.stdout.readline() == "here\n"
        assert own.take() not in taken
        somebody.stdin.close()


def test_what_was_given_a_moment_ago_is_not_given_to_the_next(own: Databases, taken: list[str]) -> None:
    given = []
    for _ in range(2 * IN_TURN):
        given.append(own.take())
        own.give_back(given[-1])
    assert given == taken * 2
