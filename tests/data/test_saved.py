"""The layouts that `datasets` and the hub leave on a disk: saved data sets, caches, clones with their cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets as d
import pyarrow as pa
import pytest

from job.config.loader import validate
from job.data import Data
from job.data.prepare import prepare
from job.errors import DataError, SpecError
from tests.data.test_data import png

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
NAMES = ["none", "nodule"]


def table(*answers: str) -> d.Dataset:
    features = d.Features({"image": d.Image(), "caption": d.Value("string"), "finding": d.ClassLabel(names=NAMES)})
    rows = [{"image": {"bytes": png(n), "path": None}, "caption": each, "finding": 1} for n, each in enumerate(answers)]
    return d.Dataset.from_list(rows, features=features)


@pytest.fixture
def prepared(tree: dict[str, Any], tmp_path: Path):
    def prepare_it(path: str = "d", **dataset: Any) -> Data:
        tree["dataset"] = {"path": str(tmp_path / path)} | dataset
        if not {"eval_path", "eval_split"} & set(dataset):
            tree["dataset"] |= {"eval_fraction": 0}
        return prepare(validate(tree), tmp_path / "scratch")

    return prepare_it


def learned(data: Data) -> list[str]:
    return [row["reference"] for row in data.train]


def note(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_a_saved_data_set_is_read_in_place_without_what_was_cached_beside_it(tmp_path: Path, prepared):
    table("a", "b").save_to_disk(tmp_path / "d")
    d.load_from_disk(str(tmp_path / "d")).map(lambda row: {"caption": "cached"})
    assert list((tmp_path / "d").glob("cache-*.arrow"))
    before = sorted(file.name for file in (tmp_path / "d").iterdir())
    data = prepared()
    assert (learned(data), data.train[1]["images"][0].getpixel((0, 0))[0]) == (["a", "b"], 1)
    assert data.facts.source.startswith("arrow: data-00000-of-00001.arrow; answers in caption")
    assert learned(prepared(answer_column="finding")) == ["nodule"] * 2
    assert sorted(file.name for file in (tmp_path / "d").iterdir()) == before
    assert not list((tmp_path / "scratch").rglob("*.arrow"))


def test_a_saved_dictionary_gives_the_split_that_is_asked_for(tmp_path: Path, prepared):
    d.DatasetDict({"train": table("a", "b"), "test": table("c")}).save_to_disk(tmp_path / "d")
    data = prepared(eval_split="test")
    assert (learned(data), [row["reference"] for row in data.evaluation]) == (["a", "b"], ["c"])
    assert "not read: test/data-00000-of-00001.arrow" in data.facts.source


def test_arrow_files_of_other_programs_and_of_two_widths_are_one_table(tmp_path: Path, prepared):
    (tmp_path / "d").mkdir()
    for number, text in enumerate((pa.string(), pa.large_string())):
        rows = pa.table({"image": [png(number)], "caption": pa.array([f"c {number}"], text), "unused": [number]})
        with pa.OSFile(str(tmp_path / "d" / f"{number}.arrow"), "wb") as out, pa.ipc.new_file(out, rows.schema) as to:
            to.write_table(rows)
    assert learned(prepared()) == ["c 0", "c 1"]
    (tmp_path / "d" / "1.arrow").write_bytes(b"ARROW1 cut")
    with pytest.raises(DataError, match=r"1\.arrow cannot be read as arrow"):
        prepared()


@pytest.mark.parametrize("where", ["train", "data"])
def test_metadata_of_a_clone_is_never_rows(tmp_path: Path, prepared, where: str):
    """Neither what the hub writes nor what people add: labels, configurations, notes."""
    (tmp_path / "d" / where).mkdir(parents=True)
    table("a").to_parquet(tmp_path / "d" / where / "train-00000-of-00001.parquet")
    note(tmp_path / "d", dataset_infos={"default": {"features": {}}}, config={"a": 1}, classes={"0": "none"})
    (tmp_path / "d" / "about.json").write_text(json.dumps({"image": "x", "caption": "y"}, indent=2))
    (tmp_path / "d" / "README.md").write_text("# Films\n---\nNo card: nothing\n---\n")
    assert learned(prepared()) == ["a"]


def test_json_of_one_row_each_are_rows_where_there_is_nothing_else(tmp_path: Path, prepared):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "0.png").write_bytes(png())
    note(tmp_path / "d", a={"image": "0.png", "caption": "a"}, b={"image": "0.png", "caption": "b"})
    (tmp_path / "d" / "about.json").write_text(json.dumps({"year": 2020}, indent=2))
    assert learned(prepared()) == ["a", "b"]
    note(tmp_path / "d", labels={"0": "none"})
    with pytest.raises(DataError, match=r"labels\.json \(0\) and a\.json .* have different columns"):
        prepared()


CARD = """---
license: mit
dataset_info:
  features:
  - name: image
    dtype: string
  - name: finding
    dtype:
      class_label:
        names:
          '0': none
          '1': nodule
