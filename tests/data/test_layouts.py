"""Which files are the rows of a split, and that tables which do not belong together are never stacked."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from job.config.loader import validate
from job.data import Data
from job.data.layouts import of_split, split_of
from job.data.prepare import prepare
from job.errors import DataError
from job.planning.describe import describe
from job.planning.facts import Facts
from job.planning.plan import make_plan
from job.planning.warnings import warnings
from tests.data.test_data import png

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
Row = dict[str, Any]


@pytest.fixture
def prepared(tree: dict[str, Any], tmp_path: Path):
    def prepare_it(path: str = "d", **dataset: Any) -> Data:
        tree["dataset"] = {"path": str(tmp_path / path), "max_bad_fraction": 0} | dataset
        if not {"eval_path", "eval_split"} & set(dataset):
            tree["dataset"] |= {"eval_fraction": 0}
        return prepare(validate(tree), tmp_path / "scratch")

    return prepare_it


def write(folder: Path, **tables: list[Row]) -> None:
    """Each table as JSON by its name (`__` for a folder, `_DOT_csv` makes it a CSV), with one picture for all."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "0.png").write_bytes(png(3))
    for name, rows in tables.items():
        stem, _, ending = name.replace("__", "/").partition("_DOT_")
        file = folder / f"{stem}.{ending or 'json'}"
        file.parent.mkdir(exist_ok=True)
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        file.write_text("\n".join(lines) if ending else json.dumps(rows))


def rows(*answers: str, **more: Any) -> list[Row]:
    return [{"image": "0.png", "caption": answer} | more for answer in answers]


def learned(data: Data) -> list[str]:
    return [row["reference"] for row in data.train]


NAMES = {
    "train": "train.json trainset.json TrainData.csv x-train-0.tar training/a.csv train_val.csv mimic_trn.tsv train2017/a.json "
    "trainval.json",
    "test": "test.json testset.json X_test.csv TestSet.csv heldout.csv held_out.csv test/metadata.csv eval.jsonl test1.json "
    "testA.json "
    "evaluation-set.csv train/test.json",
    "validation": "val.json valid/a.csv dev.tsv val2017.json validation-0.tar devset.json minival2014.json "
    "train-00000/val.parquet",
    "": "latest.csv contest.json strain.csv reports.csv device.csv values.csv a/b.json",
}


@pytest.mark.parametrize("split", NAMES)
def test_splits_are_known_by_the_names_that_people_give(split: str):
    assert {name: split_of(name) for name in NAMES[split].split()} == dict.fromkeys(NAMES[split].split(), split or None)


def test_the_word_itself_comes_before_other_words_for_the_split():
    assert of_split(["val.json", "dev.json", "train.json"], "dev") == ["dev.json"]
    assert of_split(["val.json", "train.json"], "validation") == ["val.json"]
    assert of_split(["fold1.json", "fold2.json"], "fold1") == ["fold1.json"]
    assert of_split(["rows.json"], "test") == []


@pytest.mark.parametrize("test", ["testset", "TestData", "X_test", "val", "dev__rows", "heldout"])
@pytest.mark.parametrize("train", ["trainset", "training__rows", "all", "train"])
def test_a_table_of_another_split_is_named_and_never_trained_on(
    tree: Row, tmp_path: Path, prepared, train: str, test: str
):
    write(tmp_path / "d", **{train: rows("a", "b"), test: rows("c")})
    data = prepared()
    name = f"{test.replace('__', '/')}.json"
    assert learned(data) == ["a", "b"]
    assert data.facts.source.startswith(f"json: {train.replace('__', '/')}.json (not read: {name})")
    said = warnings(validate(tree), Facts(data=data.facts), [], None, None, "", "32bit")
    assert any(each.startswith(f"{name}: named after a split other than train, and not read") for each in said)


@pytest.mark.parametrize("ending", ["json", "csv", "parquet"])
def test_rows_are_of_the_split_that_a_column_names(tree: Row, tmp_path: Path, prepared, ending: str):
    made = rows("a", "b", Split="train") + rows("c", Split="Test") + rows("d", Split="val") + rows("e", Split="left")
    if ending == "parquet":
        write(tmp_path / "d")
        pq.write_table(pa.Table.from_pylist(made), tmp_path / "d" / "r.parquet")
    else:
        write(tmp_path / "d", **{f"r_DOT_{ending}" if ending == "csv" else "r": made})
    data = prepared()
    assert learned(data) == ["a", "b", "e"]
    read = "3 rows of left, train by column Split (not read: 1 rows of Test, 1 rows of val)"
    assert read in data.facts.source
    assert any(
        each.startswith("1 rows of Test, 1 rows of val: named after a split other") for each in warned(tree, data)
    )
    for split, answer in {"test": "c", "validation": "d", "dev": "d"}.items():
        data = prepared(eval_split=split)
        assert ([row["reference"] for row in data.evaluation], learned(data)) == ([answer], ["a", "b", "e"])
    with pytest.raises(DataError, match=r"named after the split fold9; column Split says Test, left, train, val"):
        prepared(eval_split="fold9")


