"""Encodings are decided strictly: what is UTF-8 is read, U+FFFD and all; what is not spoils its row alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.config.loader import validate
from job.data import Data
from job.data.facts import QuarantinedRow
from job.data.prepare import prepare
from job.errors import DataError
from job.planning.facts import Facts
from job.planning.warnings import warnings
from tests.data.test_data import png
from tests.data.test_sources import shard

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LOST = "The heart\ufffds size"
LATIN = "Größe".encode("latin-1")


@pytest.fixture
def prepared(tree: dict[str, Any], tmp_path: Path):
    def prepare_it(name: str, content: bytes, **dataset: Any) -> Data:
        (tmp_path / "0.png").write_bytes(png())
        (tmp_path / name).write_bytes(content)
        tree["dataset"] = {"path": str(tmp_path / name), "eval_fraction": 0, "max_bad_fraction": 0.6} | dataset
        return prepare(validate(tree), tmp_path / "scratch")

    return prepare_it


def learned(data: Data) -> list[str]:
    return [row["reference"] for row in data.train]


@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv"])
def test_a_replacement_character_is_a_character(tree: dict[str, Any], prepared, name: str, escaped: bool):
    """Wherever it stands: in what is learned, in a column that nobody uses, as such or as an escape of JSON."""
    row = {"image": "0.png", "caption": LOST, "note": "\ufffd"}
    table = json.dumps([row] if name == "rows.json" else row, ensure_ascii=escaped)
    if name.endswith("sv"):
        comma = "," if name == "rows.csv" else "\t"
        table = comma.join(row) + "\n" + comma.join(row.values())
    data = prepared(name, table.encode())
    assert (learned(data), data.facts.lossy) == ([LOST], 1)
    said = warnings(validate(tree), Facts(data=data.facts), [], None, None, "", "32bit")
    assert any(each.startswith("1 rows contain U+FFFD") for each in said)


@pytest.mark.parametrize("where", ["caption", "note"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_byte_that_is_no_utf8_spoils_its_row(prepared, name: str, where: str):
    good = {"image": "0.png", "caption": LOST, "note": "n"}
    lines = [json.dumps(each, ensure_ascii=False) for each in (good, good | {where: "X"})]
    if name == "rows.csv":
        lines = [",".join(good), *(",".join(json.loads(line).values()) for line in lines)]
    text = "\n".join(lines) if name != "rows.json" else f"[{','.join(lines)}]"
    data = prepared(name, text.encode().replace(b"X", LATIN))
    assert learned(data) == [LOST]
    assert data.quarantined == [QuarantinedRow(1, "line is not UTF-8; save the table as UTF-8")]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_unicode_is_read_in_all_its_encodings(prepared, name: str, encoding: str):
    row = {"image": "0.png", "caption": "Größe 3 µm, 肺"}
    text = json.dumps([row] if name == "rows.json" else row, ensure_ascii=False)
    data = prepared(name, ('image,caption\n0.png,"Größe 3 µm, 肺"' if name == "rows.csv" else text).encode(encoding))
    assert learned(data) == ["Größe 3 µm, 肺"]


def test_names_of_columns_that_are_no_utf8_are_told(prepared):
    with pytest.raises(DataError, match="no row can be read: line is not UTF-8"):
        prepared("rows.csv", b"image,caption," + LATIN + b"\n0.png,c,1\n")


def test_a_file_that_is_cut_in_a_character_loses_its_last_row(prepared):
    data = prepared("rows.csv", "image,caption\n0.png,a\n0.png,肺".encode("utf-16")[:-1])
    assert (learned(data), [row.row for row in data.quarantined]) == (["a"], [1])


def test_texts_in_shards_are_decided_row_by_row(tmp_path: Path, prepared):
    members = {"a.png": png(), "a.txt": LOST.encode(), "b.png": png(), "b.txt": LATIN}
    members |= {"c.png": png(), "c.json": b'{"txt": "' + LATIN + b'"}', "d.png": png(), "d.txt": b"\xef\xbb\xbfMarked."}
    data = prepared("x.tar", shard(tmp_path / "x.tar", members).read_bytes())
    assert learned(data) == [LOST, "Marked."]
    assert [row.reason for row in data.quarantined] == ["line is not UTF-8; save the table as UTF-8"] * 2


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ('"' + "[" * 50_000 + '"', "no conversation"),
        ("[" * 600 + "1" + "]" * 600, "values nested too deeply"),
        (json.dumps([{"role": "user", "content": "x" * 1_000_001}]), "a text of more than 1,000,000 characters"),
    ],
    ids=["a conversation in text", "a value", "a text"],
)
def test_depth_and_length_without_measure_spoil_their_row(prepared, value: str, reason: str):
    good = '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'
    lines = [f'{{"messages": {good}, "note": "n"}}', f'{{"messages": {value}, "note": "n"}}']
    if reason.startswith("values"):
        lines[1] = f'{{"messages": {good}, "note": {value}}}'
    data = prepared("rows.jsonl", "\n".join(lines).encode(), image_column=None, group_column="note")
    assert (learned(data), data.quarantined) == (["a"], [QuarantinedRow(1, reason)])


@pytest.mark.parametrize(
    "head", ["configs: 5", "configs: &a [*a]", "configs: {a: 1}", "x: 2024-13-45", "x: " + "[" * 5000]
)
def test_a_readme_that_is_no_card_says_nothing(prepared, tmp_path: Path, head: str):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    row = {"image": "0.png", "caption": "a"}
    assert learned(prepared("rows.jsonl", json.dumps(row).encode(), path=str(tmp_path))) == ["a"]
