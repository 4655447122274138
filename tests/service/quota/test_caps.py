"""What a cap counts, and for whom."""

from __future__ import annotations

import pytest

from service.quota.limits import DEFAULT, LIFTED, Quota


def test_a_workspace_whose_caps_are_all_lifted_is_not_counted() -> None:
    assert (LIFTED.has_caps, DEFAULT.has_caps) == (False, True)


@pytest.mark.parametrize("quota", [Quota({}, 1, None, None), Quota({}, None, 1, None), Quota({}, None, None, 1)])
def test_one_cap_is_enough_to_be_counted(quota: Quota) -> None:
    assert quota.has_caps
