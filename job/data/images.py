"""One image value of a row → RGB pictures, or the reason why not."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from job.data.remote import fetched, piece
from job.data.shelf import Shelf
from job.errors import DataError
from job.spec import DatasetSpec

Image.MAX_IMAGE_PIXELS = None  # `max_image_pixels` is our bound; Pillow's would warn in every thread
MIN_SIDE = 4
"""Below it, processors mistake the height for the number of colours."""
WORTH_KEEPING = 2
"""A picture that was so many times larger before it was shrunk is kept: reading it again would take longer than reading that."""
Image.init()
FORMATS = sorted({"PNG", "JPEG", "TIFF", "JPEG2000", "WEBP", "GIF", "BMP", "PPM", "AVIF"} & Image.OPEN.keys())
"""Pillow would also hand PostScript to an interpreter, and read much that no user means."""
WEB = ("http://", "https://", "s3://")
Picture = Image.Image


class BadRow(Exception):
    """Why a row is set aside. The text holds no content of the row."""


class Bounds(NamedTuple):
    """How large pictures may be, in pixels: the longer side; the area of one; its shorter side; the area of all of a row
    together. What is larger is shrunk, its shape kept."""

    side: float | None = None
    area: float | None = None
    short: float | None = None
    row: float | None = None

    def size(self, width: int, height: int, pictures: int) -> tuple[int, int]:
        """The size to shrink one of a row's `pictures` to; its own where it is small enough."""
        scales = [1.0]
        scales += [self.side / max(width, height)] if self.side else []
        scales += [math.sqrt(self.area / (width * height))] if self.area else []
        scales += [self.short / min(width, height)] if self.short else []
        scales += [math.sqrt(self.row / max(pictures, 1) / (width * height))] if self.row else []
        scale, least = min(scales), min(MIN_SIDE, width, height)
        return (width, height) if scale >= 1 else (max(round(width * scale), least), max(round(height * scale), least))


AS_IT_IS = Bounds()


class Files(NamedTuple):
    """Where paths in rows start from (a folder, or an `s3://` prefix), where what is behind URLs in rows is kept, where shrunk
    pictures are, and how far they are shrunk."""

    base: Path | str | None = None
    fetched: Path | None = None
    shelf: Shelf | None = None
    bounds: Bounds = AS_IT_IS


class Place(NamedTuple):
    """Where an encoded file lies: a path, or a URL of a shard; and which piece of it, else the whole."""

    name: str
    offset: int = 0
    size: int | None = None


def locate(value: Any, files: Files) -> bytes | Place:
    """The encoded file behind a row's image value, or where it lies: embedded bytes, `{"bytes", "path"}`, a `data:`, http or s3
    URL, a path relative to `files.base`, or a piece `{"path", "offset", "size"}` of an archive. Raises BadRow for none."""
    given = value if isinstance(value, dict) else {"path": value}
    name = given.get("path") if given.get("bytes") is None else given["bytes"]
    if isinstance(name, bytes):
        return name
    extent = [given["offset"], given.get("size")] if "offset" in given else []
    if not (isinstance(name, str) and name and all(isinstance(number, int) and number >= 0 for number in extent)):
        raise BadRow("no image")
    if name.startswith("data:"):
        return _inline(name)
    name = name.removeprefix("file://")
    if not name.startswith(WEB):
        if files.base is not None:
            name = _below(str(files.base), name)
        elif value is not given:  # a hub's own files come as {"path"}; a word in a stranger's row names no file here
            raise BadRow("image is a path, and there is no folder that it starts from")
    if extent or not name.startswith(WEB):
        return Place(name, *extent)
    path = fetched(name, files.fetched) if files.fetched else None
    if path is None:
        raise BadRow("image cannot be fetched: there is none at its URL")
    return Place(str(path))


def _below(base: str, name: str) -> str:
    """The path or URL of a name that starts from `base`. The owner's links are followed; names that lead out of it are not."""
    scheme, folder = ("s3:/", base.removeprefix("s3:/")) if base.startswith(WEB) else ("", str(Path(base).absolute()))
    whole = os.path.normpath(f"{folder}/{name}") if name[:1] != "/" else os.path.normpath(name)
    if not whole.startswith(f"{os.path.normpath(folder)}/"):
        raise BadRow("image path leads out of the dataset's folder")
    return scheme + whole


def read(place: Place) -> bytes:
    """Raises BadRow for what cannot be read."""
    size = place.size
    try:
        if place.name.startswith("s3://"):
            return piece(place.name, place.offset, size) if size else b""
        file = os.open(place.name, os.O_RDONLY | os.O_NONBLOCK)  # a pipe is not waited for
        try:
            there = os.fstat(file).st_size - place.offset
            size = there if size is None else size
            if not 0 <= size <= there:
                raise BadRow("image's file is cut short")
            data = os.pread(file, size, place.offset)
        finally:
            os.close(file)
    except DataError as error:
        raise BadRow("archive is gone from its store") from error
    except (OSError, ValueError) as error:
        raise BadRow(f"image cannot be read: {getattr(error, 'strerror', None) or 'not a path'}") from error
    if len(data) < size:
        raise BadRow("image's file is cut short")
    return data