def test_a_fold_is_held_out_by_its_number(tmp_path: Path, prepared):
    write(tmp_path / "d", r=[each for n in range(3) for each in rows(f"a{n}", f"b{n}", fold=n)])
    data = prepared(eval_split="2")
    assert ([row["reference"] for row in data.evaluation], learned(data)) == (["a2", "b2"], ["a0", "b0", "a1", "b1"])
    assert len(learned(prepared())) == 6


def test_rows_that_are_all_of_another_split_are_read_and_told(tree: Row, tmp_path: Path, prepared):
    write(tmp_path / "d", r=rows("a", "b", Split="test"))
    data = prepared()
    assert learned(data) == ["a", "b"]
    assert any(each.startswith("dataset.path: its column Split calls 2 rows test") for each in warned(tree, data))


def warned(tree: Row, data: Data) -> list[str]:
    return warnings(validate(tree), Facts(data=data.facts), [], None, None, "", "32bit")


def test_a_column_of_splits_that_one_table_lacks_is_not_needed(tree: Row, tmp_path: Path, prepared):
    write(tmp_path / "d")
    for number, made in enumerate((rows("a", split="train"), rows("b"))):
        pq.write_table(pa.Table.from_pylist(made), tmp_path / "d" / f"train-{number}.parquet")
    assert learned(prepared()) == ["a", "b"]


def test_what_is_held_out_by_name_is_read_and_named_too(tree: Row, tmp_path: Path, prepared):
    write(tmp_path / "d", trainset=rows("a", "b"), testset=rows("c"))
    data = prepared(eval_split="test")
    assert ([row["reference"] for row in data.evaluation], learned(data)) == (["c"], ["a", "b"])
    spec = validate(tree)
    said = describe(spec, make_plan(spec, facts := Facts(data=data.facts)), facts)
    assert "held out: json: testset.json (not read: trainset.json)" in said
    assert "named after a split other" not in said


def test_a_folder_of_held_out_rows_gives_its_test_table(tmp_path: Path, prepared):
    write(tmp_path / "d", all=rows("a"))
    write(tmp_path / "held", train=rows("x"), test=rows("c"))
    assert [row["reference"] for row in prepared(eval_path=str(tmp_path / "held")).evaluation] == ["c"]


def test_only_tables_of_other_splits_are_refused_until_one_is_named(tree: Row, tmp_path: Path, prepared):
    write(tmp_path / "d", testset=rows("c"), val=rows("v"))
    with pytest.raises(
        DataError, match=r"only tables named after other splits than train: testset\.json, val\.json; name the"
    ):
        prepared()
    assert learned(prepared(split="test")) == ["c"]
    data = prepared("d/testset.json")
    assert learned(data) == ["c"]
    said = warnings(validate(tree), Facts(data=data.facts), [], None, None, "", "32bit")
    assert "dataset.path is named after a test split, and its rows are trained on" in said


def test_tables_of_different_columns_are_refused_with_the_columns_of_both(tmp_path: Path, prepared):
    write(tmp_path / "d", films_DOT_csv=[{"uid": 1, "image": "0.png"}], reports_DOT_csv=[{"uid": 1, "caption": "a"}])
    with pytest.raises(
        DataError, match=r"films\.csv \(uid, image\) and reports\.csv \(uid, caption\) .* has no caption"
    ):
        prepared()
    assert learned(prepared("d/films.csv", answer_column="uid")) == ["1"]


def test_a_table_whose_pictures_have_another_name_is_not_stacked(tmp_path: Path, prepared):
    said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A lung."}]
    one, other = {"image": "0.png", "conversations": said}, {"image_path": "0.png", "conversations": said}
    write(tmp_path / "d", a=[one], b=[other])
    with pytest.raises(DataError, match=r"b\.json \(image_path, conversations\) and a\.json .* b\.json has no image"):
        prepared()


def test_tables_that_differ_in_columns_nobody_uses_are_one(tmp_path: Path, prepared):
    write(tmp_path / "d", a=rows("a", age=3), b=rows("b", sex="f"))
    assert learned(prepared()) == ["a", "b"]


def test_folders_of_one_table_each_are_all_read(tmp_path: Path, prepared):
    for name in ("one", "two"):
        write(tmp_path / "d" / name)
        (tmp_path / "d" / name / "metadata.jsonl").write_text(
            json.dumps({"file_name": f"{name}/0.png", "caption": name})
        )
    assert learned(prepared()) == ["one", "two"]


