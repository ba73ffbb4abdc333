"""The image files of rows as a user holds them, before the job prepares them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import suppress

from PIL import Image

from job.config.schema import JobSpec
from job.data import Data, Row
from job.data.conversations import read_sample
from job.data.images import FORMATS, Place, locate, read
from job.data.pixels import BadRow

PLAIN = ("RGB", "L")
"""Modes of pictures that every program shows alike."""
SERVED = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif", "BMP": "image/bmp"}
"""Formats that servers read, with the type that a `data:` URL names."""


def originals(row: Row, data: Data, spec: JobSpec) -> list[tuple[str, bytes]]:
    """Return the type and the encoded file of each image of a row: the user's own file, or a PNG of what the job made of it
    where no server could make the same (DICOM, masked text, a longest side in pixels, 16 bits, transparency)."""
    if not (data.bounds.side or spec.privacy.look_for_text is True):
        found = list(_own(row, data, spec))
        if len(found) == len(row["images"]):
            return found
    return [("image/png", _png(picture)) for picture in row["images"]]


def _own(row: Row, data: Data, spec: JobSpec) -> Iterator[tuple[str, bytes]]:
    source = [*data.sources.values()][-1 if len(data.evaluation) else 0]
    (values,) = source.rows_at([int(row["id"].removeprefix("row-"))])
    for value in read_sample(source.read(values), spec.dataset, source.reading).images:
        if isinstance(value, dict) and "montage" in value:
            return
        with suppress(BadRow, OSError):
            place = locate(value, source.files)
            encoded = read(place) if isinstance(place, Place) else place
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                if image.format in SERVED and image.mode in PLAIN and "transparency" not in image.info:
                    yield SERVED[image.format], encoded


def _png(picture: Image.Image) -> bytes:
    into = io.BytesIO()
    picture.save(into, "PNG", compress_level=1)
    return into.getvalue()
