"""What a cap counts, and for whom."""

from __future__ import annotations

import dataclasses

import pytest

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