@pytest.mark.parametrize("how", [{}, {"indent": 1}])
def test_rows_in_an_object_are_read_and_named(tmp_path: Path, prepared, how: Row):
    made: dict[str, Any] = {"version": "1.0", "info": {"year": 2020}, "images": rows("a", "b")}
    write(tmp_path / "d")
    (tmp_path / "d" / "set.json").write_text(json.dumps(made, **how))
    data = prepared()
    assert (learned(data), "set.json holds images;" in data.facts.source) == (["a", "b"], True)
    (tmp_path / "d" / "set.json").write_text(json.dumps(made | {"others": rows("c")}, **how))
    with pytest.raises(
        DataError, match=r"set\.json cannot be read: it holds several lists, images, others; write the rows"
    ):
        prepared()
    (tmp_path / "d" / "set.json").write_text(json.dumps(rows("a", notes=[{"by": "x"}])[0], **how))
    assert learned(prepared()) == ["a"]


def test_a_list_for_each_split_gives_that_split(tmp_path: Path, prepared):
    write(tmp_path / "d")
    (tmp_path / "d" / "all.json").write_text(json.dumps({"train": rows("a"), "dev": rows("v"), "test": rows("t")}))
    data = prepared(eval_split="validation")
    assert ([row["reference"] for row in data.evaluation], learned(data)) == (["v"], ["a"])
    assert "all.json holds train (not read: dev, test)" in data.facts.source
    assert data.facts.held_out_source is not None
    assert "all.json holds dev (not read: train, test)" in data.facts.held_out_source
    with pytest.raises(
        DataError, match=r"all\.json cannot be read: it holds the splits train, dev, test, and not fold3"
    ):
        prepared(eval_split="fold3")


def test_tables_are_joined_by_a_column_they_share(tmp_path: Path, prepared):
    films = [{"uid": uid, "film": name} for uid, name in ((1, "1.png"), (1, "2.png"), (2, "3.png"), (9, "4.png"))]
    write(tmp_path / "d", films_DOT_csv=films, notes_DOT_csv=[{"uid": 1, "site": "A"}, {"uid": 2, "site": "B"}])
    write(tmp_path / "d", reports=[{"uid": n, "caption": f"r{n}"} for n in (1, 2.0, "3")])
    for n in range(1, 5):
        (tmp_path / "d" / f"{n}.png").write_bytes(png(n))
    how: Row = {"join": "uid", "image_column": "film", "instruction": "From {site}:", "max_bad_fraction": 0.4}
    data = prepared(**how)
    shown = [[image.getpixel((0, 0))[0] for image in row["images"]] for row in data.train]
    assert (shown, learned(data)) == ([[1, 2], [3]], ["r1", "r2.0"])
    assert [row.reason for row in data.quarantined] == ["no image"]
    assert "joined with films.csv, notes.csv by uid, 1 of 3 rows without a counterpart" in data.facts.source
    asked = data.train[0]["messages"][0]["content"][-1]["text"]
    assert asked == "From A:"
    with pytest.raises(DataError, match=r"dataset\.join is site; films\.csv has no such column, but uid, film"):
        prepared(**how | {"join": "site"})
    with pytest.raises(DataError, match=r"nothing to join: rows\.csv all have column caption"):
        write(tmp_path / "e", rows_DOT_csv=rows("a", uid=1))
        prepared("e", join="uid", image_column="image", answer_column="caption")


def test_an_annotation_is_never_joined_with_another_image(tmp_path: Path, prepared):
    write(tmp_path / "d")
    images: list[Row] = [{"id": 1, "file_name": "0.png"}, {"file_name": "1.png"}]
    coco: Row = {"images": images, "annotations": [{"image_id": 1, "caption": "a"}, {"caption": "b"}]}
    (tmp_path / "d" / "coco.json").write_text(json.dumps(coco))
    data = prepared(image_column="file_name", max_bad_fraction=0.5)
    assert (learned(data), [row.reason for row in data.quarantined]) == (["a"], ["no image"])
    images.append({"id": 1, "file_name": "1.png"})
    (tmp_path / "d" / "coco.json").write_text(json.dumps(coco))
    with pytest.raises(DataError, match=r"coco\.json cannot be read: two of its images have the same id"):
        prepared(image_column="file_name")


