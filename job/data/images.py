"""One image value of a row → one RGB picture, or the reason why not."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError


class BadRow(Exception):
    """Why a row is set aside. The text holds no content of the row."""


def image_bytes(value: Any, base: Path | None) -> bytes:
    """The encoded file behind a row's image value: embedded bytes, `{"bytes", "path"}`, or a path relative to `base`.

    Raises BadRow when there is none.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise BadRow("no image")
    path = Path(value)
    if base is not None:
        path = base / value
        if not path.resolve().is_relative_to(base.resolve()):
            raise BadRow("image path leads out of the dataset's folder")
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadRow(f"image cannot be read: {error.strerror}") from error


def decode(data: bytes, *, max_pixels: int, max_side: int | None) -> Image.Image:
    """RGB image of shape (height, width), upright by its EXIF orientation, at most `max_side` on its longer side.

    The size is looked at before any pixel is decoded. Raises BadRow.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is our bound
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise BadRow(f"image too large: {width}×{height} is over {max_pixels} pixels")
                image.load()
                upright = ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        bomb = isinstance(error, Image.DecompressionBombError)
        raise BadRow(f"image too large: over {max_pixels} pixels" if bomb else "image of no known format") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise BadRow(f"image is broken: {type(error).__name__}") from error
    rgb = upright.convert("RGB")
    if max_side is not None and max(rgb.size) > max_side:
        rgb.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return rgb
