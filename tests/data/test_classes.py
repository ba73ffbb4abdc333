"""Columns whose numbers stand for names give their names, wherever they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.config.loader import validate
from job.data import Data
from job.data.classes import named, with_classes
from job.data.pixels import BadRow
from job.data.prepare import prepare
from job.errors import DataError
from tests.data.test_data import png

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
NAMES = ["none", "nodule", "effusion"]


def write(file: Path, rows: list[dict[str, Any]], names: list[str] = NAMES) -> None:
    import datasets as d

    features = d.Features(
        {
            "image": d.Image(),
            "caption": d.Value("string"),
            "finding": d.ClassLabel(names=names),
            "findings": d.List(d.ClassLabel(names=names)),
            "boxes": d.List({"kind": d.ClassLabel(names=names), "side": d.Value("string")}),
        }
    )
    each = [{"image": {"bytes": png(n), "path": None}, "caption": f"c {n}"} | row for n, row in enumerate(rows)]
    d.Dataset.from_list(each, features=features).to_parquet(file)


def row(finding: int | None, *findings: int) -> dict[str, Any]:
    return {
        "finding": finding,
        "findings": list(findings),
        "boxes": [{"kind": number, "side": "left"} for number in findings],
    }


@pytest.fixture
def prepared(tree: dict[str, Any], tmp_path: Path):
    def prepare_it(path: str = "r.parquet", evaluation: dict[str, Any] | None = None, **dataset: Any) -> Data:
        tree["dataset"] = {"path": str(tmp_path / path), "eval_fraction": 0} | dataset
        tree["evaluation"] = evaluation or {}
        return prepare(validate(tree), tmp_path / "scratch")

    return prepare_it


def answers(data: Data) -> list[str]:
    return [row["reference"] for row in data.train]


def test_classes_are_answered_by_name(tmp_path: Path, prepared):
    write(tmp_path / "r.parquet", [row(1, 1), row(2, 1, 2), row(0)])
    assert answers(prepared(answer_column="finding")) == ["nodule", "effusion", "none"]
    assert answers(prepared(answer="Finding: {finding}"))[1] == "Finding: effusion"
    assert answers(prepared(answer_column="findings", max_bad_fraction=0.4)) == ["nodule", "nodule, effusion"]
    assert answers(prepared(answer="{finding}\nFindings: {findings}")) == [
        "nodule\nFindings: nodule",
        "effusion\nFindings: nodule, effusion",
        "none",
    ]
    asked = prepared(instruction="Is there {finding}?").train[1]["messages"][0]["content"][-1]["text"]
    assert asked == "Is there effusion?"
    assert "'kind': 'effusion', 'side': 'left'" in answers(prepared(answer="{caption} {boxes}"))[1]


def test_classes_are_labels_groups_and_strata_by_name(tmp_path: Path, prepared):
    write(tmp_path / "r.parquet", [row(number % 3, 1, 2) for number in range(12)])
    labels = {"finding": {"column": "finding"}, "all": {"column": "findings"}}
    data = prepared(evaluation={"labels": labels, "groups": ["finding"]}, stratify_column="finding")
    assert data.label_values == {"finding": ["effusion", "nodule", "none"], "all": ["nodule, effusion"]}
    assert data.train[1]["labels"] == {"finding": "nodule", "all": "nodule, effusion"}
    assert data.train[1]["groups"] == {"finding": "nodule"}


def test_no_class_says_nothing_and_an_unknown_number_is_a_bad_row(tmp_path: Path, prepared):
    write(tmp_path / "r.parquet", [row(1), row(None), row(-1)])
    data = prepared(answer_column="finding", max_bad_fraction=0.9)
    assert (answers(data), data.facts.reasons) == (["nodule"], {"no finding": 2})
    kind = with_classes({"x": {"_type": "ClassLabel", "names": ["a", "b"]}})["x"]
    assert [named(value, kind, "x") for value in (1, 1.0, "1", "b", None, -1, float("nan"))] == ["b"] * 4 + [None] * 3
    for value in (2, -2, 0.5, "c", {}):
        with pytest.raises(BadRow, match="x is none of its 2 classes"):
            named(value, kind, "x")


def test_older_notations_of_lists_are_known():
    label = {"_type": "ClassLabel", "names": ["a", "b"]}
    kinds = with_classes(
        {"l": [label], "s": {"_type": "Sequence", "feature": {"k": label, "v": {"_type": "Value"}}}, "v": {}}
    )
    assert set(kinds) == {"l", "s"}
    assert named([0, -1, 1], kinds["l"], "l") == "a, b"
    assert named({"k": [0, 1], "v": [5, 6]}, kinds["s"], "s") == {"k": "a, b", "v": [5, 6]}


def test_files_that_number_their_classes_differently_are_refused(tmp_path: Path, prepared):
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "a.parquet", [row(1)])
    write(tmp_path / "d" / "b.parquet", [row(1)], NAMES[::-1])
    with pytest.raises(DataError, match=r"column finding has different class names in b\.parquet and a\.parquet"):
        prepared("d", answer_column="finding")