def _inline(url: str) -> bytes:
    head, _, body = url.partition(",")
    try:
        return base64.b64decode(body, validate=True) if head.endswith(";base64") else b""
    except ValueError as error:
        raise BadRow("data: URL is not base64") from error


def load(value: Any, files: Files, spec: DatasetSpec, pictures: int = 1) -> list[Picture]:
    """The RGB pictures of an image value, upright by EXIF, shrunk to `files.bounds` as one of the row's `pictures`.

    One, unless it is a DICOM file of which several frames are chosen. `{"montage": [values]}` is one picture of several.
    Raises BadRow.
    """
    kept = files.shelf.take(_key(_parts(value, files), pictures)) if files.shelf else None
    return [kept] if kept is not None else load_anew(value, files, spec, pictures)[1]


def load_anew(value: Any, files: Files, spec: DatasetSpec, pictures: int = 1) -> tuple[list[bytes], list[Picture]]:
    """The encoded files behind an image value, and its pictures. One that took long to make is kept on the shelf."""
    parts = _parts(value, files)
    data = [part if isinstance(part, bytes) else read(part) for part in parts]
    costly = data[0][128:132] == b"DICM"
    if costly:
        from job.data.dicom import frames, montage

        found = [picture for each in data for picture in frames(each, spec)]
        found = [montage(found)] if len(parts) > 1 else found
    else:
        found = [decode(each, spec, files.bounds, pictures) for each in data]
    before = found[0].width * found[0].height
    found = [shrink(picture, files.bounds.size(*picture.size, pictures)) for picture in found]
    if files.shelf and len(found) == 1 and (costly or before >= WORTH_KEEPING * found[0].width * found[0].height):
        files.shelf.put(_key(parts, pictures), found[0])
    return data, found


def _parts(value: Any, files: Files) -> list[bytes | Place]:
    several = value.get("montage") if isinstance(value, dict) else None
    return [locate(part, files) for part in (several if isinstance(several, list) and several else [value])]


def _key(parts: list[bytes | Place], pictures: int) -> str:
    """What a picture is made from: a file that was written anew has another key."""
    facts = [str(pictures)]
    for part in parts:
        facts.append(hashlib.sha256(part).hexdigest() if isinstance(part, bytes) else str(part))
        if isinstance(part, Place):
            with suppress(OSError, ValueError):  # in a store, or not there
                stat = Path(part.name).stat()
                facts.append(f"{stat.st_size} {stat.st_mtime_ns}")
    return "\0".join(facts)


def decode(data: bytes, spec: DatasetSpec, bounds: Bounds = AS_IT_IS, pictures: int = 1) -> Picture:
    """RGB picture of shape (height, width), upright. Its size is looked at before any pixel is decoded. Raises BadRow."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(*image.size, spec)
            image.draft(None, bounds.size(*image.size, pictures))  # a JPEG decodes at a half, a quarter or an eighth
            image.load()
            return as_rgb(ImageOps.exif_transpose(image))
    except BadRow:
        raise
    except UnidentifiedImageError as error:
        raise BadRow("image of no known format") from error
    except Exception as error:  # what a decoder raises for a broken file is its own affair
        raise BadRow(f"image is broken: {type(error).__name__}") from error


def check_size(width: int, height: int, spec: DatasetSpec) -> None:
    """Raises BadRow for what no processor should be given."""
    if width * height > spec.max_image_pixels:
        raise BadRow(f"image too large: {width}×{height} is over {spec.max_image_pixels} pixels")
    if min(width, height) < MIN_SIDE:
        raise BadRow(f"image too small: {width}×{height}")
    if max(width, height) > spec.max_aspect_ratio * min(width, height):
        raise BadRow(f"image too narrow: {width}×{height} is over max_aspect_ratio {spec.max_aspect_ratio:g}")


def as_rgb(image: Picture) -> Picture:
    """Every mode of Pillow's as RGB. Deep greys (16 bits, floats) are stretched from their own darkest to their own brightest
    value: scanners use 10 or 12 of 16 bits, and Pillow's own conversion would cut at 255. What is transparent becomes white."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(stretch(np.asarray(image, dtype=np.float32))).convert("RGB")
    if image.mode in ("RGBA", "LA", "La", "PA", "RGBa") or "transparency" in image.info:
        solid = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", solid.size, "white"), solid).convert("RGB")
    if image.mode == "LAB":
        raise BadRow("image in LAB colours, which cannot be shown")
    return image if image.mode == "RGB" else image.convert("RGB")


def stretch(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Numbers of any range as 8 bits, lowest to highest."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise BadRow("image holds values that are no numbers")
    return ((values - low) * (255 / max(high - low, 1e-9)) + 0.5).astype(np.uint8)


def shrink(picture: Picture, size: tuple[int, int]) -> Picture:
    if size == picture.size:
        return picture
    small = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    small.info = picture.info
    return small
