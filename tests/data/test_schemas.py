"""Parquet files of one table: what nobody uses is not read, what is used gets the widest type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from job.config.loader import validate
from job.data import Data
from job.data.prepare import prepare
from job.errors import DataError
from tests.data.test_data import png

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def prepared(tree: dict[str, Any], tmp_path: Path):
    """The rows of files that have one row each, with these columns beside picture and caption."""

    def prepare_it(*files: dict[str, pa.Array], **dataset: Any) -> Data:
        (tmp_path / "d").mkdir(exist_ok=True)
        for number, more in enumerate(files):
            columns = {"image": pa.array([png(number)]), "caption": pa.array([f"c {number}"])} | more
            parquet.write_table(pa.table(columns), tmp_path / "d" / f"{number}.parquet")
        tree["dataset"] = {"path": str(tmp_path / "d"), "eval_fraction": 0} | dataset
        return prepare(validate(tree), tmp_path / "scratch")

    return prepare_it


def learned(data: Data) -> list[str]:
    return [row["reference"] for row in data.train]


WORD, NOTHING = pa.array(["w"]), pa.nulls(1)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (NOTHING, WORD, ["", "w"]),
        (WORD, NOTHING, ["w", ""]),
        (WORD, WORD.cast(pa.large_string()), ["w", "w"]),
        (WORD.dictionary_encode(), WORD, ["w", "w"]),
        (WORD.cast(pa.string_view()), WORD, ["w", "w"]),
        (pa.array([1], pa.int8()), pa.array([2], pa.int64()), ["1", "2"]),
        (pa.array([1], pa.int64()), pa.array([1.5]), ["1.0", "1.5"]),
    ],
)
def test_a_used_column_gets_the_widest_type(prepared, first: pa.Array, second: pa.Array, said: list[str]):
    data = prepared({"note": first}, {"note": second}, answer="{caption}\n{note}")
    assert [text.partition("\n")[2] for text in learned(data)] == said


@pytest.mark.parametrize("other", [NOTHING, pa.array([1]), pa.array([["w"]]), pa.array([{"a": 1}]), None])
def test_columns_that_nobody_uses_may_differ(prepared, other: pa.Array | None):
    assert learned(prepared({"note": WORD}, {} if other is None else {"note": other})) == ["c 0", "c 1"]
    assert learned(prepared({} if other is None else {"note": other}, {"note": WORD})) == ["c 0", "c 1"]


def test_pictures_of_different_types_are_one_column(prepared):
    kinds = ({"bytes": pa.binary(), "path": pa.string()}, {"path": pa.null(), "bytes": pa.large_binary()})
    files = [
        {"image": pa.array([{"bytes": png(n), "path": None}], pa.struct(list(kind.items())))}
        for n, kind in enumerate(kinds)
    ]
    data = prepared(*files)
    assert [row["images"][0].getpixel((0, 0))[0] for row in data.train] == [0, 1]


def test_a_used_column_of_two_kinds_is_refused_with_both(prepared):
    with pytest.raises(DataError, match=r"column who is not of one type: 0\.parquet has int64; 1\.parquet has string"):
        prepared({"who": pa.array([1])}, {"who": WORD}, group_column="who")


def test_a_column_that_is_not_read_may_hold_what_is_no_text(prepared):
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    assert learned(prepared({"note": broken})) == ["c 0"]
    with pytest.raises(DataError, match="rows 0 to 0 is not UTF-8"):
        prepared({"note": broken}, group_column="note")


def test_where_pictures_are_is_seen_in_columns_that_are_not_read(prepared):
    said = pa.array([[{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A lung."}]])
    films = pa.array([{"bytes": png(), "path": None}])
    with pytest.raises(DataError, match=r"none of 1 rows has an image .* Column film looks like images"):
        prepared({"messages": said, "film": films, "image": NOTHING})


def test_a_file_without_rows_adds_none(tmp_path: Path, prepared):
    (tmp_path / "d").mkdir()
    none = pa.table({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())})
    parquet.write_table(none, tmp_path / "d" / "part-9.parquet")
    assert learned(prepared({})) == ["c 0"]
    (tmp_path / "d" / "0.parquet").unlink()
    with pytest.raises(DataError, match=r"part-9\.parquet has no rows"):
        prepared()
