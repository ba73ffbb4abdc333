"""The JSON of what is known of the data: readers of reports and of `data/` rely on its keys and their order."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from job.config.loader import validate
from job.data import Data
from job.data.decoder import dismiss
from job.data.facts import NearPair, ShrunkFacts, as_json, as_jsonl
from job.data.prepare import prepare
from tests.data.test_data import Ten, folder_of, png, rows_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SOURCE = "image folder: it holds metadata.jsonl; answers in caption, images in file_name"
SEEN = {
    "rows": 10,
    "other_splits": {},
    "split_column": None,
    "decoders": 0,
    "burned_in_yes": 0,
    "burned_in_maybe": 0,
    "burned_in_masked": 0,
    "reasons": {"image of an unknown format": 2},
    "without_images": 0,
    "over_length": 0,
    "lossy": 0,
    "absolute": 0,
    "blank": 11,
    "default_window": 0,
    "filtered": 0,
}
TOKENS = {"median": 25, "longest": 25, "learned": 20}
IMAGES = {"count": 9, "smallest": [8, 8], "median": [8, 8], "largest": [30, 20], "most": 1}
SPLIT = {
    "source": SOURCE,
    "left_out": [],
    "held_out_source": SOURCE,
    "same_in_both": 2,
    "train": 9,
    "evaluation": 2,
    "quarantined": 2,
    "near_duplicates": 0,
    "instruction": "Look.",
}


@pytest.fixture
def prepared(tree: dict[str, Any], tmp_path: Path):
    def prepare_it(most: int | None = None, measure: Any = Ten) -> Data:
        """Ten rows of which row 7 is bad, and three held out of which row 2 is bad and the others are in both."""
        folder_of(rows_of(10), tmp_path / "data", {"7.png": b"x", "9.png": png(9, (30, 20))})
        held = [*rows_of(2), {"file_name": "bad.png", "caption": "c"}]
        folder_of(held, tmp_path / "held", {"bad.png": b"x"})
        dismiss()  # decoders of other tests
        tree["dataset"] |= {"max_bad_fraction": 0.5, "instruction": "Look.", "eval_path": str(tmp_path / "held")}
        return prepare(validate(tree), tmp_path / "scratch", measure, most)

    return prepare_it


def test_facts_are_written_under_these_keys(prepared):
    data = prepared()
    digest = data.facts.train_sha256
    wanted = (
        SEEN
        | {"tokens": TOKENS, "images": IMAGES}
        | SPLIT
        | {"train_sha256": digest, "grouped": False, "alike_groups": 0}
    )
    assert len(digest) == 64
    assert json.dumps(as_json(data.facts)) == json.dumps(wanted)


def test_what_a_quick_look_does_not_know_is_left_out(prepared):
    images = IMAGES | {"count": 7, "largest": [8, 8]}
    wanted = SEEN | {"blank": 9, "images": images, "looked_at": 8} | SPLIT | {"grouped": False, "alike_groups": 0}
    assert json.dumps(as_json(prepared(8, None).facts)) == json.dumps(wanted)


def test_quarantined_rows_and_near_duplicates_are_a_line_each(prepared):
    data = prepared()
    assert as_jsonl(data.quarantined).decode().splitlines() == [
        '{"row": 7, "reason": "image of an unknown format"}',
        '{"row": 2, "reason": "image of an unknown format", "of": "evaluation"}',
    ]
    assert (
        as_jsonl([NearPair("row-0", "row-3", 0.975)])
        == b'{"evaluation": "row-0", "train": "row-3", "likeness": 0.975}\n'
    )


def test_each_side_is_estimated_from_its_own_rows(tree: dict[str, Any], tmp_path: Path):
    """A table of 451 held-out rows was announced as 1,382, when the quick look saw a third of the training rows."""
    for name, count in (("data", 60), ("held", 9)):
        folder_of([{"file_name": "0.png", "caption": "c"}] * count, tmp_path / name)
    tree["dataset"]["eval_path"] = str(tmp_path / "held")
    facts = prepare(validate(tree), tmp_path / "scratch", None, 20).facts
    assert (facts.rows, facts.looked_at, facts.train, facts.evaluation) == (60, 20, 60, 9)
    tree["dataset"] |= {"path": str(tmp_path / "held"), "eval_path": str(tmp_path / "data")}
    facts = prepare(validate(tree), tmp_path / "scratch", None, 20).facts
    assert (facts.rows, facts.looked_at, facts.train, facts.evaluation) == (9, 9, 9, 60)
    tree["dataset"]["max_rows"] = 8
    facts = prepare(validate(tree), tmp_path / "scratch", None).facts
    assert (facts.rows, facts.train, facts.evaluation) == (8, 8, 8)


def test_shrunk_images_are_counted_with_the_sizes_and_tokens_of_the_median(tree: dict[str, Any], tmp_path: Path):
    sizes = [(30, 20), (40, 60), (400, 300), (10, 12)]
    images = {f"{n}.png": png(n, size) for n, size in enumerate(sizes)}
    turned = Image.open(io.BytesIO(png(4, (200, 100))))
    exif = turned.getexif()
    exif[274] = 6
    turned.save(stream := io.BytesIO(), "JPEG", exif=exif)
    folder_of(
        [*rows_of(4), {"file_name": "4.jpg", "caption": "c"}], tmp_path / "data", images | {"4.jpg": stream.getvalue()}
    )
    tree["dataset"] |= {"eval_fraction": 0, "image_max_side": 25}

    class Area:
        def __init__(self, messages: Any, sizes: list[tuple[int, int]]) -> None:
            self.whole, self.prompt = sizes[0][0] * sizes[0][1], 1

    tree["training"] = {"max_length": 10_000}
    facts = prepare(validate(tree), tmp_path / "scratch", Area).facts
    assert facts.shrunk == ShrunkFacts(4, (100, 200), (13, 25), 20_000, 325)
    assert prepare(validate(tree), tmp_path / "scratch", None).facts.shrunk == ShrunkFacts(4, (100, 200), (13, 25))
    tree["dataset"]["image_max_side"] = None
    assert prepare(validate(tree), tmp_path / "scratch", None).facts.shrunk is None
