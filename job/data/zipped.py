"""Reads images in zip archives where they are: nothing is unpacked to scratch, and an archive may be larger than it."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from job.data.pixels import BadRow, check_bytes
from job.data.webdataset import IMAGES, ending_of

HEADER = struct.Struct("<4s22xHH")
"""A local file header: its signature, and the lengths of name and extra field that follow it (APPNOTE 4.3.7)."""
LOCAL = b"PK\3\4"
DAMAGED = "image in a zip archive is damaged"


class Member(NamedTuple):
    """Where an archive has a file: the byte of its local header, its bytes as packed and unpacked, its method and CRC-32."""

    offset: int
    packed: int
    size: int
    method: int
    crc: int


def images_in(archive: Path) -> dict[str, Member] | None:
    """Returns the images in an archive by name, without encrypted ones; None if it cannot be opened."""
    try:
        with zipfile.ZipFile(archive) as opened:
            there = opened.infolist()
    except Exception:  # zipfile may raise anything on a broken archive
        return None
    return {
        each.filename: Member(each.header_offset, each.compress_size, each.file_size, each.compress_type, each.CRC)
        for each in there
        if ending_of(each.filename) in IMAGES
        and not each.flag_bits & 1
        and each.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    }


def read_member(file: int, member: Member) -> bytes:
    """Reads a file of the archive with this descriptor. Raises BadRow if it is not what the archive's directory says."""
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
