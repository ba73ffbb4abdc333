"""Recognises images in cells by how they begin, and decodes base64."""

from __future__ import annotations

import base64
import re
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

from job.data.pixels import BadRow, check_bytes
from job.data.webdataset import IMAGES, ending_of

ENCODED = re.compile(
    rb"\x89PNG\r\n|\xff\xd8\xff|GIF8|RIFF.{4}WEBP|II\*\0|MM\0\*|BM.{4}\0{4}|\0\0\0\x0cjP  |.{4}ftypavi|.{128}DICM|\x1f\x8b\x08",
    re.DOTALL,
)
"""How image files begin."""
SHORTEST, HEAD = 64, 240
"""Base64 characters that show how an image file begins, and a DICOM file, whose magic number follows 128 bytes."""
COMMON = str.maketrans("-_", "+/")


def looks_like_picture(value: Any) -> bool:
    """Whether a column with this value is likely to hold images: encoded ones, names of image files, or lists of either."""
    if isinstance(value, dict):
        return looks_like_picture(value.get("bytes") or value.get("path") or value.get("url"))
    if isinstance(value, list):
        return any(map(looks_like_picture, value[:3]))
    if isinstance(value, bytes):
        return ENCODED.match(value) is not None
    if not isinstance(value, str):
        return False
    name = value[-4096:].rstrip(" ]\"'")  # lists may be written as JSON
    encoded = value.startswith("data:image/") or begins_as_picture(value.lstrip("[ \"'"))
    return encoded or ("." in name and ending_of(PurePosixPath(name).name) in IMAGES)


def begins_as_picture(text: str) -> bool:
    """Whether a text is the base64 of an image, and so not a path, judging by the first bytes of the file."""
    for size in (SHORTEST, HEAD):
        head = _bare(text[:size])
        with suppress(ValueError):
            if len(text) >= size and ENCODED.match(base64.b64decode(head[: len(head) // 4 * 4], validate=True)):
                return True
    return False


def from_data_url(url: str) -> bytes:
    head, _, body = url.partition(",")
    return from_base64(body, "data: URL is not base64") if head.endswith(";base64") else b""


def from_base64(text: str, reason: str) -> bytes:
    check_bytes(len(text) * 3 // 4)
    bare = _bare(text).rstrip("=")
    try:
        return base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True)
    except ValueError as error:
        raise BadRow(reason) from error


def _bare(text: str) -> str:
    """Removes line breaks and Python's quotes around bytes from base64, and converts its other alphabet to the common one."""
    text = "".join(text.split()).translate(COMMON)
    return text[2:].rstrip("'\"") if text.startswith(("b'", 'b"')) else text
