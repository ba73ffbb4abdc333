"""Reads images in zip and tar archives where they are, since an archive may be larger than scratch, and unpacks a zip archive
that is the data."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from job.data.pixels import LARGEST, BadRow, check_bytes
from job.data.webdataset import IMAGES, Bounded, check_end, ending_of
from job.errors import DataError, JobError
from job.runtime.staging import check_room, only_one

HEADER = struct.Struct("<4s22xHH")
"""A local file header: its signature, and the lengths of name and extra field that follow it (APPNOTE 4.3.7)."""
LOCAL = b"PK\3\4"
ENCRYPTED, IN_TAR = -1, -2
"""In place of the method of a file that needs a password, and of one that lies in a tar archive as it is."""
ARCHIVES = (".zip", ".tar")
DAMAGED = "image in a zip archive is damaged"


class Member(NamedTuple):
    """Where an archive has a file: the byte of its local header (in a tar archive, of its data), its bytes as packed and
    unpacked, its method and CRC-32."""

    offset: int
    packed: int
    size: int
    method: int
    crc: int


def images_in(archive: Path) -> dict[str, Member] | None:
    """Returns the images in an archive by name; None if it cannot be read to its end."""
    if archive.name.lower().endswith(".tar"):
        return _in_tar(archive)
    try:
        with zipfile.ZipFile(archive) as opened:
            there = opened.infolist()
    except Exception:  # zipfile may raise anything on a broken archive
        return None
    return {
        _with_slashes(each.filename): Member(
            each.header_offset,
            each.compress_size,
            each.file_size,
            ENCRYPTED if each.flag_bits & 1 else each.compress_type,
            each.CRC,
        )
        for each in there
        if ending_of(each.filename) in IMAGES
    }


def _in_tar(archive: Path) -> dict[str, Member] | None:
    found, end = dict[str, Member](), 0
    try:
        with Bounded(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as opened:
            for each in opened:
                if each.size < 0 or each.issparse():  # the first would be read again and again
                    return None
                if each.isfile() and ending_of(each.name) in IMAGES:
                    found["/".join(part for part in each.name.split("/") if part not in ("", "."))] = Member(
                        each.offset_data, each.size, each.size, IN_TAR, 0
                    )
                opened.members = []  # type: ignore[attr-defined]  # or it would keep every header
            end = opened.offset
        with archive.open("rb") as whole:
            check_end(whole, end)
    except (tarfile.TarError, OSError, EOFError, OverflowError):
        return None
    return found


def _with_slashes(name: str) -> str:
    """Returns a name as the format wants it: programs of Windows write backslashes (APPNOTE 4.4.17.1)."""
    return name.replace("\\", "/")


def read_member(file: int, member: Member) -> bytes:
    """Reads a file of the archive with this descriptor. Raises BadRow if it is not what the directory says, or cannot be
    unpacked here."""
    if member.method == ENCRYPTED:
        raise BadRow("image is in a zip archive with a password; unpack it")
    if member.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadRow("image is in a zip archive that is packed in a rare way; unpack it")
    check_bytes(max(member.size, member.packed))
    try:
        mark, name, extra = HEADER.unpack(os.pread(file, HEADER.size, member.offset))
        data = os.pread(file, member.packed, member.offset + HEADER.size + name + extra)
        if member.method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
    except (struct.error, zlib.error) as error:
        raise BadRow(DAMAGED) from error
    if mark != LOCAL or len(data) != member.size or zlib.crc32(data) != member.crc:
        raise BadRow(DAMAGED)
    return data


def unpacked(archive: Path, scratch: Path, field: str) -> Path:
    """Unpacks a zip archive to scratch and returns the folder. `zipfile` makes names that lead out of it harmless."""
    mark = archive.stat()
    name = hashlib.sha256(f"{archive.resolve()} {mark.st_size} {mark.st_mtime_ns}".encode()).hexdigest()[:24]
    folder, partial = scratch / "fetched" / name, scratch / "fetched" / f"{name}.partial"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with only_one(folder.with_name(f".{name}.lock"), f"{field}: {archive}"):
        if not folder.exists():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                with zipfile.ZipFile(archive) as packed:
                    members = packed.infolist()
                    if any(member.flag_bits & 1 for member in members):
                        raise DataError(f"{field}: {archive} has a password; unpack it, and name the folder")
                    for member in members:
                        member.filename = _with_slashes(member.filename)
                    pictures = [each.file_size for each in members if Path(each.filename).suffix.lower()[1:] in IMAGES]
                    if (largest := max(pictures, default=0)) > LARGEST:
                        raise DataError(
                            f"{field}: {archive} holds an image of {largest / 1e9:.1f} GB, over {LARGEST / 1e9:g}; repack "
                            "it without that image"
                        )
                    need = sum(member.file_size for member in members)
                    check_room(need, folder, f"{field}: {archive}, unpacked,")
                    packed.extractall(partial, members)
            except JobError:
                raise
            except Exception as error:  # zipfile may raise anything on a broken archive, and name its files
                raise DataError(
                    f"{field}: {archive} cannot be unpacked; copy it again, or unpack it yourself"
                ) from error
            partial.rename(folder)
    inside = [path for path in folder.iterdir() if path.name not in ("__MACOSX", ".DS_Store")]
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder
