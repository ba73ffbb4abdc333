"""Holding out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.data.split import first_alike, hold_out, same_name, units

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


@given(st.lists(st.sampled_from("abcd"), min_size=20, max_size=200), st.floats(0.05, 0.5), st.integers(0, 9))
def test_each_stratum_has_its_share_to_within_one(strata, fraction, seed):
    names = [str(n) for n in range(len(strata))]
    held = hold_out(names, fraction, seed, strata=strata)
    for value in set(strata):
        out = sum(h for h, s in zip(held, strata, strict=True) if s == value)
        # one more where neither side may be empty
        assert abs(out - fraction * strata.count(value)) <= 1 + (sum(held) == 1)


def test_small_strata_together_have_their_share():
    strata = [f"rare {n // 2}" for n in range(2000)]
    held = hold_out([str(n) for n in range(2000)], 0.1, 5, strata=strata)
    assert 160 < sum(held) < 240


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_a_count_is_met_by_whole_groups(rows):
    groups = [str(n * n % 37) for n in range(200)]
    held = hold_out(groups, 0.1, 0, rows=rows)
    out, kept = ({group for group, h in zip(groups, held, strict=True) if h is side} for side in (True, False))
    assert rows <= sum(held) < rows + max(groups.count(group) for group in out)
    assert not out & kept


def test_another_row_changes_few_choices_of_a_count():
    groups = [str(n) for n in range(200)]
    held = hold_out(groups, 0.1, 0, rows=40)
    again = hold_out([*groups, "another"], 0.1, 0, rows=40)
    assert sum(a != b for a, b in zip(held, again, strict=False)) <= 1


def test_rows_with_a_picture_in_common_are_one_unit():
    assert units([["a"], ["b", "c"], ["d"], ["c", "a"], ["d"], []]) == [0, 0, 2, 0, 2, 5]


@pytest.mark.parametrize(
    "spelled", ["Müller 7", "MÜLLER 7", "mu\u0308ller  7", "Mü\u200bller\u00a07", " müller\t7 ", "Müller \uff17\ufeff"]
)
def test_names_are_compared_as_people_read_them(spelled):
    assert same_name(spelled) == "müller 7"


@given(st.text(max_size=8))
def test_a_compared_name_stays_as_it_is(name):
    assert same_name(same_name(name)) == same_name(name)


@pytest.mark.parametrize("other", ["8", "7a", "7.5", "70", "7.01", "a7", "-7"])
def test_other_names_are_not_alike(other):
    assert first_alike(["7", other]) == (0, None)


def test_names_that_differ_by_zeros_are_alike():
    assert first_alike(["1", "7", "p-07", "007", "7.0", "7", "p-7"]) == (3, (1, 3))