def test_rows_without_a_key_are_joined_with_nothing(tmp_path: Path, prepared):
    write(tmp_path / "d", films_DOT_csv=[{"uid": uid, "image": "0.png"} for uid in ("", " ", 1)])
    write(tmp_path / "d", reports_DOT_csv=[{"uid": uid, "caption": f"r{uid}"} for uid in ("", 1)])
    data = prepared(join="uid", max_bad_fraction=0.5)
    assert (learned(data), [row.reason for row in data.quarantined]) == (["r1"], ["no image"])
    write(tmp_path / "d", reports_DOT_csv=[{"uid": uid, "caption": "r"} for uid in ("001", "002")])
    with pytest.raises(DataError, match=r"no value of it in reports\.csv is in films\.csv; write them alike"):
        prepared(join="uid")


def test_a_patient_and_a_fold_are_those_of_all_films_of_a_study(tmp_path: Path, prepared):
    films = [
        (1, "P1", 0),
        (1, "P1", 0),
        (2, "P1", 0),
        (3, "P2", 1),
        (3, "P2", 1),
        (4, "P3", 1),
        (4, "P4", 2),
        (5, "P5", 2),
    ]
    made = [{"uid": uid, "image": "0.png", "who": who, "fold": fold} for uid, who, fold in films]
    write(tmp_path / "d", films_DOT_csv=made, reports=[{"uid": n, "caption": f"r{n}"} for n in range(1, 6)])
    how: Row = {"join": "uid", "group_column": "who", "max_bad_fraction": 0.5, "image_column": "image"}
    data = prepared(**how)
    assert [row["unit"] for row in data.train] == [0, 0, 2, 3]
    assert [row.reason for row in data.quarantined] == ["who has several values, and a row can be in one group only"]
    data = prepared(**how, eval_split="1")
    assert ([row["reference"] for row in data.evaluation], learned(data)) == (["r3"], ["r1", "r2", "r5"])


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_of_a_split_and_a_fold_neither_is_forgotten(tmp_path: Path, prepared, ending: str):
    made = [row for n in range(4) for row in rows(f"a{n}", fold=n % 2, split="train" if n < 3 else "test")]
    write(tmp_path / "d", **{f"r_DOT_{ending}" if ending == "csv" else "r": made})
    assert learned(prepared()) == ["a0", "a1", "a2"]
    for split, held, trained in (("test", ["a3"], ["a0", "a1", "a2"]), ("1", ["a1", "a3"], ["a0", "a2"])):
        data = prepared(eval_split=split)
        assert ([row["reference"] for row in data.evaluation], learned(data)) == (held, trained)
    with pytest.raises(DataError, match="column split says test, train; column fold says 0, 1"):
        prepared(eval_split="7")


@pytest.mark.parametrize(("split", "spelled"), [("external", "EXTERNAL "), ("2", "2.0"), ("Test", "test")])
def test_a_split_that_is_spelled_in_two_ways_is_one(tmp_path: Path, prepared, split: str, spelled: str):
    made = rows("a", split="site A") + rows("b", split=split) + rows("c", split=spelled)
    write(tmp_path / "d", r=made)
    data = prepared(eval_split=split)
    assert ([row["reference"] for row in data.evaluation], learned(data)) == (["b", "c"], ["a"])


def test_tables_that_could_be_joined_are_told_so(tmp_path: Path, prepared):
    write(tmp_path / "d", films_DOT_csv=[{"uid": 1, "image": "0.png"}], reports_DOT_csv=[{"uid": 1, "caption": "a"}])
    with pytest.raises(DataError, match=r"or join them by a column that both have \(uid\): dataset\.join"):
        prepared()


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl"])
def test_packed_tables_are_read(tmp_path: Path, prepared, ending: str):
    write(tmp_path / "d")
    text = {
        "csv": 'image,caption\n0.png,"a\nb"\n',
        "json": json.dumps(rows("a\nb")),
        "jsonl": json.dumps(rows("a\nb")[0]),
    }
    packed = gzip.compress(text[ending].encode("utf-16" if ending == "csv" else "utf-8-sig"))
    (tmp_path / "d" / f"rows.{ending}.gz").write_bytes(packed)
    assert learned(prepared()) == ["a\nb"]
    assert learned(prepared(f"d/rows.{ending}.gz")) == ["a\nb"]
    (tmp_path / "d" / f"rows.{ending}.gz").write_bytes(packed[:-12])
    with pytest.raises(DataError, match=rf"rows\.{ending}\.gz cannot be read: .*end"):
        prepared()


def test_rows_in_an_object_are_not_held_out_by_a_split_that_nothing_names(tmp_path: Path, prepared):
    write(tmp_path / "d")
    (tmp_path / "d" / "set.json").write_text(json.dumps({"images": rows("a", "b")}))
    with pytest.raises(DataError, match=r"1 × \.json; expected .*, named after the split test"):
        prepared(eval_split="test")
