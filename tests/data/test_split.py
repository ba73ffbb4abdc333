"""Holding out."""

from hypothesis import given
from hypothesis import strategies as st

from job.data.split import hold_out

GROUPS = st.lists(st.text(max_size=4), min_size=1, max_size=60)


@given(GROUPS, st.floats(0.01, 0.9), st.integers(0, 9))
def test_a_group_is_on_one_side_and_neither_side_is_empty(groups, fraction, seed):
    held = hold_out(groups, fraction, seed)
    sides = {group: {h for g, h in zip(groups, held, strict=True) if g == group} for group in groups}
    assert all(len(side) == 1 for side in sides.values())
    if len(set(groups)) > 1:
        assert set(held) == {True, False}


@given(st.sets(st.text(max_size=4), min_size=30, max_size=60), st.text(min_size=5))
def test_another_group_changes_no_choice_already_made(groups, another):
    before = sorted(groups)
    held = hold_out(before, 0.5, 0)
    assert hold_out([*before, another], 0.5, 0)[: len(before)] == held


def test_the_share_is_about_what_was_asked_for():
    held = hold_out([str(n) for n in range(10_000)], 0.1, 3)
    assert 900 < sum(held) < 1100


def test_fraction_nought_holds_nothing_out():
    assert not any(hold_out(["a", "b"], 0.0, 0))


def test_another_seed_holds_out_others():
    groups = [str(n) for n in range(100)]
    assert hold_out(groups, 0.5, 0) != hold_out(groups, 0.5, 1)
