"""A vision job whose rows have no picture would train on words alone: it is refused, and told where the pictures may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.config.loader import validate
from job.data import Data
from job.data.encoded import looks_like_picture
from job.data.prepare import prepare
from job.errors import DataError
from job.planning.facts import Facts
from job.planning.warnings import warnings
from tests.data.test_data import png

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SHAREGPT = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A lung."}]}
OPENAI = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A lung."}]}
TAGGED = {"conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A lung."}]}


@pytest.fixture
def prepared(tree: dict[str, Any], tmp_path: Path):
    def prepare_it(rows: list[dict[str, Any]], **dataset: Any) -> Data:
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / "0.png").write_bytes(png(3))
        (tmp_path / "d" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tree["dataset"] = {"path": str(tmp_path / "d" / "rows.jsonl"), "eval_fraction": 0} | dataset
        return prepare(validate(tree), tmp_path / "scratch")

    return prepare_it


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (SHAREGPT | {"image_path": "0.png"}, "Column image_path looks like"),
        (OPENAI | {"image_path": "0.png"}, "Column image_path looks like"),
        (SHAREGPT | {"image": None, "films": ["0.png"]}, "Column films looks like"),
        (SHAREGPT | {"image": "", "scan": "0.png", "id": "a"}, "Column scan looks like"),
        (SHAREGPT | {"id": "a"}, "Set dataset.image_column"),
        ({"image": [], "caption": "c", "photo": "0.PNG"}, "Column photo looks like"),
    ],
)
def test_rows_without_any_picture_are_refused(prepared, row: dict[str, Any], named: str):
    with pytest.raises(DataError, match=rf"dataset\.path: none of 3 rows has an image .*{named}"):
        prepared([row] * 3)


def test_a_place_for_a_picture_in_another_column_is_refused_with_the_columns_name(prepared):
    with pytest.raises(DataError, match=r"1 image places for 0 images .*Column image_path looks like images"):
        prepared([TAGGED | {"image_path": "0.png"}])
    assert prepared([TAGGED | {"image_path": "0.png"}], image_column="image_path").facts.images.count == 1


def test_held_out_rows_are_asked_too(tmp_path: Path, prepared):
    (tmp_path / "held.jsonl").write_text(json.dumps(SHAREGPT | {"img": "d/0.png"}))
    with pytest.raises(DataError, match=r"dataset\.eval_path: none of 1 rows has an image .*Column img looks like"):
        prepared([TAGGED | {"image": "0.png"}], eval_path=str(tmp_path / "held.jsonl"), eval_fraction=0.1)


def test_words_alone_are_learned_where_the_spec_says_so(prepared):
    assert prepared([SHAREGPT | {"image_path": "0.png"}], image_column=None).facts.without_images == 1


def test_some_rows_without_a_picture_are_warned_about(tree: dict[str, Any], prepared):
    data = prepared([TAGGED | {"image": "0.png"}, SHAREGPT, SHAREGPT])
    said = warnings(validate(tree), Facts(data=data.facts), [], None, None, "", "32bit")
    assert "2 rows have no image, and are trained on text alone" in said


def test_what_looks_like_a_picture():
    for value in ("a/b.JPEG", "x.dcm", ["a.png"], '["a.png", "b.png"]', png(1), {"bytes": png(1)}, {"path": "a.tif"}):
        assert looks_like_picture(value)
    for value in (
        "A normal chest.",
        "notes.txt",
        7,
        None,
        [],
        [1],
        b"words",
        {"bytes": None, "path": None},
        "png",
        ".",
    ):
        assert not looks_like_picture(value)
