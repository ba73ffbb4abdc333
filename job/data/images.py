"""One image value of a row → RGB pictures, or the reason why not."""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
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
AREA = "pixels in the file"
DEEP = ("I", "F")
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
        scale = min(scales)
        return (width, height) if scale >= 1 else (max(round(width * scale), 1), max(round(height * scale), 1))


AS_IT_IS = Bounds()


class Files(NamedTuple):
    """Where paths in rows start from (a folder, or an `s3://` prefix), where what is behind URLs in rows is kept, where shrunk
    pictures are, and how far they are shrunk."""

    base: Path | str | None = None
    fetched: Path | None = None
    shelf: Shelf | None = None
    bounds: Bounds = AS_IT_IS


def image_bytes(value: Any, files: Files) -> bytes:
    """The encoded file behind a row's image value: embedded bytes, `{"bytes", "path"}`, a `data:`, http or s3 URL, a path
    relative to `files.base`, or a piece `{"file", "offset", "size"}` of an archive. Raises BadRow when there is none."""
    bare = isinstance(value, str)
    if isinstance(value, dict):
        if "offset" in value:
            return _piece(value)
        value = value["bytes"] if value.get("bytes") is not None else value.get("path") or value.get("file")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise BadRow("no image")
    if value.startswith("data:"):
        return _inline(value)
    if isinstance(files.base, str) and "://" not in value:
        if ".." in Path(value).parts or value.startswith("/"):
            raise BadRow("image path leads out of the dataset's folder")
        value = f"{files.base}/{value}"
    if value.startswith(("http://", "https://", "s3://")) and files.fetched is not None:
        path = fetched(value, files.fetched)
        if path is None:
            raise BadRow("image cannot be fetched: there is none at its URL")
    else:
        path = Path(value.removeprefix("file://"))
        if (
            files.base is None and bare
        ):  # a hub's own files come as {"path"}; a word in a row of a stranger's names no file here
            raise BadRow("image is a path, and there is no folder that it starts from")
        if isinstance(files.base, Path):
            path = files.base / path
            if not path.resolve().is_relative_to(files.base.resolve()):
                raise BadRow("image path leads out of the dataset's folder")
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise BadRow(f"image cannot be read: {getattr(error, 'strerror', None) or 'not a path'}") from error


def _piece(value: dict[str, Any]) -> bytes:
    if not value["size"]:
        return b""
    if value["file"].startswith("s3://"):
        try:
            return piece(value["file"], value["offset"], value["size"])
        except DataError as error:
            raise BadRow("archive is gone from its store") from error
    try:
        with Path(value["file"]).open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), value["size"], value["offset"])
    except OSError as error:
        raise BadRow(f"archive cannot be read: {error.strerror}") from error
    if len(data) < value["size"]:
        raise BadRow("archive is cut short")
    return data


def _inline(url: str) -> bytes:
    head, _, body = url.partition(",")
    try:
        return base64.b64decode(body, validate=True) if head.endswith(";base64") else b""
    except binascii.Error as error:
        raise BadRow("data: URL is not base64") from error


def load(value: Any, files: Files, spec: DatasetSpec, pictures: int = 1) -> list[Picture]:
    """The RGB pictures of an image value, upright by EXIF, shrunk to `files.bounds` as one of the row's `pictures`.

    One, unless it is a DICOM file of which several frames are chosen. `{"montage": [values]}` is one picture of several.
    Raises BadRow.
    """
    place = files.shelf.place(value, files.base, pictures) if files.shelf else None
    kept = files.shelf.take(place) if files.shelf and place else None
    return [kept] if kept is not None else load_anew(value, files, spec, pictures)[1]


def load_anew(value: Any, files: Files, spec: DatasetSpec, pictures: int = 1) -> tuple[list[bytes], list[Picture]]:
    """The encoded files behind an image value, and its pictures. One that took long to make is kept on the shelf."""
    if isinstance(value, dict) and "montage" in value:
        from job.data.dicom import montage

        parts = [load_anew(part, files._replace(shelf=None, bounds=AS_IT_IS), spec) for part in value["montage"]]
        found = [montage([picture for _, shown in parts for picture in shown])]
        data = [each for encoded, _ in parts for each in encoded]
        found[0].info |= parts[0][1][0].info
        costly = True
    else:
        data = [image_bytes(value, files)]
        costly = data[0][128:132] == b"DICM"
        if costly:
            from job.data.dicom import frames

            found = frames(data[0], value, spec)
        else:
            found = [decode(data[0], spec, files.bounds, pictures)]
    before = found[0].info.get(AREA, found[0].width * found[0].height)
    found = [shrink(picture, files.bounds.size(*picture.size, pictures)) for picture in found]
    if files.shelf and len(found) == 1 and (costly or before >= WORTH_KEEPING * found[0].width * found[0].height):
        place = files.shelf.place(value, files.base, pictures)
        if place is not None:
            files.shelf.put(place, found[0])
    return data, found


def decode(data: bytes, spec: DatasetSpec, bounds: Bounds = AS_IT_IS, pictures: int = 1) -> Picture:
    """RGB picture of shape (height, width), upright. Its size is looked at before any pixel is decoded. Raises BadRow."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            check_size(*image.size, spec)
            image.draft(
                None, bounds.size(*image.size, pictures)
            )  # a JPEG can be decoded at a half, a quarter or an eighth
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
    if image.mode.startswith(DEEP):
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
