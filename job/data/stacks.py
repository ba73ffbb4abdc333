"""Chooses slices of a volume or frames of a file, and arranges them."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from job.data.pixels import BadRow, Picture

MEDGEMMA, MOST_SLICES = "medgemma", 85
"""Value of `dicom.frames` for volumes as MedGemma 1.5 was shown them, and the most slices of one: see `windows.MEDGEMMA`."""
MOST_TILES = 16
TILE = 512
MOST_OBLONG = 10
"""Largest ratio of a pixel's sides that is believed."""


def choose(count: int, frames: str | int | list[int]) -> list[int]:
    """Returns indices into a stack of `count`: the middle one, evenly spread ones (a number, a montage, or as MedGemma's notebook
    samples them), or those named (from 0; -1 is the last). A single frame is always chosen. Raises BadRow for an index out of
    range."""
    if count == 1:
        return [0]
    if frames == "middle":
        return [count // 2]
    if frames == MEDGEMMA:
        return (
            [round(n / MOST_SLICES * (count - 1)) for n in range(1, MOST_SLICES + 1)]
            if count > MOST_SLICES
            else [*range(count)]
        )
    if isinstance(frames, int) or frames == "montage":
        tiles = min(count, MOST_TILES if frames == "montage" else int(frames))
        return [(2 * tile + 1) * count // (2 * tiles) for tile in range(tiles)]
    if not all(-count <= int(place) < count for place in frames):
        raise BadRow("dataset.dicom.frames names a frame that it does not have")
    return [int(place) % count for place in frames]


def montage(shown: list[Picture]) -> Picture:
    """Arranges images row by row in a square grid, each at most `TILE` pixels a side."""
    side = int(np.ceil(np.sqrt(len(shown))))
    for picture in shown:
        picture.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    width, height = (max(picture.size[axis] for picture in shown) for axis in (0, 1))
    grid = Image.new("RGB", (side * width, -(-len(shown) // side) * height))
    for place, picture in enumerate(shown):
        grid.paste(picture, (place % side * width, place // side * height))
    grid.info = dict(shown[0].info)
    return grid


def square(picture: Picture, spacing: Any) -> Picture:
    """Stretches the shorter side of pixels that are not square: `spacing` is between rows and between columns (PS3.3 C.7.6.3.1.7,
    10.7.1.3)."""
    ratio = float(spacing[0]) / float(spacing[1]) if spacing and len(spacing) == 2 and float(spacing[1]) else 1
    if not 1.01 <= max(ratio, 1 / max(ratio, 1e-9)) <= MOST_OBLONG:
        return picture
    width, height = picture.size
    size = (width, round(height * ratio)) if ratio > 1 else (round(width / ratio), height)
    return picture.resize(size, Image.Resampling.BICUBIC)
