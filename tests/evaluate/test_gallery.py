from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from job.evaluate import gallery
from job.evaluate.differences import difference

TEXTS = st.lists(st.sampled_from(["left", "Right,", "lung.", "no", "\nno", "<b>"]), max_size=12).map(" ".join)


def picture(side: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(noise).save(stream, kind)
    return stream.getvalue()


@given(TEXTS, TEXTS)
def test_parts_give_back_both_texts(reference: str, generated: str) -> None:
    parts = difference(reference, generated)
    bare = [word.strip(",.").casefold() for word in reference.split()]
    assert "".join(part.text for part in parts if part.kind != "missing").split() == generated.split()
    kept = " ".join(part.text for part in parts if part.kind != "added").split()
    assert [word.strip(",.").casefold() for word in kept] == bare


def test_only_the_words_that_differ_are_marked() -> None:
    parts = difference("A nodule in the left lung.", "a nodule in the right lung")
    assert [(part.kind, part.text.strip()) for part in parts] == [
        ("same", "a nodule in the"),
        ("missing", "left"),
        ("added", "right"),
        ("same", "lung"),
    ]


def test_a_sample_is_shown_once(facts: dict[str, Any]) -> None:
    chosen = gallery.chosen(facts)
    rows = [row for part in chosen.values() for row in part]
    assert list(chosen) == ["changed", "worst", "best", "random"]
    assert len(rows) == len(set(rows)) == 4 * gallery.EACH


def test_those_at_random_do_not_depend_on_results(facts: dict[str, Any]) -> None:
    other = {**facts, "after": [{**row, "generated": "x"} for row in facts["after"]]}
    assert gallery.chosen(other)["random"] == gallery.chosen(facts)["random"]


def test_the_worst_are_those_with_the_wrong_labels(facts: dict[str, Any]) -> None:
    for index in gallery.chosen(facts)["worst"]:
        sample = gallery.sample(facts, index, {})
        assert not all(right for _, _, right in sample.after.labels)


def test_what_tuning_broke_is_among_the_most_changed(facts: dict[str, Any]) -> None:
    broken = next(index for index in range(48) if index not in gallery.chosen(facts)["random"])
    facts["before"][broken]["generated"] = facts["before"][broken]["reference"]
    facts["after"][broken]["generated"] = "nothing at all"
    facts["metrics"]["labels"] = {}
    chosen = gallery.chosen(facts)
    assert broken in chosen["worst"] + chosen["changed"]


def test_few_rows_are_all_shown(make_rows: Callable[..., Any]) -> None:
    rows = make_rows(0.5, 3)
    assert sorted(index for part in gallery.chosen({"before": rows, "after": rows}).values() for index in part) == [
        0,
        1,
        2,
    ]


def test_a_text_with_little_in_common_is_shown_as_it_is(facts: dict[str, Any]) -> None:
    facts["before"][0]["generated"] = "some wholly different words about it"
    answer = gallery.sample(facts, 0, {}).before
    assert answer.note == "little in common with the reference"
    assert [part.kind for part in answer.parts] == ["same"]


def test_a_small_image_is_embedded_as_it_is() -> None:
    content = picture(32)
    assert gallery.data_uri(content) == f"data:image/png;base64,{base64.b64encode(content).decode()}"


def test_a_large_image_is_made_smaller() -> None:
    uri = gallery.data_uri(picture(1200))
    shown = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert max(shown.size) == gallery.SHRUNK_SIDE
    assert shown.format == "JPEG"


@pytest.mark.parametrize("content", [b"", b"<svg onload=alert(1)>", b"\xff\xd8\xff" + b"0" * 200_000])
def test_what_is_no_picture_is_not_embedded(content: bytes) -> None:
    assert not gallery.data_uri(content)
