"""What is too large is refused by its size, before it is read."""

from __future__ import annotations

import base64
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from job.config.schema import DatasetSpec
from job.data import archives, columns, pixels, tables, webdataset
from job.data.images import Files, decode, load_anew
from job.data.pixels import BadRow
from job.errors import DataError
from tests.conftest import ROOT


def test_a_file_of_50_gb_is_refused_unread(tmp_path: Path):
    with (tmp_path / "a.png").open("wb") as stream:
        stream.truncate(50 * 10**9)
    with pytest.raises(BadRow, match="image file is larger than 1 GB"):
        load_anew("a.png", Files(tmp_path), DatasetSpec(path="d"))


@pytest.mark.parametrize(
    ("text", "reason"), [('{"a": "' + "b" * 2000, "a line of over"), ("[" + " " * 2000, "one list of over")]
)
def test_what_would_be_read_as_a_whole_is_refused_by_its_size(tmp_path: Path, monkeypatch, text: str, reason: str):
    monkeypatch.setattr(tables, "LONGEST", 1000)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=reason):
        list(tables.lines_of(tmp_path / "a.json", "dataset.path"))


def test_what_is_in_rows_and_archives_is_refused_by_its_size(tmp_path: Path, monkeypatch):
    for room in (pixels, archives, columns):
        monkeypatch.setattr(room, "LARGEST", 1000)
    monkeypatch.setattr(webdataset, "LARGEST_TEXT", 1000)
    large = b"\x89PNG\r\n\x1a\n" + bytes(2000)
    for value in ({"bytes": large}, base64.b64encode(large).decode()):
        with pytest.raises(BadRow, match="larger than"):
            load_anew(value, Files(tmp_path), DatasetSpec(path="d"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.png", large)
    with pytest.raises(DataError, match="holds an image of"):
        archives.unpacked(tmp_path / "a.zip", tmp_path, "dataset.path")
    assert not list((tmp_path / "fetched").glob("*.partial/*"))
    parquet.write_table(pyarrow.table({"image": [large], "text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="values of .* GB in column image"):
        columns.read_columns([tmp_path / "a.parquet"], tmp_path, "dataset.path", columns.every)


def test_giants_among_small_values_are_refused_before_they_are_unpacked(tmp_path: Path):
    """Twelve values of 100 MB among ten thousand: the mean is small, and all of them would be read at once."""
    giant, small = pyarrow.array([bytes(10**8)]), pyarrow.array([b"a"] * 10_000)
    table = pyarrow.table({"image": pyarrow.chunked_array([small, *[giant] * 12])})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False, write_statistics=False)
    assert (tmp_path / "a.parquet").stat().st_size < 10**6
    code = (
        "import resource, sys; from pathlib import Path; from job.data import columns;"
        "resource.setrlimit(resource.RLIMIT_DATA, (10**9, 10**9)); folder = Path(sys.argv[1]);"
        "columns.read_columns([folder / 'a.parquet'], folder, 'dataset.path', columns.every)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False, cwd=ROOT)
    assert re.search(r"DataError: dataset.path: .*/a.parquet has 1.2 GB in one row group.*fewer rows", done.stderr)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.REGTYPE, "a text of"),
        (tarfile.GNUTYPE_SPARSE, "sparse"),
        (tarfile.GNUTYPE_LONGNAME, "a header names 70 MB of text"),
        (tarfile.GNUTYPE_LONGLINK, "a header names 70 MB of text"),
        (tarfile.XHDTYPE, "a header names 70 MB of text"),
        (tarfile.XGLTYPE, "a header names 70 MB of text"),
    ],
)
def test_texts_and_sparse_files_in_shards_are_refused_by_their_headers(tmp_path: Path, kind: bytes, reason: str):
    member = tarfile.TarInfo("a.txt")
    member.size, member.type = 70_000_000, kind
    with (tmp_path / "a.tar").open("wb") as stream:
        stream.write(member.tobuf())
        stream.truncate(80_000_000)
    with pytest.raises(DataError, match=f"{reason}"):
        list(webdataset.index_shards([("a.tar", tmp_path / "a.tar")], "dataset.path"))


@pytest.mark.parametrize(("kind", "head"), [(b"iCCP", b"a\0\0"), (b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")])
def test_what_a_png_says_beside_its_pixels_is_inflated_within_bounds(kind: bytes, head: bytes):
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20, 20, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(21 * 20))) + chunk(b"IEND", b"")
    bomb = chunk(kind, head + zlib.compress(bytes(10**8), 1))
    with pytest.raises(BadRow, match="image is broken"):
        decode(b"\x89PNG\r\n\x1a\n" + header + bomb + pixels, DatasetSpec(path="d"))
