"""What a cap counts, and for whom."""

from __future__ import annotations

import dataclasses

import pytest

from service.errors import QuotaExceeded
from service.quota.caps import Held
from service.quota.limits import DEFAULT, LIFTED, Quota


def test_a_workspace_whose_caps_are_all_lifted_is_not_counted() -> None:
    assert (LIFTED.has_caps, DEFAULT.has_caps) == (False, True)


@pytest.mark.parametrize(
    "quota",
    [
        dataclasses.replace(LIFTED, live_parent_runs=1),
        dataclasses.replace(LIFTED, live_runs=1),
        dataclasses.replace(LIFTED, pending_subruns=1),
    ],
)
def test_one_cap_is_enough_to_be_counted(quota: Quota) -> None:
    assert quota.has_caps


@pytest.mark.parametrize(
    ("cap", "held", "said"),
    [
        (5, 5, "(5 of 5 in use); try again when one of them has ended"),
        (5, 7, "(7 of 5 in use); try again when 3 of them have ended"),
        (0, 0, "(0 of 0 in use); none is admitted under a cap of 0"),
    ],
)
def test_a_refusal_says_how_many_have_to_end_first(cap: int, held: int, said: str) -> None:
    with pytest.raises(QuotaExceeded) as refused:
        Held(live_runs=held).admit_parent(dataclasses.replace(LIFTED, live_runs=cap))
    assert str(refused.value) == f"Workspace quota exceeded for live_runs {said}"
