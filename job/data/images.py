"""One image value of a row → RGB pictures, or the reason why not."""

from __future__ import annotations

import base64
import binascii
import io
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from job.data.remote import fetched
from job.spec import DatasetSpec

MIN_SIDE = 4
"""Below it, processors mistake the height for the number of colours."""
DEEP = ("I", "F")
Picture = Image.Image


class BadRow(Exception):
    """Why a row is set aside. The text holds no content of the row."""


class Files(NamedTuple):
    """Where paths in rows start from (a folder, or an `s3://` prefix), and where what is behind URLs in rows is kept."""

    base: Path | str | None = None
    fetched: Path | None = None


def image_bytes(value: Any, files: Files) -> bytes:
    """The encoded file behind a row's image value: embedded bytes, `{"bytes", "path"}`, a `data:`, http or s3 URL, a path
    relative to `files.base`, or a piece `{"file", "offset", "size"}` of an archive. Raises BadRow when there is none."""
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
        if isinstance(files.base, Path):
            path = files.base / path
            if not path.resolve().is_relative_to(files.base.resolve()):
                raise BadRow("image path leads out of the dataset's folder")
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise BadRow(f"image cannot be read: {getattr(error, 'strerror', None) or 'not a path'}") from error


def _piece(value: dict[str, Any]) -> bytes:
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


def load(value: Any, files: Files, spec: DatasetSpec) -> tuple[list[bytes], list[Picture]]:
    """The encoded files behind an image value, and its RGB pictures, upright by EXIF and shrunk to `spec.image_max_side`.

    One picture, unless it is a DICOM file of which several frames are chosen. `{"montage": [values]}` is one picture of several.
    Raises BadRow.
    """
    if isinstance(value, dict) and "montage" in value:
        from job.data.dicom import montage

        parts = [load(part, files, spec) for part in value["montage"]]
        found = [montage([picture for _, shown in parts for picture in shown])]
        data = [each for encoded, _ in parts for each in encoded]
        found[0].info |= parts[0][1][0].info
    else:
        data = [image_bytes(value, files)]
        if data[0][128:132] == b"DICM":
            from job.data.dicom import frames

            found = frames(data[0], value, spec)
        else:
            found = [decode(data[0], spec)]
    return data, [shrink(picture, spec.image_max_side) for picture in found]


def decode(data: bytes, spec: DatasetSpec) -> Picture:
    """RGB picture of shape (height, width), upright. Its size is looked at before any pixel is decoded. Raises BadRow."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # max_image_pixels is our bound; odd EXIF is no reason to refuse
            with Image.open(io.BytesIO(data)) as image:
                check_size(*image.size, spec)
                if spec.image_max_side is not None and max(image.size) > spec.image_max_side:
                    scale = spec.image_max_side / max(image.size)  # a JPEG is decoded at a half, a quarter or an eighth
                    image.draft(None, (round(image.width * scale), round(image.height * scale)))
                image.load()
                return as_rgb(ImageOps.exif_transpose(image))
    except BadRow:
        raise
    except UnidentifiedImageError as error:
        raise BadRow("image of no known format") from error
    except Image.DecompressionBombError as error:
        raise BadRow(f"image too large: over {spec.max_image_pixels} pixels") from error
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


def shrink(picture: Picture, max_side: int | None) -> Picture:
    if max_side is not None and max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return picture
