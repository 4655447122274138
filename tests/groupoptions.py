"""Options of a group of subruns, for tests that draw them."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from service.changes import GroupOptions
from service.joins import FailurePolicy, JoinPolicy


def group_options(timeouts_s: Sequence[float]) -> st.SearchStrategy[GroupOptions]:
    """Draw options that go together, with one of these timeouts where the policy has one."""
    return st.one_of(
        st.just(GroupOptions()),
        st.builds(
            GroupOptions, st.sampled_from([JoinPolicy.WAIT_ALL, JoinPolicy.WAIT_ANY]), st.sampled_from(FailurePolicy)
        ),
        st.builds(GroupOptions, st.just(JoinPolicy.QUORUM), st.sampled_from(FailurePolicy), st.integers(1, 3)),
        st.builds(
            GroupOptions,
            st.just(JoinPolicy.TIMEOUT),
            st.sampled_from(FailurePolicy),
            st.none(),
            st.sampled_from(timeouts_s),
        ),
    )
