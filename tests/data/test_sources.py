"""What `auto` makes of what it finds, and that the rows behind are the same."""

from __future__ import annotations

import base64
import csv
import functools
import gzip
import http.server
import io
import json
import os
import shutil
import socket
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from job.config.loader import validate
from job.data import Data
from job.data.facts import QuarantinedRow
from job.data.prepare import prepare
from job.data.webdataset import index_shards
from job.errors import DataError, SpecError, Unavailable
from tests.data.test_data import folder_of, png, rows_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def prepared(tree: dict[str, Any], tmp_path: Path):
    def prepare_it(path: Any, **dataset: Any) -> Data:
        tree["dataset"] = {"path": str(path), "eval_fraction": 0} | dataset
        return prepare(validate(tree), tmp_path / "scratch")

    return prepare_it


def shades(data: Data) -> list[tuple[str, list[int]]]:
    """Answers, and the grey of each row's pictures."""
    return [(row["reference"], [image.getpixel((0, 0))[0] for image in row["images"]]) for row in data.train]


def shard(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def test_webdataset_shards_are_read_in_place(tmp_path: Path, prepared):
    for number in range(2):
        members: dict[str, bytes] = {}
        for n in range(3 * number, 3 * number + 3):
            members |= {f"s/{n}.png": png(n), f"s/{n}.json": json.dumps({"caption": f"c{n}"}).encode()}
        shard(tmp_path / "data" / f"train-{number}.tar", members | {"notes": b"no row"})
    shard(tmp_path / "data" / "validation-0.tar", {"9.png": png(9), "9.json": b'{"caption": "c9"}'})
    data = prepared(tmp_path / "data", eval_fraction=0.1, eval_split="validation")
    assert shades(data) == [(f"c{n}", [n]) for n in range(6)]
    assert [row["reference"] for row in data.evaluation] == ["c9"]
    with pytest.raises(DataError, match=r"holds 3 × \.tar; expected .*, named after the split test"):
        prepared(tmp_path / "data", eval_fraction=0.1, eval_split="test")
    assert data.facts.source == (
        "webdataset: train-0.tar, train-1.tar (not read: validation-0.tar); answers in caption, images in image"
    )
    assert not any(file.stat().st_size > 100_000 for file in (tmp_path / "scratch").rglob("*") if file.is_file())


def test_webdataset_texts_and_several_images(tmp_path: Path, prepared):
    members = {
        "a.left.png": png(1),
        "a.right.png": png(2),
        "a.txt": b"Both clear.",
        "b.left.png": png(3),
        "b.txt": b"One.",
        "c.left.png": b"",
        "c.txt": b"An empty file.",
    }
    data = prepared(shard(tmp_path / "x.tar", members), max_bad_fraction=0.4)
    assert shades(data) == [("Both clear.", [1, 2]), ("One.", [3])]
    assert shades(prepared(tmp_path / "x.tar", image_column="left.png", max_bad_fraction=0.4))[0] == (
        "Both clear.",
        [1],
    )


def test_a_shard_that_is_packed_is_named(tmp_path: Path, prepared):
    file = shard(tmp_path / "x.tar", {"a.png": png(1), "a.txt": b"A"})
    file.write_bytes(gzip.compress(file.read_bytes()))
    with pytest.raises(DataError, match=r"x\.tar is not a plain tar archive that can be read to its end: at byte 0"):
        prepared(file)


def indexed(file: Path, data: bytes) -> list[str]:
    file.write_bytes(data)
    return list(index_shards([("x.tar", file)], "dataset.path"))


def test_a_shard_with_one_false_bit_in_a_header_loses_no_row(tmp_path: Path):
    """Every byte of the headers in the middle. What `tarfile` takes for blanks may change: the rows are then the same."""
    members = {f"{n}.{ending}": b"x" * 600 for n in range(4) for ending in ("png", "txt")}
    file = shard(tmp_path / "x.tar", members)
    sound, refused = file.read_bytes(), 0
    rows = indexed(file, sound)
    with tarfile.open(file) as archive:
        headers = [member.offset for member in archive][3:4]
    for place in (header + byte for header in headers for byte in range(512)):
        false = bytearray(sound)
        false[place] ^= 1 << place % 8
        try:
            assert indexed(file, bytes(false)) == rows
        except DataError as error:
            refused += 1
            assert "dataset.path: x.tar is not a plain tar archive" in str(error)
            assert f"at byte {place - place % 512}: " in str(error)
    assert refused > 500


def test_a_shard_that_was_cut_anywhere_is_refused(tmp_path: Path):
    members = {f"{n}.{ending}": b"x" * 600 for n in range(4) for ending in ("png", "txt")}
    sound = shard(tmp_path / "x.tar", members).read_bytes()
    ended = len(sound.rstrip(b"\0")) // 512 * 512 + 512 + 1024
    assert len(indexed(tmp_path / "x.tar", sound[:ended])) == 4
    for size in [*range(0, ended, 256), ended - 1]:
        with pytest.raises(
            DataError, match=r"dataset\.path: x\.tar is not .* to its end: at byte \d+: .*copy or create it again"
        ):
            indexed(tmp_path / "x.tar", sound[:size])


@pytest.mark.parametrize("what", ["joined", "a lost page", "the same name twice", "a size below zero"])
def test_a_shard_whose_rows_would_hide_each_other_is_refused(tmp_path: Path, what: str):
    one, two = (shard(tmp_path / f"{n}.tar", {f"{n}.png": b"x", f"{n}.txt": b"c"}).read_bytes() for n in range(2))
    if what == "joined":
        data, reason = one + two, f"at byte {2048}: more data follows the end of the archive"
    elif what == "a lost page":
        data, reason = bytes(2048) + one, "at byte 0: more data follows the end of the archive"
    elif what == "the same name twice":
        data, reason = one[:2048] + one, "at byte 2048: a file has the name of an earlier one"
    else:
        header = tarfile.TarInfo("0.png")
        header.size = -4096
        data, reason = header.tobuf(tarfile.GNU_FORMAT) + one, "at byte 0: "
    with pytest.raises(DataError, match=reason):
        indexed(tmp_path / "x.tar", data)


def test_llava_json_with_mixed_rows_is_one_list(tmp_path: Path, prepared):
    (tmp_path / "0.png").write_bytes(png(7))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Seven."}]
    words = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Nobody."}]
    rows = [{"id": 1, "image": "0.png", "conversations": turns}, {"id": "two", "conversations": words}]
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    data = prepared(tmp_path / "llava.json")
    assert shades(data) == [("Seven.", [7]), ("Nobody.", [])]
    assert "conversations in conversations, images in image" in data.facts.source
    assert data.facts.without_images == 1


def test_openai_messages_mix_text_and_parts_in_one_file(tmp_path: Path, prepared):
    url = f"data:image/png;base64,{base64.b64encode(png(5)).decode()}"
    parts = [{"type": "text", "text": "Q"}, {"type": "image_url", "image_url": {"url": url}}]
    rows = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Five."}]},
        {
            "messages": [
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": [{"type": "text", "text": "T"}]},
            ]
        },
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert shades(prepared(tmp_path / "chat.jsonl")) == [("Five.", [5]), ("T", [])]


def test_parquet_with_lists_of_images_and_messages(tmp_path: Path, prepared):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    turn = {"role": Value("string"), "content": Value("string")}
    features = Features({"images": List(ImageFeature()), "messages": List(turn)})
    said = [{"role": "user", "content": "<image>a<image>b"}, {"role": "assistant", "content": "A"}]
    images = [{"bytes": png(n), "path": None} for n in (1, 2)]
    Dataset.from_list([{"images": images, "messages": said}], features=features).to_parquet(tmp_path / "r.parquet")
    data = prepared(tmp_path / "r.parquet")
    assert shades(data) == [("A", [1, 2])]
    assert [part["type"] for part in data.train[0]["messages"][0]["content"]] == ["image", "text", "image", "text"]


def test_csv_keeps_its_words(tmp_path: Path, prepared):
    """007 is no 7, NA is no nothing, and a semicolon separates in half of Europe."""
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    (tmp_path / "t.csv").write_text("\ufeffimage;patient;caption\n0.png;007;NA\n1.png;8;b\n", encoding="utf-8")
    data = prepared(tmp_path / "t.csv", group_column="patient", instruction="Patient {patient}")
    assert shades(data) == [("NA", [0]), ("b", [1])]
    assert data.train[0]["messages"][0]["content"][1]["text"] == "Patient 007"


def test_auto_says_what_it_did_not_read(tmp_path: Path, prepared):
    folder_of(rows_of(2), tmp_path / "data")
    (tmp_path / "data" / "metadata.jsonl").rename(tmp_path / "data" / "a.jsonl")
    (tmp_path / "data" / "b.csv").write_text("x\n1\n")
    source = prepared(tmp_path / "data", image_column="file_name").facts.source
    assert source.startswith("json: a.jsonl (not read: b.csv); answers in caption")
    with pytest.raises(DataError, match=r"answer_column is caption: no such column; dataset.path has x"):
        prepared(tmp_path / "data", format="csv", image_column=None)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A web server over `tmp_path/site`, and what was asked of it."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path == "/again":
                self.send_response(302)
                self.send_header("Location", "/again")
                return self.end_headers()
            if self.path.startswith("/down"):
                return self.send_error(503)
            return super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    (tmp_path / "site").mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "site"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_images_behind_urls_are_fetched_once(tmp_path: Path, prepared, site, monkeypatch):
    url, asked = site
    (tmp_path / "site" / "a.png").write_bytes(png(4))
    rows = [{"image": f"{url}/a.png", "caption": "Four."}, {"image": f"{url}/missing.png", "caption": "None."}]
    rows += [{"image": f"{url}/again", "caption": "Round and round."}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    within = {"image_hosts": ["127.0.0.1"]}
    for _ in range(2):
        data = prepared(tmp_path / "r.jsonl", max_bad_fraction=0.9, **within)
        assert shades(data) == [("Four.", [4])]
    assert [row.reason for row in data.quarantined] == ["image cannot be fetched: there is no image at its URL"] * 2
    assert asked.count("/a.png") == 1
    (tmp_path / "r.jsonl").write_text(json.dumps({"image": f"{url}/down.png", "caption": "x"}) + "\n")
    monkeypatch.setattr("job.data.remote.TRIES", 2)
    with pytest.raises(Unavailable, match="which has images of rows, answers 503"):
        prepared(tmp_path / "r.jsonl", **within)


def test_a_host_that_nobody_knows_spoils_its_row_and_one_that_cannot_be_looked_up_is_tried_again(
    tmp_path: Path, prepared, monkeypatch
):
    (tmp_path / "0.png").write_bytes(png(4))
    rows = [{"image": "0.png", "caption": "Four."}, {"image": "http://gone.example/a.png", "caption": "None."}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("job.data.remote.TRIES", 1)
    for number, says in ((socket.EAI_NONAME, "Name or service not known"), (socket.EAI_AGAIN, "Temporary failure")):

        def unknown(*_: Any, number: int = number, says: str = says) -> Any:
            raise socket.gaierror(number, says)

        monkeypatch.setattr(socket, "getaddrinfo", unknown)
        if number == socket.EAI_NONAME:
            data = prepared(tmp_path / "r.jsonl", max_bad_fraction=0.5)
            assert data.facts.reasons == {"image cannot be fetched: the host in its URL does not exist": 1}
        else:
            with pytest.raises(Unavailable, match=r"gone\.example, which has images of rows, does not answer"):
                prepared(tmp_path / "r.jsonl", max_bad_fraction=0.5)


def test_a_bucket_holds_whatever_a_folder_may(tmp_path: Path, prepared, bucket: str):
    from pydicom.data import get_testdata_file

    from job.store import open_store

    store = open_store(f"s3://{bucket}/d")
    file = shard(tmp_path / "x.tar", {"a.png": png(1), "a.txt": b"A"})
    store.upload(file, "shards/x.tar")
    store.write("table/i/0.png", png(3))
    store.write("table/rows.jsonl", json.dumps({"image": "i/0.png", "caption": "C"}).encode())
    store.write("one/0.png", png(3))
    store.write("one/rows.jsonl", json.dumps({"image": "0.png", "caption": "C"}).encode())
    assert shades(prepared(f"s3://{bucket}/d/shards")) == [("A", [1])]
    assert shades(prepared(f"s3://{bucket}/d/table")) == [("C", [3])]
    assert shades(prepared(f"s3://{bucket}/d/one/rows.jsonl")) == [("C", [3])]
    folder_of(rows_of(2), tmp_path / "chest")
    store.upload(Path(shutil.make_archive(str(tmp_path / "chest"), "zip", tmp_path / "chest")), "zip/chest.zip")
    assert shades(prepared(f"s3://{bucket}/d/zip/chest.zip")) == [("caption 0", [0]), ("caption 1", [1])]
    store.upload(Path(str(get_testdata_file("CT_small.dcm", download=False))), "ct/a.dcm")
    store.write("ct/reports.csv", b"file,caption\na.dcm,C\n")
    assert prepared(f"s3://{bucket}/d/ct").train[0]["images"][0].size == (128, 128)


def test_shards_too_large_for_scratch_stay_in_their_bucket(tmp_path: Path, prepared, bucket: str):
    from torch.utils.data import DataLoader

    from job.store import open_store

    store = open_store(f"s3://{bucket}/d")
    for number in range(2):
        members: dict[str, bytes] = {}
        for n in range(8 * number, 8 * number + 8):
            members |= {f"{n:02d}.png": png(n, (64, 64)), f"{n:02d}.txt": f"c{n}".encode()}
        store.upload(shard(tmp_path / f"train-{number}.tar", members), f"s/train-{number}.tar")
        (tmp_path / f"train-{number}.tar").unlink()
    data = prepared(f"s3://{bucket}/d/s", cache_gb=1e-6)
    assert "read from their store because they exceed cache_gb 1e-06" in data.facts.source
    loader = DataLoader(data.train, batch_size=4, num_workers=1, collate_fn=list)  # a process of its own
    rows = [row for batch in loader for row in batch]
    assert [(row["reference"], row["images"][0].getpixel((0, 0))[0]) for row in rows] == [
        (f"c{n}", n) for n in range(16)
    ]
    assert not list((tmp_path / "scratch").rglob("*.tar"))


def test_a_zip_that_does_not_fit_scratch_is_not_unpacked(tmp_path: Path, prepared, monkeypatch: pytest.MonkeyPatch):
    """Nor begun: where JOB_SCRATCH_GB is a pod's limit, the disk behind it has room."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "large.png").write_bytes(bytes(20_000_000))
    archive = shutil.make_archive(str(tmp_path / "chest"), "zip", tmp_path / "x")
    monkeypatch.setenv("JOB_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("JOB_SCRATCH_GB", "0.01")
    with pytest.raises(
        SpecError, match=r"chest\.zip, unpacked, needs 20\.0 MB in .*point JOB_SCRATCH at a larger disk"
    ):
        prepared(archive)
    assert not list((tmp_path / "scratch" / "fetched").rglob("large.png"))


def encrypted(archive: bytes) -> bytes:
    """Sets the flag of a password in every header of a zip archive."""
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        first, *parts = archive.split(mark)
        archive = b"".join([first, *(mark + part[: place - 4] + b"\1" + part[place - 3 :] for part in parts)])
    return archive


def test_a_zip_is_the_folder_in_it(tmp_path: Path, prepared):
    folder_of(rows_of(3), tmp_path / "x" / "chest")
    archive = Path(shutil.make_archive(str(tmp_path / "chest"), "zip", tmp_path / "x"))
    assert [answer for answer, _ in shades(prepared(archive))] == ["caption 0", "caption 1", "caption 2"]
    archive.write_bytes(archive.read_bytes().replace(b"chest/", b"chest\\"))
    assert [answer for answer, _ in shades(prepared(archive))] == ["caption 0", "caption 1", "caption 2"]
    archive.write_bytes(encrypted(archive.read_bytes()))
    with pytest.raises(DataError, match=r"chest\.zip has a password; unpack it, and name the folder"):
        prepared(archive)
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(DataError, match=r"chest\.zip cannot be unpacked; copy it again"):
        prepared(archive)


def test_a_table_below_the_folder_names_the_images_beside_it(tmp_path: Path, prepared):
    """As a Mac packs a folder, and with another file beside the folder."""
    folder = folder_of(rows_of(2), tmp_path / "x" / "chest")
    (tmp_path / "x" / "__MACOSX" / "chest").mkdir(parents=True)
    (tmp_path / "x" / "__MACOSX" / "chest" / "._metadata.jsonl").write_bytes(b"\0\5")
    (tmp_path / "x" / ".DS_Store").write_bytes(b"\0")
    rows = prepared(shutil.make_archive(str(tmp_path / "chest"), "zip", tmp_path / "x"))
    assert shades(rows) == [("caption 0", [0]), ("caption 1", [1])]
    (folder.parent / "readme.txt").write_text("")
    data = prepared(folder.parent)
    assert shades(data) == shades(rows)
    assert "image folder: it holds chest/metadata.jsonl" in data.facts.source


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (b'file_name,caption\n0.png,"a\n1.png,b\n', "metadata.csv cannot be read: unexpected end of data"),
        (b"file_name,caption,caption\n0.png,a,b\n", "two columns have the same name"),
        (b"file_name,caption\n", "metadata.csv has no rows"),
        ("file_name,caption\n0.png,Größe\n".encode("latin-1"), "line is not UTF-8; save the table as UTF-8"),
        (bytes(8), "metadata.csv has no rows"),
    ],
)
def test_a_table_that_cannot_be_read_is_told_why(tmp_path: Path, prepared, table: bytes, reason: str):
    (tmp_path / "0.png").write_bytes(png())
    (tmp_path / "metadata.csv").write_bytes(table)
    with pytest.raises(DataError, match=reason):
        prepared(tmp_path)


def test_odd_tables_are_read(tmp_path: Path, prepared):
    """Excel's own text, empty lines, names that look like patterns."""
    folder = tmp_path / "we[i]rd*"
    folder.mkdir()
    (folder / "0.png").write_bytes(png())
    (folder / "a[1].csv").write_text("\nimage\tcaption\n\n0.png\tGröße\n", encoding="utf-16")
    (folder / "b.jsonl").write_text('\n{"image": "0.png", "caption": "a\u2028b"}\n\n', encoding="utf-8")
    assert shades(prepared(folder / "a[1].csv")) == [("Größe", [0])]
    assert shades(prepared(folder / "b.jsonl")) == [("a\u2028b", [0])]
    (folder / "c.csv").write_text('image, caption\n0.png, "a, b"\n')
    assert shades(prepared(folder / "c.csv")) == [("a, b", [0])]
    (folder / "d.csv").write_text('"image","the\ncaption"\n"0.png","a\nb"\n')
    assert shades(prepared(folder / "d.csv", answer_column="the\ncaption")) == [("a\nb", [0])]


def test_values_of_a_stranger_are_bad_rows_at_most(tmp_path: Path, prepared):
    """No file outside the folder, no pipe that never ends, no value of another type."""
    (tmp_path / "d").mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    os.mkfifo(tmp_path / "d" / "pipe.png")
    secret = str(tmp_path / "secret.png")
    values = ["pipe.png", "a\0b", "http://", "https://[::1", "s3://x", ".", {"path": secret, "offset": 0, "size": 9}]
    values += [
        {"montage": 5, "path": "x"},
        {"montage": [3, []]},
        {"path": "x", "offset": "y"},
        {"path": "r.jsonl", "offset": 0, "size": 10**18},
        {"path": "r.jsonl", "offset": 10**30},
        {"bytes": [1]},
        secret,
        7,
    ]
    lines = [json.dumps({"image": value, "caption": "c"}) for value in values]
    (tmp_path / "d" / "r.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=f"{len(values)} of {len(values)} rows are bad"):
        prepared(tmp_path / "d" / "r.jsonl")
    shard(tmp_path / "t" / "x.tar", {"a.png": png(), "a.json": b'{"caption": "c", "png": {"path": "/etc/passwd"}}'})
    assert shades(prepared(tmp_path / "t")) == [("c", [0])]


def test_half_a_character_spoils_its_row_alone(tmp_path: Path, prepared):
    """An emoji that was cut in two is valid JSON; tokenizers and files refuse it."""
    (tmp_path / "0.png").write_bytes(png())
    cut = [{"caption": "c \ud83d"}, {"caption": "c", "site": "\udc00"}]
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps({"image": "0.png", **row}) for row in cut))
    data = prepared(tmp_path / "r.jsonl", max_bad_fraction=0.5, instruction="Site: {site}")
    assert data.quarantined == [QuarantinedRow(0, "a text with half a character (a lone surrogate)")]
    assert data.train[0]["messages"][0]["content"][1]["text"] == "Site: ?"


def test_parquet_with_texts_that_are_no_utf8_is_told_where(tmp_path: Path, prepared):
    import pyarrow
    from pyarrow import parquet

    texts = pyarrow.array([b"ok", "Größe".encode("latin-1")])
    caption = pyarrow.Array.from_buffers(pyarrow.string(), 2, texts.buffers())
    parquet.write_table(pyarrow.table({"image": [png()] * 2, "caption": caption}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a text in rows 0 to 1 is not UTF-8"):
        prepared(tmp_path)


def test_parquet_files_that_do_not_belong_together_are_named(tmp_path: Path, prepared):
    from datasets import Dataset

    for name, columns in (("a", {"image": [""], "caption": ["c"]}), ("b", {"x": [1]})):
        Dataset.from_dict(columns).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=r"b\.parquet \(x\) and a\.parquet \(image, caption\) have different columns"):
        prepared(tmp_path)
    (tmp_path / "b.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"b\.parquet cannot be read as parquet: .* 0 bytes"):
        prepared(tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.tsv", "rows.csv", "rows.parquet"])
def test_base64_without_more_is_read_from_every_table_alone_and_in_lists(tmp_path: Path, prepared, name: str):
    """As LLaMA-Factory's JSON and VLMEvalKit's TSV have it: a text, a list, or a list written as JSON or by Python."""
    from datasets import Dataset

    one, two = (base64.b64encode(png(n, (32, 32))).decode() for n in (1, 2))
    values: list[Any] = [one, json.dumps([one, two]), str([one, two])]
    if name == "rows.parquet":
        Dataset.from_dict({"image": values, "caption": ["a", "b", "c"]}).to_parquet(tmp_path / name)
    elif name == "rows.jsonl":
        values.append([two, one])
        rows = [{"image": value, "caption": "abcd"[n]} for n, value in enumerate(values)]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    else:
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if name == "rows.tsv" else ",")
            writer.writerows([["image", "caption"], *zip(values, "abc", strict=True)])
    assert shades(prepared(tmp_path / name))[:3] == [("a", [1]), ("b", [1, 2]), ("c", [1, 2])]
