"""Rows are left out by the values of their columns, in every kind of table, and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from job.config.loader import validate
from job.data import Data
from job.data.prepare import prepare
from job.errors import DataError, SpecError

ROWS: list[dict[str, Any]] = [
    {"caption": "a", "view": "PA", "lang": "en", "normal": True, "findings": "None."},
    {"caption": "b", "view": "AP", "lang": "en", "normal": False, "findings": ""},
    {"caption": "c", "view": "LATERAL", "lang": "en", "normal": True, "findings": None},
    {"caption": "d", "view": "pa ", "lang": "zh", "normal": True, "findings": "Clear."},
    {"caption": "e", "view": None, "lang": "en", "normal": True, "findings": "Clear."},
]


@pytest.fixture(params=["jsonl", "csv", "parquet"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    file = tmp_path / f"rows.{request.param}"
    if request.param == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    elif request.param == "csv":
        lines = [",".join("" if value is None else str(value) for value in row.values()) for row in ROWS]
        file.write_text("\n".join([",".join(ROWS[0]), *lines]))
    else:
        file.write_text("\n".join(map(json.dumps, ROWS)))
    return file


@pytest.fixture
def prepared(tree: dict[str, Any], tmp_path: Path):
    def prepare_it(path: Path, **dataset: Any) -> Data:
        tree["dataset"] = {"path": str(path), "eval_fraction": 0, "image_column": None} | dataset
        return prepare(validate(tree), tmp_path / "scratch")

    return prepare_it


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"filter": {"view": "PA"}}, "ad"),
        ({"filter": {"view": ["PA", "AP"], "lang": "en"}}, "ab"),
        ({"filter": {"normal": False}}, "b"),
        ({"dropna": ["findings"]}, "ade"),
        ({"dropna": ["findings", "view"], "filter": {"lang": "EN"}}, "a"),
        ({"dropna": ["findings"], "max_rows": 2}, "ad"),
    ],
)
def test_rows_with_the_values_are_used(table: Path, prepared: Any, given: dict[str, Any], left: str) -> None:
    data = prepared(table, **given)
    assert "".join(row["reference"] for row in data.train) == left
    assert data.quarantined == []
    if "max_rows" not in given:
        assert data.facts.filtered == len(ROWS) - len(left)
        assert f"; {len(ROWS) - len(left)} of 5 rows left out by dataset." in data.facts.source


def test_without_a_filter_no_row_is_counted(table: Path, prepared: Any) -> None:
    assert prepared(table).facts.filtered == 0


def test_an_item_of_a_list_is_enough_and_a_broken_line_stays_a_bad_row(tmp_path: Path, prepared: Any) -> None:
    rows = [{"caption": "a", "labels": ["Edema", "Mass"]}, {"caption": "b", "labels": []}, {"caption": "c"}]
    deep = '{"caption": "d", "labels": ' + "[" * 900 + "]" * 900 + "}"
    (tmp_path / "rows.jsonl").write_text("\n".join([*map(json.dumps, rows), "{", deep]))
    data = prepared(tmp_path / "rows.jsonl", filter={"labels": ["mass", "nodule"]}, max_bad_fraction=0.7)
    assert [row["reference"] for row in data.train] == ["a"]
    assert data.facts.filtered == 3
    assert [row.reason for row in data.quarantined] == ["line is not JSON"]


def test_held_out_rows_are_filtered_too(table: Path, prepared: Any) -> None:
    data = prepared(table, eval_path=str(table), eval_fraction=0.1, filter={"view": "pa"})
    assert (len(data.train), len(data.evaluation), data.facts.filtered) == (2, 2, 6)


def test_an_unknown_column_is_told_with_the_nearest(table: Path, prepared: Any) -> None:
    wrong = r"dataset\.filter has veiw \(did you mean view\?\); dataset\.dropna has finding \(did you mean findings\?\): no such"
    with pytest.raises(DataError, match=wrong):
        prepared(table, filter={"veiw": "PA"}, dropna=["finding"])


def test_where_no_row_is_left_it_is_told_without_any_value(table: Path, prepared: Any) -> None:
    with pytest.raises(
        DataError, match=r"none of 5 rows is left: 4 pass .* column lang, 0 pass .* column view"
    ) as refused:
        prepared(table, filter={"lang": "en", "view": "Doe^John"})
    assert "Doe" not in str(refused.value)


def test_a_column_without_a_value_is_refused_before_the_data_is_read(tmp_path: Path, prepared: Any) -> None:
    with pytest.raises(SpecError, match="filter names no value of view, so no row would be left"):
        prepared(tmp_path / "none.csv", filter={"view": []})
