"""Names in a table that are no paths from its folder are found, if they can mean only one file; a missing image stays missing."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from job.config.loader import validate
from job.data import Data
from job.data.image_names import Lookup, Tree, learned
from job.data.prepare import prepare
from job.errors import DataError
from tests.data.test_data import png
from tests.data.test_excel import workbook
from tests.data.test_sources import encrypted


@pytest.fixture
def prepared(tree: dict[str, Any], tmp_path: Path):
    """Prepares rows whose images have these names, in a folder with these files, each of another grey."""

    def prepare_it(
        names: list[Any] | None, files: list[str], privacy: dict[str, Any] | None = None, **dataset: Any
    ) -> Data:
        folder = tmp_path / "set"
        for grey, file in enumerate(files):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(png(grey))
        if names is not None:
            made = ({"image": name, "caption": f"c{n}"} for n, name in enumerate(names))
            rows = [name if isinstance(name, dict) else row for name, row in zip(names, made, strict=True)]
            (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tree["dataset"] = {"path": str(folder), "eval_fraction": 0} | dataset
        return prepare(validate(tree | {"privacy": privacy or {}}), tmp_path / "scratch")

    return prepare_it


def greys(data: Data) -> list[int]:
    return [image.getpixel((0, 0))[0] for row in data.train for image in row["images"]]


@pytest.mark.parametrize(
    ("names", "files", "where"),
    [
        (["a.png", "b.png"], ["images/a.png", "images/b.png"], "images/"),
        (["a", "b"], ["images/a.png", "images/b.jpg"], "images/"),
        ([7, 10], ["films/7.png", "films/10.png"], "films/"),
        (["1.2.840.1", "1.2.840.10"], ["x/1.2.840.1.dcm.png", "x/1.2.840.10.png", "x/1.2.840.1.png"], "x/"),
        (["x1/source.jpg", "x2/source.jpg"], ["imgs/x1/source.jpg", "imgs/x2/source.jpg", "imgs/x1/mask.png"], "imgs/"),
        (["set-small/train/p1/a.png", "set-small/train/p2/a.png"], ["train/p1/a.png", "train/p2/a.png"], "train/"),
        (["/mnt/d/p1/a.png", "/mnt/d/p2/a.png"], ["p1/a.png", "p2/a.png"], ""),
        (["/mnt/p1/a.png", "/mnt/p2/b.png"], ["images/a.png", "images/b.png"], "images/"),
        (["C:\\films\\a.png", "C:\\films\\b.png"], ["images/a.png", "images/b.png"], "images/"),
        (["file:///mnt/d/a.png", "file:///mnt/d/b.png"], ["d/a.png", "d/b.png"], "d/"),
        (["a.png", "b.png"], ["images_001/images/a.png", "images_002/images/b.png"], ""),
        (["A.PNG", "b.png"], ["images/a.png", "images/B.png"], "images/"),
        (["a.png", "A.png"], ["images/a.png", "images/A.png"], "images/"),
        (["a\u0308.png", "b.png"], ["images/\u00e4.png", "images/b.png"], "images/"),
    ],
)
def test_names_are_found(tmp_path: Path, prepared, names: list[Any], files: list[str], where: str):
    folder, data = tmp_path / "set", prepared(names, files)
    wanted = [2, 1] if "x/1.2.840.1.dcm.png" in files else [0, 1]
    assert greys(data) == wanted
    assert data.facts.source.endswith(f"images in image found in {where or folder}")
    assert data.facts.absolute == 0


def pack(folder: Path, archive: str, names: dict[str, int], packing: int = zipfile.ZIP_DEFLATED) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / archive, "w", packing) as packed:
        for name, grey in names.items():
            packed.writestr(name, png(grey))


@pytest.mark.parametrize(
    ("names", "archives", "where"),
    [
        (["a.png", "b.png"], {"images.zip": {"a.png": 0, "b.png": 1}}, "images.zip/"),
        (
            ["images/a.png", "images/b.png"],
            {"images.zip": {"images/a.png": 0, "images/b.png": 1}},
            "images.zip/images/",
        ),
        (["a", "b"], {"0.zip": {"a.png": 0}, "1.zip": {"b.png": 1, "__MACOSX/b.png": 2, "x/__MACOSX/b.png": 3}}, ""),
        (["x/a.png", "x/b.png"], {"0.zip": {"set\\x\\a.png": 0, "set\\x\\b.png": 1}}, "0.zip/set/x/"),
    ],
)
def test_images_in_zips_are_read_where_they_are(prepared, tmp_path: Path, names: list[str], archives: Any, where: str):
    for packing, (archive, files) in zip((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED), archives.items(), strict=False):
        pack(tmp_path / "set", archive, files, packing)
    data = prepared(names, [])
    assert greys(data) == greys(pickle.loads(pickle.dumps(data))) == [0, 1]
    assert f"images in image found in {where or tmp_path / 'set'}" in data.facts.source
    assert not [*(tmp_path / "scratch").rglob("*.png")]


def test_a_damaged_archive_spoils_its_rows_and_one_that_cannot_be_opened_is_named(
    prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    archive = tmp_path / "set" / "images.zip"
    pack(tmp_path / "set", "images.zip", {"a.png": 0, "b.png": 1})
    whole = archive.read_bytes()
    place = whole.index(b"b.png") + 20
    archive.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    data = prepared(["a.png", "b.png"], [], max_bad_fraction=0.5)
    assert (greys(data), [row.reason for row in data.quarantined]) == ([0], ["image in a zip archive is damaged"])
    archive.write_bytes(whole[:-40])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with pytest.raises(DataError, match=r"images\.zip cannot be opened: copy it again$"):
        prepared(["a.png", "b.png"], [])


@pytest.mark.parametrize("how", ["with a password", "that is packed in a rare way"])
def test_what_an_archive_does_not_give_away_is_told(prepared, tmp_path: Path, how: str):
    pack(tmp_path / "set", "images.zip", {"a.png": 0}, zipfile.ZIP_STORED if "password" in how else zipfile.ZIP_LZMA)
    archive = tmp_path / "set" / "images.zip"
    if "password" in how:
        archive.write_bytes(encrypted(archive.read_bytes()))
    with pytest.raises(DataError, match=rf"image is in a zip archive {how}; unpack it"):
        prepared(["a.png"], [])


def test_the_only_file_of_a_name_is_not_the_image_of_two_paths(prepared):
    """Moving all images into one folder overwrites images of the same name. The sample of paths does not hold the second path."""
    names = [f"/mnt/p{n}/{3 if n == 99 else n}.png" for n in range(100)]
    data = prepared(names, [f"images/{n}.png" for n in range(99)], max_bad_fraction=0.5)
    assert [row.row for row in data.quarantined] == [3, 99]
    assert len(greys(data)) == 98


def test_a_missing_image_is_not_replaced_by_one_of_the_same_name(prepared):
    data = prepared(
        ["p1/0.png", "p2/0.png", "p3/0.png"], ["p1/0.png", "p3/0.png", "thumbs/p9/0.png"], max_bad_fraction=0.5
    )
    assert (greys(data), [row.row for row in data.quarantined]) == ([0, 1], [1])
    data = prepared(["images/a.png", "images/b.png"], ["images/a.png", "thumbs/b.png"], max_bad_fraction=0.5)
    assert [row.row for row in data.quarantined] == [1]


def test_a_name_in_several_folders_is_refused_until_one_is_named(prepared):
    files = ["small/a.png", "small/b.png", "large/a.png", "large/b.png"]
    with pytest.raises(
        DataError, match=r"2 × image name is there in several folders; write which in dataset.image_column"
    ):
        prepared(["a.png", "b.png"], files)
    data = prepared(["a.png", "b.png"], files, image_column="large/{image}")
    assert greys(data) == [2, 3]
    with pytest.raises(DataError, match="several formats"):
        prepared(["c", "d"], ["x/c.png", "x/c.jpg", "x/d.png", "x/d.jpg"])


def test_of_one_name_in_the_folders_of_two_splits_that_of_the_row_s_split_is_meant(prepared, tmp_path: Path):
    files = ["train/0.png", "train/1.png", "test/0.png", "test/1.png"]
    for n, part in enumerate(("train", "test")):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{part}.csv").write_text(f"image,caption\n0,a{n}\n1,b{n}\n")
    data = prepared(None, files, eval_split="test", eval_fraction=0.1)
    assert greys(data) == [0, 1]
    assert [row["images"][0].getpixel((0, 0))[0] for row in data.evaluation] == [2, 3]


def test_a_template_makes_paths_from_columns_and_one_of_each_value(prepared):
    rows = [{"dir": 1, "id": ["a", "b"], "caption": "x"}, {"dir": "2", "id": "a", "caption": "y"}]
    data = prepared(rows, ["f/1/a.png", "f/1/b.png", "f/2/a.png"], image_column="f/{dir}/{id}.png")
    assert ([len(row["images"]) for row in data.train], greys(data)) == ([2, 1], [0, 1, 2])
    with pytest.raises(DataError, match=r"dataset\.image_column has \{folder\}: no such column"):
        prepared(rows, [], image_column="{folder}/{id}.png")
    with pytest.raises(DataError, match="1 × no image"):
        prepared([*rows, {"dir": 3, "caption": "z"}], [], image_column="f/{dir}/{id}.png")


def test_on_a_terminal_the_first_path_and_the_nearest_that_exists_are_named(
    prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with pytest.raises(DataError, match=r"No such file or directory \(first: row 1\)") as refused:
        prepared(["images/film_01.png", "images/other_02.png"], ["images/film_01.png", "images/other-02.png"])
    folder = tmp_path / "set"
    assert str(refused.value).endswith(
        f"The first is {folder}/images/other_02.png, and the nearest that exists is {folder}/images/other-02.png"
    )
    with pytest.raises(DataError) as refused:
        prepared(["/mnt/unlike/any.png"], [])
    assert str(refused.value).endswith("The first is /mnt/unlike/any.png, and the nearest that exists is /mnt")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with pytest.raises(DataError, match="On a terminal, job check names the first path that was tried$") as refused:
        prepared(["images/doe_john.png"], [])
    assert "doe_john" not in str(refused.value)


def test_a_name_never_leads_out_of_the_folder(prepared, tmp_path: Path):
    (tmp_path / "secret.png").write_bytes(png(9))
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        with pytest.raises(DataError, match="leaves the dataset's folder"):
            prepared([name, name], ["images/a.png"])


def pack_tar(folder: Path, archive: str, names: dict[str, int | str]) -> None:
    """Images of these greys, and texts, as `tar` packs a folder."""
    with tarfile.open(folder / archive, "w") as packed:
        for name, given in names.items():
            data = given.encode() if isinstance(given, str) else png(given)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            packed.addfile(entry, io.BytesIO(data))


@pytest.mark.parametrize("table", ["metadata.jsonl", "reports.csv"])
def test_images_in_a_tar_archive_are_read_where_they_are(prepared: Any, tmp_path: Path, table: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    lines = {"metadata.jsonl": '{"file_name": "images/%s.png", "caption": "c%s"}', "reports.csv": "images/%s.png,c%s"}
    head = ["file_name,caption"] if table.endswith("csv") else []
    (folder / table).write_text("\n".join(head + [lines[table] % (number, number) for number in range(4)]))
    pack_tar(folder, "images.tar", {f"./images/{number}.png": number for number in range(4)})
    data = prepared(None, [])
    assert greys(data) == greys(pickle.loads(pickle.dumps(data))) == [0, 1, 2, 3]
    assert data.facts.source.endswith("images in file_name found in images.tar/images/")
    assert "not read" not in data.facts.source


@pytest.mark.parametrize("head", ["", "./", "/data/", ".//data//"])
@pytest.mark.parametrize("also", [".DS_Store", "._images", "._0.txt", "__MACOSX/0.txt", "Thumbs.db", "LICENSE"])
def test_what_systems_add_to_a_tar_archive_of_images_makes_no_rows(
    prepared: Any, tmp_path: Path, head: str, also: str
) -> None:
    (tmp_path / "set").mkdir()
    pack_tar(tmp_path / "set", "images.tar", {head + also: "x", f"{head}0.png": 0, f"{head}1.png": 1})
    assert greys(prepared(["0.png", "1.png"], [])) == [0, 1]


def test_a_table_of_any_kind_names_images_in_a_tar_archive(prepared: Any, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    pack_tar(tmp_path / "set", "images.tar", {"0.png": 0, "1.png": 1})
    head, rows = ("image", "caption"), [("0.png", "a"), ("1.png", "b")]
    workbook(tmp_path / "set" / "reports.xlsx", Sheet1=[head, *rows])
    assert greys(prepared(None, [])) == [0, 1]
    (tmp_path / "set" / "reports.xlsx").unlink()
    (tmp_path / "set" / "rows.json").write_text(
        json.dumps({"data": [dict(zip(head, row, strict=True)) for row in rows]})
    )
    assert greys(prepared(None, [])) == greys(prepared(None, [], format="hub")) == [0, 1]


def test_shards_whose_texts_follow_their_images_are_read(prepared: Any, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    late = {f"{number}.png": number for number in range(101)} | {f"{number}.txt": "a" for number in range(101)}
    pack_tar(tmp_path / "set", "0.tar", late)
    (tmp_path / "set" / "README.csv").write_text("file,licence\n0.tar,none\n")
    assert greys(prepared(None, [])) == [*range(101)]
    pack_tar(tmp_path / "set", "1.tar", {"101.png": 101, "101.txt": "a", "102.png": 102})
    pack_tar(tmp_path / "set", "2.tar", {"103.png": 103})
    data = prepared(None, [], max_bad_fraction=0.5)
    assert greys(data) == [*range(102)]
    assert [row.reason for row in data.quarantined] == ["no txt", "no txt"]


def test_a_tar_archive_that_cannot_be_read_to_its_end_is_named(
    prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set").mkdir()
    pack_tar(tmp_path / "set", "images.tar", {"a.png": 0, "b.png": 1})
    whole = (tmp_path / "set" / "images.tar").read_bytes()
    (tmp_path / "set" / "images.tar").write_bytes(whole[: 4 * tarfile.BLOCKSIZE])  # without its end
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with pytest.raises(DataError, match=r"images\.tar cannot be opened: copy it again$"):
        prepared(["a.png", "b.png"], [])


def test_folders_behind_links_are_searched_once(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(png(1))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "images").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "round").symlink_to(tmp_path / "set")
    lookup = learned(tmp_path / "set", ["a.png"])
    assert lookup is not None
    assert lookup.find("a.png") == str(tmp_path / "set" / "images" / "a.png")
    assert pickle.loads(pickle.dumps(lookup)).find("a") == lookup.find("a.png")
    assert len(pickle.dumps(Lookup(Tree(tmp_path)))) < 500


def test_archives_beside_a_table_that_may_hold_its_images_are_told_by_their_kind_alone(prepared: Any) -> None:
    with pytest.raises(
        DataError, match=r"Not read beside the table: 2 × \.tar\.gz, 1 × \.7z; unpack archives"
    ) as refused:
        prepared(["a.png", "b.png"], ["Doe_John.tar.gz", "films/2.tar.gz", "films/3.7z"])
    assert "Doe" not in str(refused.value)


def test_a_folder_that_another_program_removes_during_the_search_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the data lie folders of other programs: their temporary ones come and go."""
    for name in ("gone/inside", "images"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "images" / "1.png").touch()
    walk = os.walk

    def removing(*given: Any, **named: Any) -> Iterator[Any]:
        for each in walk(*given, **named):
            if each[0].endswith("gone"):
                shutil.rmtree(each[0])
            yield each

    monkeypatch.setattr(os, "walk", removing)
    assert list(Tree(tmp_path).files) == ["1"]
