"""Excel workbooks are tables: what their cells hold, which sheet is read, and what is refused."""

from __future__ import annotations

import datetime
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from job.config.loader import validate
from job.data import Data
from job.data.prepare import prepare
from job.errors import DataError, SpecError
from tests.data.test_data import png

openpyxl = pytest.importorskip("openpyxl")
HEAD = ("image", "caption")


@pytest.fixture
def prepared(tree: dict[str, Any], tmp_path: Path):
    def prepare_it(path: str = "d", **dataset: Any) -> Data:
        tree["dataset"] = {"path": str(tmp_path / path), "max_bad_fraction": 0} | dataset
        tree["dataset"] |= {} if "eval_split" in dataset else {"eval_fraction": 0}
        return prepare(validate(tree), tmp_path / "scratch")

    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "0.png").write_bytes(png(3))
    return prepare_it


def workbook(file: Path, **sheets: list[tuple[Any, ...]]) -> None:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(file)


def learned(data: Data) -> list[str]:
    return [row["reference"] for row in data.train]


def test_cells_are_read_as_a_person_reads_them(tmp_path: Path, prepared):
    values = ["007", 7, 7.5, datetime.datetime(2024, 3, 1), datetime.time(9, 30), "a\nb", "a_x000D_\nb", "=1+1", "#N/A"]
    rows = [(*HEAD, "note"), (), *(("0.png", value, None) for value in values), (None, None, None), ("0.png", True, 1)]
    workbook(tmp_path / "d" / "reports.xlsx", Sheet1=rows)
    data = prepared(max_bad_fraction=0.5)
    assert learned(data) == ["007", "7", "7.5", "2024-03-01", "09:30:00", "a\nb", "a\nb", "True"]
    assert [row.reason for row in data.quarantined] == ["no caption"] * 2
    assert data.facts.source.startswith("excel: reports.xlsx; reports.xlsx holds sheet Sheet1;")


def test_the_sheet_with_answers_is_read_and_the_others_are_named(tmp_path: Path, prepared):
    workbook(tmp_path / "d" / "r.xlsx", Legend=[("code", "meaning"), (1, "x")], Reports=[HEAD, ("0.png", "a")])
    data = prepared()
    assert learned(data) == ["a"]
    assert "r.xlsx holds sheet Reports (not read: Legend)" in data.facts.source
    workbook(tmp_path / "d" / "r.xlsx", train=[HEAD, ("0.png", "a")], test=[HEAD, ("0.png", "t")])
    data = prepared(eval_split="test")
    assert ([row["reference"] for row in data.evaluation], learned(data)) == (["t"], ["a"])


def test_a_workbook_without_a_sheet_of_the_split_is_not_called_broken(tmp_path: Path, prepared):
    workbook(tmp_path / "d" / "r.xlsx", Train=[HEAD, ("0.png", "a")], Notes=[("x",)])
    with pytest.raises(DataError, match=r"r\.xlsx cannot be read: it holds the splits Train, and not test"):
        prepared(eval_split="test")


def test_a_workbook_beside_a_table_is_read_only_where_it_is_named(tmp_path: Path, prepared):
    workbook(tmp_path / "d" / "Data dictionary.xlsx", Sheet1=[HEAD, ("0.png", "x")])
    (tmp_path / "d" / "~$reports.xlsx").write_bytes(b"a lock of Excel")
    (tmp_path / "d" / "rows.csv").write_text("image,caption\n0.png,a\n")
    data = prepared()
    assert (learned(data), "rows.csv (not read: Data dictionary.xlsx)" in data.facts.source) == (["a"], True)
    assert learned(prepared(format="excel")) == learned(prepared("d/Data dictionary.xlsx")) == ["x"]


def test_a_workbook_is_joined_with_a_csv(tmp_path: Path, prepared):
    workbook(tmp_path / "d" / "reports.xlsx", Sheet1=[("uid", "caption"), (7, "a")])
    (tmp_path / "d" / "films.csv").write_text("uid,image\n7,0.png\n")
    assert learned(prepared(join="uid")) == ["a"]


@pytest.mark.parametrize("how", ["cut", "text", "password", "empty zip", "no workbook", "bomb", "head"])
def test_a_workbook_that_cannot_be_read_is_told(tmp_path: Path, prepared, how: str, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "d" / "r.xlsx"
    workbook(file, Sheet1=[("0.png", "a" * 120)] * 2 if how == "head" else [HEAD, ("0.png", "a")])
    whole, reason = file.read_bytes(), r"r\.xlsx cannot be read as an Excel workbook; save it anew as \.xlsx, or as CSV"
    if how == "empty zip":
        zipfile.ZipFile(file, "w").close()
    elif how == "no workbook":
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr(
                "[Content_Types].xml", '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"/>'
            )
    elif how == "head":
        reason = "its first line is a row, not column names; fix it, or save the table as CSV"
    elif how == "bomb":
        monkeypatch.setattr("job.data.excel.LARGEST", 1000)
        reason = "over 1e-06; save the table as CSV"
    elif how == "password":
        file.write_bytes(b"\xd0\xcf\x11\xe0" + bytes(600))
        reason = "has a password, or is in Excel's old format; save it as .xlsx"
    else:
        file.write_bytes(whole[:-60] if how == "cut" else b"image,caption\n")
    with pytest.raises(DataError, match=reason):
        prepared()


def test_a_cell_that_openpyxl_quotes_is_not_quoted(tmp_path: Path, prepared):
    file = tmp_path / "d" / "r.xlsx"
    workbook(file, Sheet1=[HEAD, ("0.png", 12345)])
    with zipfile.ZipFile(file) as packed:
        parts = {name: packed.read(name) for name in packed.namelist()}
    with zipfile.ZipFile(file, "w") as packed:
        for name, part in parts.items():
            packed.writestr(name, part.replace(b"<v>12345</v>", b"<v>Jane Doe</v>"))
    with pytest.raises(DataError, match=r"r\.xlsx cannot be read as an Excel workbook") as told:
        prepared()
    assert "Jane" not in str(told.value)


def test_without_openpyxl_it_is_told_what_to_install(tmp_path: Path, prepared, monkeypatch: pytest.MonkeyPatch):
    workbook(tmp_path / "d" / "r.xlsx", Sheet1=[HEAD, ("0.png", "a")])
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(SpecError, match=r"r\.xlsx is an Excel workbook and needs the excel extra \(pip install"):
        prepared()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("reports.xls", r"1 × \.xls; expected .*; \.xls is not read: save it as \.xlsx or CSV"),
        (
            "shard.00000.mds.zstd",
            r"holds MosaicML shards \(shard\.00000\.mds\.zstd\), which is not read; write it as Par",
        ),
        ("films.lance/data/1.lance", r"holds a Lance table \(1\.lance\), which is not read; write it as Parquet"),
        ("films.TAR.GZ", r"1 × \.tar\.gz; expected .*; \.tar\.gz is not read: unpack it"),
        ("films.h5", r"\.h5 is not read: write it as Parquet, or as WebDataset"),
    ],
)
def test_formats_that_are_not_read_are_refused_by_name(tmp_path: Path, prepared, name: str, says: str):
    (tmp_path / "d" / "0.png").unlink()
    (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "d" / name).write_bytes(b"x")
    if ".mds" in name or ".lance" in name:
        (tmp_path / "d" / "index.json").write_text(json.dumps({"version": 2, "shards": [{"format": "mds"}]}))
    with pytest.raises(DataError, match=says):
        prepared()
