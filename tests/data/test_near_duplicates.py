"""Copies across the split are found, and different pictures of the same kind are not taken for copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from examples.radiographs import draw_cases, draw_images
from job.config.loader import validate
from job.data.near_duplicates import BITS, near_pairs, perceptual_hash
from job.data.prepare import prepare

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def radiographs(count: int) -> list[Image.Image]:
    chance = np.random.default_rng(1)
    return [Image.fromarray(image) for image in draw_images(draw_cases(count, chance), chance)]


def hashes(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([perceptual_hash(picture) for picture in pictures])


def test_copies_are_found_and_others_are_not():
    drawn = radiographs(60)
    copies = [ImageEnhance.Contrast(picture.resize((300, 300))).enhance(0.9) for picture in drawn[:20]]
    pairs = near_pairs(hashes(copies), hashes(drawn))
    assert len(pairs) >= 19
    assert all(a == b for a, b, _ in pairs)
    assert near_pairs(hashes(drawn[:30]), hashes(drawn[30:])) == []


def test_pairs_are_those_that_counting_bits_finds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("job.data.near_duplicates.PRODUCTS", 1000)
    some, others = (np.random.default_rng(n).choice([-1, 1], (40 + n, BITS)).astype(np.int8) for n in (0, 100))
    apart = (some[:, None] != others[None]).sum(axis=2)
    most = int(np.quantile(apart.min(axis=1), 0.5))
    found = near_pairs(some, others, most)
    assert [a for a, _, _ in found] == np.flatnonzero(apart.min(axis=1) <= most).tolist()
    assert all(apart[a, b] == bits == apart[a].min() for a, b, bits in found)


def test_held_out_rows_of_the_user_are_compared_too(tree: dict[str, Any], tmp_path: Path):
    drawn = radiographs(12)
    for name, pictures in (("data", drawn), ("held", [drawn[3].resize((224, 224)), *radiographs(14)[12:]])):
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
