from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from job.evaluate import examples
from job.evaluate.records import Sample
from job.report import gallery
from job.report.gallery import difference
from job.report.page import render
from tests.evaluate.conftest import chosen, contents_of

TEXTS = st.lists(st.sampled_from(["left", "Right,", "lung.", "no", "\nno", "<b>"]), max_size=12).map(" ".join)


@given(TEXTS, TEXTS)
def test_parts_give_back_both_texts(reference: str, generated: str) -> None:
    parts = difference(reference, generated)
    bare = [word.strip(",.").casefold() for word in reference.split()]
    assert "".join(text for kind, text in parts if kind != "missing").split() == generated.split()
    kept = " ".join(text for kind, text in parts if kind != "added").split()
    assert [word.strip(",.").casefold() for word in kept] == bare


def test_only_the_words_that_differ_are_marked() -> None:
    parts = difference("A nodule in the left lung.", "a nodule in the right lung")
    assert [(kind, text.strip()) for kind, text in parts] == [
        ("same", "a nodule in the"),
        ("missing", "left"),
        ("added", "right"),
        ("same", "lung"),
    ]


def test_every_image_of_a_row_is_shown_and_labels_are_read_as_words(facts: dict[str, Any]) -> None:
    contents = contents_of(facts)
    row = replace(contents.after[0], labels={"findings": ["nodule", "effusion"]}, groups={"sex": "F"})
    contents = replace(contents, after=[row, *contents.after[1:]])
    images = {row.id: b"first", f"{row.id}.2": b"second", f"{row.id}0": b"of another row"}
    sample = gallery.sample(contents, 0, images)
    assert (sample["image"], sample["further"]) == (gallery.data_uri(b"first"), [gallery.data_uri(b"second")])
    assert sample["about"] == [("findings", "nodule, effusion"), ("sex", "F")]
    page = render(contents, {f"{one.id}{end}": b"film" for one in contents.after for end in ("", ".2")})
    assert "Image 2 of sample" in page


def test_a_sample_is_shown_once(facts: dict[str, Any]) -> None:
    parts = chosen(facts)
    rows = [row for part in parts.values() for row in part]
    assert list(parts) == ["changed", "worst", "best", "random"]
    assert len(rows) == len(set(rows)) == 4 * examples.EACH


def test_those_at_random_do_not_depend_on_results(facts: dict[str, Any]) -> None:
    other = {**facts, "after": [{**row, "generated": "x"} for row in facts["after"]]}
    assert chosen(other)["random"] == chosen(facts)["random"]


def test_the_worst_are_those_with_the_wrong_labels(facts: dict[str, Any]) -> None:
    for index in chosen(facts)["worst"]:
        sample = gallery.sample(contents_of(facts), index, {})
        assert not all(right for _, _, right in sample["answers"][1]["labels"])


def test_what_tuning_broke_is_among_the_most_changed(facts: dict[str, Any]) -> None:
    broken = next(index for index in range(48) if index not in chosen(facts)["random"])
    facts["before"][broken]["generated"] = facts["before"][broken]["reference"]
    facts["after"][broken]["generated"] = "nothing at all"
    facts["metrics"]["labels"] = {}
    parts = chosen(facts)
    assert broken in parts["worst"] + parts["changed"]


def test_few_rows_are_all_shown(make_rows: Callable[..., Any]) -> None:
    rows = make_rows(0.5, 3)
    assert sorted(index for part in chosen({"before": rows, "after": rows}).values() for index in part) == [
        0,
        1,
        2,
    ]


def test_a_text_with_little_in_common_is_shown_as_it_is(facts: dict[str, Any]) -> None:
    facts["before"][0]["generated"] = "some wholly different words about it"
    answer = gallery.sample(contents_of(facts), 0, {})["answers"][0]
    assert answer["note"] == "little in common with the reference"
    assert [kind for kind, _ in answer["parts"]] == ["same"]


def test_of_many_steps_a_few_are_shown_from_the_first_to_the_last() -> None:
    lines = [Sample(step, "row-1", "a b", f"{step}") for step in range(1, 41)]
    answers = gallery.while_training(lines)["row-1: a b"]
    assert [answer["when"] for answer in answers] == [f"Step {step}" for step in (1, 8, 16, 24, 32, 40)]
    assert gallery.while_training(lines[:1])["row-1: a b"][0]["when"] == "Step 1"
    assert gallery.while_training([]) == {}
