"""Copies across the split are found, and different pictures of the same kind are not taken for copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from job.config.loader import validate
from job.data.near_duplicates import near_pairs, thumbnail
from job.data.prepare import prepare
from tests.data.films import CHANGES, draw_films

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def thumbnails(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([thumbnail(picture) for picture in pictures])


@pytest.fixture(scope="module")
def films() -> list[Image.Image]:
    return draw_films(250, np.random.default_rng(1))


@pytest.mark.parametrize("change", CHANGES)
def test_copies_are_found(films: list[Image.Image], change: str):
    """A sample of what `make near-duplicates` measures."""
    copies = [CHANGES[change](film) for film in films[:40]]
    right = sum(a == b for a, b, _ in near_pairs(thumbnails(copies), thumbnails(films)))
    back = sum(a == b for a, b, _ in near_pairs(thumbnails(films[:40]), thumbnails([*copies, *films[40:]])))
    assert min(right, back) >= 36


def test_different_films_are_no_copies(films: list[Image.Image]):
    assert near_pairs(thumbnails(films[:125]), thumbnails(films[125:])) == []
    assert near_pairs(thumbnails(films[:6]), thumbnails(films[6:12])) == []


def test_a_blank_picture_is_no_copy_of_another(films: list[Image.Image]):
    blank = [Image.new("RGB", (300, 200), colour) for colour in ("black", "grey", "white")]
    assert near_pairs(thumbnails(blank), thumbnails(blank)) == []
    found = near_pairs(thumbnails([*blank, films[0]]), thumbnails([*blank, *films[:9]]))
    assert found == [(3, 3, 1.0)]


def test_held_out_rows_of_the_user_are_compared_too(tree: dict[str, Any], tmp_path: Path):
    drawn = draw_films(14, np.random.default_rng(2))
    for name, pictures in (("data", drawn[:12]), ("held", [drawn[3].resize((224, 224)), *drawn[12:]])):
        (tmp_path / name).mkdir()
        rows = []
        for n, picture in enumerate(pictures):
            picture.save(tmp_path / name / f"{n}.jpg", quality=60)
            rows.append({"file_name": f"{n}.jpg", "caption": "c"})
        (tmp_path / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["dataset"]["eval_path"] = str(tmp_path / "held")
    data = prepare(validate(tree), tmp_path / "scratch")
    assert [(pair.evaluation, pair.train) for pair in data.near] == [("row-0", "row-3")]
    assert (data.facts.near_duplicates, data.facts.same_in_both) == (1, 0)