configs:
- config_name: chest
  data_files:
  - split: train
    path: rows/first-*.csv
  - split: test
    path: rows/second.csv
- config_name: hand
  data_files: hands.csv
---
# Films
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "d" / "rows").mkdir(parents=True)
    (tmp_path / "d" / "0.png").write_bytes(png())
    for name, said in (
        ("rows/first-1", "a"),
        ("rows/first-2", "b"),
        ("rows/second", "c"),
        ("rows/other", "x"),
        ("hands", "h"),
    ):
        (tmp_path / "d" / f"{name}.csv").write_text(f"image,caption,finding\n0.png,{said},1\n")
    (tmp_path / "d" / "README.md").write_text(CARD)
    return tmp_path / "d"


def test_a_card_says_which_files_are_whose_split(
    clone: Path, tree: dict[str, Any], tmp_path: Path, prepared, monkeypatch
):
    data = prepared(name="chest", eval_split="test")
    assert (learned(data), [row["reference"] for row in data.evaluation]) == (["a", "b"], ["c"])
    assert data.facts.source.startswith("csv: rows/first-1.csv, rows/first-2.csv (not read: hands.csv, rows/other.csv")
    assert "as listed in README.md" in data.facts.source
    assert learned(prepared(name="hand")) == ["h"]
    for name, says in ((None, "the spec none of them"), ("foot", "the spec says foot")):
        with pytest.raises(
            SpecError, match=rf"README\.md names the configurations chest, hand, and {says}; choose one"
        ):
            prepared(name=name)
    with pytest.raises(DataError, match=r"README\.md of .* names the splits train, test, not fold1; name one"):
        prepared(name="chest", split="fold1")
    monkeypatch.chdir(clone)
    for path in ("../d", "."):
        tree["dataset"] = {"path": path, "name": "hand", "eval_fraction": 0}
        assert learned(prepare(validate(tree), tmp_path / "scratch")) == ["h"]


def test_a_card_names_the_classes_of_files_that_do_not(clone: Path, prepared):
    assert learned(prepared(name="chest", answer_column="finding")) == ["nodule"] * 2
    card = clone / "README.md"
    card.write_text(card.read_text().replace("configs:", "other:"))
    assert learned(prepared(answer_column="finding")) == ["nodule"] * 5
    card.unlink()
    label = {"finding": {"names": NAMES, "_type": "ClassLabel"}}
    note(clone, dataset_infos={"default": {"description": "", "features": label}})
    assert learned(prepared(answer_column="finding")) == ["nodule"] * 5


def test_a_card_leads_to_no_file_outside_and_may_be_old(clone: Path, prepared):
    card = clone / "README.md"
    (clone.parent / "secret.csv").write_text("image,caption\n0.png,secret\n")
    card.write_text(CARD.replace("hands.csv", "'../secret.csv'"))
    assert "secret" not in learned(prepared(name="hand"))
    card.write_text(CARD.replace("hands.csv", "gone-*.csv"))
    assert "h" in learned(prepared(name="hand"))


def test_what_was_not_fetched_with_a_clone_is_told(tmp_path: Path, prepared):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "r.parquet").write_bytes(pointer)
    with pytest.raises(
        DataError, match=r"r\.parquet is a Git LFS pointer and not the file; fetch it with git lfs pull"
    ):
        prepared()
    (tmp_path / "d" / "0.png").write_bytes(pointer)
    (tmp_path / "d" / "r.jsonl").write_text(json.dumps({"image": "0.png", "caption": "c"}))
    with pytest.raises(DataError, match="image is a Git LFS pointer: fetch it with git lfs pull"):
        prepared("d/r.jsonl")
