"""The auditor of places: each test breaks a sound history in one way."""

from __future__ import annotations

from tests.campaigns.cap_audit import Change, History, Monitored, replay

SOUND = [
    Change(1, True, "pool", "a", "one"),
    Change(2, True, "pool", "b", "two"),
    Change(3, False, "pool", "a", "one"),
    Change(4, True, "pool", "c", "one"),
]


def test_a_sound_history_is_followed_place_by_place() -> None:
    assert replay(SOUND, 2) == History(peak=2, taken=3, filled=2, between=2, left=2)


def test_a_place_taken_before_another_was_given_back_is_one_too_many() -> None:
    assert replay([*SOUND[:2], Change(2, True, "pool", "c", "one")], 2).faults == ["pool held 3 places of 2"]


def test_each_pool_is_followed_by_itself() -> None:
    apart = [change._replace(pool=change.holder) for change in SOUND]
    assert (replay(apart, 1).peak, replay(apart, 1).faults) == (1, [])


def test_a_place_given_back_twice_is_told() -> None:
    assert replay([*SOUND, Change(5, False, "pool", "a", "one")], 2).faults == [
        "a gave back a place in pool that it did not hold"
    ]


def test_at_one_microsecond_places_are_given_back_first() -> None:
    swapped = [SOUND[0], SOUND[1], SOUND[3], SOUND[2]._replace(at_us=4)]
    assert replay(swapped, 2).faults == []


def command(at_s: int, *words: str) -> bytes:
    """Return a line as MONITOR prints it."""
    return f"+{at_s}.000000 [0 lua] ".encode() + " ".join(f'"{word}"' for word in words).encode()


def test_a_place_that_lapsed_is_free_and_one_that_was_renewed_is_not() -> None:
    pool = "plimsoll:{sockets}:workspace:w"
    monitored = Monitored("workspace", 1)
    for line in (
        command(1, "ZADD", pool, "3000", "one:a"),
        command(2, "ZADD", pool, "5000", "one:a"),
        command(4, "ZADD", pool, "9000", "two:b"),  # while a holds its place until 5
        command(6, "ZADD", "plimsoll:{sockets}:user:u", "9000", "two:b"),  # another pool
        command(10, "ZADD", pool, "12000", "one:c"),  # when all have lapsed
        command(11, "ZREM", pool, "one:c"),
    ):
        monitored.read(line)
    assert monitored.replay.end(11e6) == History(
        peak=2, taken=3, filled=2, between=2, left=0, faults=["w held 2 places of 1"]
    )
