"""A map of where the model looked is about the place that decides its answer."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from job.evaluate import occlusion
from job.report import gallery
from job.report.page import render
from tests.evaluate.conftest import chosen, contents_of
from tests.tiny import job_spec, load_tiny, row


def test_one_cell_is_covered_and_nothing_else() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (61, 83, 3), dtype=np.uint8))
    changed = np.zeros((61, 83), int)
    for down in range(occlusion.CELLS):
        for across in range(occlusion.CELLS):
            other = occlusion.covered(image, down, across)
            changed += (np.asarray(other) != np.asarray(image)).any(axis=-1)
    assert changed.max() == 1
    assert changed.mean() > 0.99


def test_the_cell_that_decides_the_answer_stands_out() -> None:
    """A reader that looks at one pixel, and is the less sure of the answer the darker it is."""

    def losses_of(batch: list[dict[str, Any]]) -> list[float]:
        assert {each["messages"][-1]["content"][0]["text"] for each in batch} == {"A nodule."}
        return [1.0 - float(np.asarray(each["images"][0])[35, 45].mean()) / 255 for each in batch]

    pixels = np.zeros((60, 60, 3), np.uint8)
    pixels[30:40, 40:50] = 255
    cells = np.array(occlusion.occlusion(row(1) | {"images": [Image.fromarray(pixels)]}, "A nodule.", losses_of))
    assert np.argwhere(cells > 0.5).tolist() == [[3, 4]]
    assert np.count_nonzero(cells) == 1


def test_a_model_answers_for_every_cell(tiny: Callable[..., Path]) -> None:
    spec = job_spec(evaluation={"batch_size": 16})
    found = occlusion.explain(load_tiny(tiny("llava")), [row(1), row(2)], {"row-2": "A nodule."}, spec, lambda: None)
    assert list(found) == ["row-2"]
    assert np.shape(found["row-2"]) == (6, 6)
    assert np.abs(found["row-2"]).max() > 0


def test_the_report_shows_the_map_and_says_what_it_is(facts: dict[str, Any]) -> None:
    identity = gallery.sample(contents_of(facts), chosen(facts)["random"][0], {})["id"]
    content = io.BytesIO()
    Image.new("RGB", (20, 20), "white").save(content, "PNG")
    cells = np.zeros((6, 6))
    cells[0, 0], cells[1, 0], cells[1, 1] = -1.0, 0.5, 1.0
    facts["occlusion"] = {identity: cells.tolist()}
    page = render(contents_of(facts), {identity: content.getvalue()})
    assert page.count("Where the model looked") == 1
    assert '<rect x="0" y="1" width="1" height="1" fill-opacity="0.35"/>' in page
    assert "raised the answer's loss by 1 nats per token" in page
    assert "It shows what the answer depends on, not whether it is right" in page
    assert "Where the model looked" not in render(contents_of(facts | {"privacy": {"report_images": False}}))
