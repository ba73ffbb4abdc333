"""Finds near-duplicate images across the split: recompressed, resized or relit copies. Does not find crops."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 32
KEPT = 16
BITS = KEPT * KEPT - 1
NEAR = 10
"""Largest distance in bits. On drawn radiographs of one kind it finds 97 % of copies (JPEG of quality 50, half the size,
brighter, flatter) and none of 180,000 pairs of different ones (benchmarks/near_duplicates.py)."""
PRODUCTS = 2**25
"""Pairs compared at a time: 128 MB."""

Bits = NDArray[np.int8]
PLACE = np.arange(SIDE)
COSINES = np.cos(np.pi * np.arange(KEPT)[:, None] * (2 * PLACE + 1) / (2 * SIDE)).astype(np.float32)
"""The first rows of the DCT-II matrix, shape (16, 32)."""


def perceptual_hash(picture: Image.Image) -> Bits:
    """Returns 255 signs (±1): which of the lowest 16 × 16 frequencies of the grey image, without its mean, are above their
    median.

    pHash (Zauner, 2010) with 255 bits instead of 64: radiographs of one body part are alike in the lowest frequencies.
    """
    small = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=4.0)
    grey = np.asarray(small, dtype=np.float32)
    frequencies = (COSINES @ grey @ COSINES.T).ravel()[1:]
    return np.where(frequencies > np.median(frequencies), 1, -1).astype(np.int8)


def near_pairs(some: NDArray[Any], others: NDArray[Any], most: int = NEAR) -> list[tuple[int, int, int]]:
    """Returns (index, index of the nearest, bits apart) for each of `some` that is within `most` bits of one of `others`.

    Shapes (n, 255) and (m, 255). Compares every pair by a product of signs: bits apart = (255 − a·b) / 2.
    """
    found = []
    columns = np.ascontiguousarray(others.T, dtype=np.float32)
    at_once = max(1, PRODUCTS // len(others))
    for start in range(0, len(some), at_once):
        products = some[start : start + at_once].astype(np.float32) @ columns
        nearest = products.argmax(axis=1)
        apart = (BITS - products.max(axis=1)) / 2
        near = np.flatnonzero(apart <= most).tolist()
        found += [(start + place, int(nearest[place]), int(apart[place])) for place in near]
    return found
