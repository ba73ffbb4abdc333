"""Defines the decoded image type, the sizes accepted, and the conversion to RGB."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION

from job.config.schema import DatasetSpec

Image.MAX_IMAGE_PIXELS = None  # `max_image_pixels` is our bound; Pillow's would warn in every thread
LARGEST = 10**9
"""Maximum bytes of an image file. A file of zeros takes no room on disk, but any amount of memory."""
MOST_NARROW = 200
"""Maximum ratio of the sides: Qwen's processor accepts no larger one (smart_resize's MAX_RATIO)."""
MIN_SIDE = 4
"""Minimum side; below it, processors mistake the height for the number of channels."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to turn an image upright, by its EXIF orientation."""
WHITE_IS_ZERO = 0
"""TIFF's PhotometricInterpretation of grey images whose lowest value is white."""
Picture = Image.Image


class BadRow(Exception):
    """Why a row is quarantined. The text holds no content of the row."""


def check_bytes(size: int) -> None:
    if size > LARGEST:
        raise BadRow(f"image file is larger than {LARGEST / 1e9:g} GB")


def check_size(width: int, height: int, spec: DatasetSpec) -> None:
    """Raises BadRow for sizes that no processor should be given."""
    if width * height > spec.max_image_pixels:
        raise BadRow(f"image too large: {width}×{height} is over {spec.max_image_pixels} pixels")
    if min(width, height) < MIN_SIDE:
        raise BadRow(f"image too small: {width}×{height}")
    if max(width, height) > MOST_NARROW * min(width, height):
        raise BadRow(f"image too narrow: {width}×{height}; one side may be {MOST_NARROW} times the other at most")


def upright(image: Picture) -> Picture:
    """Turns an image as its EXIF orientation says. `ImageOps.exif_transpose` also rewrites the other tags, and so refuses good
    pixels beside one that it cannot write."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # it may raise anything on broken tags
        return image
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def as_rgb(image: Picture) -> Picture:
    """Converts every Pillow mode to RGB. Deep grey images (16 bits, floats) are stretched from their own darkest to brightest
    value: scanners use 10 or 12 of 16 bits, and Pillow's own conversion would clip at 255. Nor does it invert deep TIFF images
    whose zero is white, as it does those of 8 bits. Transparent areas become white."""
    if image.mode.startswith(("I", "F")):
        negative = getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
        values = np.asarray(image, dtype=np.float32)
        return Image.fromarray(stretch(-values if negative else values)).convert("RGB")
    if image.mode in ("RGBA", "LA", "La", "PA", "RGBa") or "transparency" in image.info:
        solid = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", solid.size, "white"), solid).convert("RGB")
    if image.mode == "LAB":
        raise BadRow("image in LAB colours, which cannot be shown")
    return image.convert("RGB")


def stretch(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Scales numbers of any range to 8 bits, lowest to highest."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise BadRow("image contains values that are not numbers")
    return ((values - low) * (255 / max(high - low, 1e-9)) + 0.5).astype(np.uint8)


def shrink(picture: Picture, size: tuple[int, int], resample: int | None = None) -> Picture:
    """Resizes with the filter `resample` of a processor, as a server does that is given the whole picture, or with Lanczos."""
    if size == picture.size:
        return picture
    if resample is None:
        small = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    else:
        small = picture.resize(size, Image.Resampling(resample))
    small.info = picture.info
    return small
