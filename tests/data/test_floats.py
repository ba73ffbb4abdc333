"""Numbers as pandas writes them: whole ones that a gap made floats are whole, and every number is an answer."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from job.config.loader import validate
from job.data import Data
from job.data.prepare import prepare
from tests.data.test_data import png

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
NAN = float("nan")


@pytest.fixture
def prepared(tree: dict[str, Any], tmp_path: Path):
    """Rows whose captions are these values, in a table of this name."""

    def prepare_it(name: str, values: Any, **more: Any) -> Data:
        write(tmp_path, name, values)
        tree["dataset"] = {"path": str(tmp_path / name), "eval_fraction": 0, "max_bad_fraction": 0.9} | more
        tree["evaluation"] = {"labels": {"score": {"column": "caption"}}, "groups": ["caption"]}
        return prepare(validate(tree), tmp_path / "scratch")

    return prepare_it


def write(folder: Path, name: str, values: Any) -> None:
    (folder / "0.png").write_bytes(png())
    if name.endswith(".parquet"):
        images = [png(n) for n in range(len(values))]
        parquet.write_table(pa.table({"image": images, "caption": values}), folder / name)
        return
    rows = [json.dumps({"image": "0.png", "caption": value}) for value in values]
    (folder / name).write_text(f"[{','.join(rows)}]" if name.endswith(".json") else "\n".join(rows))


def learned(data: Data) -> list[str]:
    return [row["reference"] for row in data.train]


WAYS: list[tuple[list[Any], list[str]]] = [
    ([3, 4], ["3", "4"]),
    ([3.5, 3.0, 0.0], ["3.5", "3.0", "0.0"]),
    ([3.0, NAN, -4.0, 0.0], ["3", "-4", "0"]),
    (["3.5", "3.0", "3", "NaN"], ["3.5", "3.0", "3", "NaN"]),
    ([1e300, 1.0], ["1e+300", "1.0"]),
    ([float("inf"), 2.0], ["2"]),
    ([True, False], ["True", "False"]),
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
@pytest.mark.parametrize(("values", "said"), WAYS, ids=[str(values) for values, _ in WAYS])
def test_numbers_are_answers_labels_and_groups_as_people_write_them(
    prepared, name: str, values: list[Any], said: list[str]
):
    data = prepared(name, values)
    assert learned(data) == said
    assert [row["labels"]["score"] for row in data.train] == said
    assert [row["groups"]["caption"] for row in data.train] == said
    assert learned(prepared(name, values, answer="{caption}")) == said


def test_what_is_no_number_is_no_answer(prepared):
    assert prepared("rows.jsonl", [NAN, None, [], {}, "", 1.5]).facts.reasons == {"no caption": 5}


def test_numbers_of_32_bits_and_decimals_are_written_as_they_were(prepared):
    assert learned(prepared("a.parquet", pa.array([0.1, 2.5], pa.float32()))) == ["0.1", "2.5"]
    assert learned(prepared("b.parquet", pa.array(np.array([3, 4], np.float16)))) == ["3", "4"]
    assert learned(prepared("c.parquet", pa.array([Decimal("3.50"), Decimal("0.10")]))) == ["3.50", "0.10"]


def test_rows_to_train_on_and_rows_held_out_are_written_alike(tmp_path: Path, prepared):
    write(tmp_path, "held.jsonl", [1.0, 2.5])
    held = {"eval_path": str(tmp_path / "held.jsonl"), "eval_fraction": 0.1}
    data = prepared("rows.jsonl", [1.0, 2.0], **held)
    assert (learned(data), [row["reference"] for row in data.evaluation]) == (["1.0", "2.0"], ["1.0", "2.5"])
    assert learned(prepared("rows.jsonl", [1, 2], **held)) == ["1", "2"]


def test_a_list_says_each_of_its_values(prepared):
    said = learned(prepared("rows.jsonl", [["a", None, "b"], [], [1]], answer="Seen: {caption}"))
    assert said == ["Seen: a, b", "Seen: 1"]


def test_an_answer_in_a_conversation_may_be_a_number(tmp_path: Path, tree: dict[str, Any]):
    (tmp_path / "0.png").write_bytes(png())
    turns = [{"from": "human", "value": "<image>How large?"}, {"from": "gpt", "value": 3.5}]
    (tmp_path / "r.jsonl").write_text(json.dumps({"image": "0.png", "conversations": turns}))
    tree["dataset"] = {"path": str(tmp_path / "r.jsonl"), "eval_fraction": 0}
    assert learned(prepare(validate(tree), tmp_path / "scratch")) == ["3.5"]
