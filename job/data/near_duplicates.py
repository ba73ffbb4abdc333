"""Finds near-duplicate images across the split: recompressed, resized, relit, inverted, mirrored, and slightly cropped or turned.

Films of one body part are alike in all that is large, so pictures are compared by what sets each apart from the others of its
data. A thumbnail is normalised by its local contrast, which undoes exposure, gamma and window. Its values on a grid are taken
relative to their mean over the data, and decorrelated (whitened): shared anatomy then counts for little. A held-out picture is
compared as it is, mirrored, zoomed and turned; an inverted one has the opposite sign. The first look, on a coarse grid, finds
the nearest training picture, and the second, on a finer grid, decides. `make near-duplicates` measures both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 64
FINE, COARSE = 0.8, 4.0
"""Standard deviations, in pixels of a thumbnail, of the details that are kept and of the neighbourhood that normalises them."""
BLANK = 2.0
"""Standard deviation of the grey levels below which a picture has nothing to be compared by."""
VARIANTS = [(mirrored, zoom, 0.0) for mirrored in (False, True) for zoom in (1.0, 0.97, 0.94, 1.03, 1.064)]
VARIANTS += [(mirrored, 1.0, turn) for mirrored in (False, True) for turn in (-2.0, -1.0, 1.0, 2.0)]
"""Ways in which a held-out picture is compared: whether mirrored, the zoom, and the turn in degrees."""
LEARNED_FROM = 4000
"""Pictures from which mean and covariance are estimated."""
AT_ONCE = 512
"""Pictures that are compared at a time: with 100,000 others, by 200 MB of products."""
Thumbnail = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Look:
    """A grid of `points` × `points` values, smoothed by `blur` pixels, and the least likeness (a cosine) of copies."""

    points: int
    blur: float
    least: float


FIRST, SECOND = Look(14, 1.5, 0.6), Look(40, 0.6, 0.72)
SPAN = 0.875
"""Part of a picture's side that the grid covers, so that crops and turns rarely reach beyond the picture."""


def thumbnail(picture: Image.Image) -> Thumbnail:
    """Returns the grey picture in 64 × 64 pixels, stretched to all grey levels; all zeros if it is blank."""
    small = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=4.0)
    grey = np.asarray(small, dtype=np.float32)
    if grey.std() < BLANK:
        return np.zeros((SIDE, SIDE), np.uint8)
    return np.asarray((grey - grey.min()) * (255 / np.ptp(grey)) + 0.5).astype(np.uint8)


def near_pairs(some: NDArray[np.uint8], others: NDArray[np.uint8]) -> list[tuple[int, int, float]]:
    """Returns (index, index of the nearest, likeness up to 1) for each of the thumbnails `some` (n, 64, 64) that has a copy
    among `others` (m, 64, 64)."""
    ours, theirs = (np.flatnonzero(each.any(axis=(1, 2))) for each in (some, others))
    if not len(ours) or not len(theirs):
        return []
    queries, known = some[ours], others[theirs]
    step = -(-(len(known) + len(queries)) // LEARNED_FROM)
    sample = _details(np.concatenate([known[::step], queries[::step]]))
    nearest, variant, likeness = _first(queries, known, sample)
    found = np.flatnonzero(likeness >= FIRST.least)
    exact = _second(queries[found], known[nearest[found]], variant[found], sample)
    return [
        (int(ours[place]), int(theirs[nearest[place]]), round(float(like), 3))
        for place, like in zip(found, exact, strict=True)
        if like >= SECOND.least
    ]


def _details(thumbnails: NDArray[np.uint8]) -> Floats:
    """Divides what differs from a pixel's neighbourhood by the contrast there."""
    grey = _blur(thumbnails.astype(np.float32), FINE)
    detail = grey - _blur(grey, COARSE)
    contrast = np.sqrt(_blur(detail * detail, COARSE))
    return np.asarray(detail / (contrast + 0.15 * contrast.mean(axis=(1, 2), keepdims=True)))


def _blur(pictures: Floats, deviation: float) -> Floats:
    """Smooths (…, 64, 64) pictures by a Gaussian; their outermost pixels go on beyond the edge."""
    reach = int(3 * deviation + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    matrix = np.zeros((SIDE, SIDE), np.float32)
    for offset, weight in zip(range(-reach, reach + 1), kernel / kernel.sum(), strict=True):
        np.add.at(matrix, (np.arange(SIDE), np.clip(np.arange(SIDE) + offset, 0, SIDE - 1)), weight)
    return np.asarray(matrix @ pictures @ matrix.T)


def _grid(details: Floats, look: Look, variant: tuple[bool, float, float]) -> Floats:
    """Returns the values (n, points²) of pictures on the look's grid, mirrored, zoomed and turned as the variant says."""
    mirrored, zoom, turn = variant
    line = np.linspace(-SPAN, SPAN, look.points) * (1 - 1 / look.points)
    down, across = (each.ravel() for each in np.meshgrid(line, -line if mirrored else line, indexing="ij"))
    cos, sin = zoom * np.cos(np.radians(turn)), zoom * np.sin(np.radians(turn))
    middle = (SIDE - 1) / 2
    x, y = (((cos * across - sin * down) * middle + middle), ((sin * across + cos * down) * middle + middle))
    x, y = (np.clip(each, 0, SIDE - 1.001) for each in (x, y))
    left, top = x.astype(int), y.astype(int)
    right, bottom = (x - left).astype(np.float32), (y - top).astype(np.float32)
    smooth = _blur(details, look.blur)
    above, below = (smooth[:, row, left] * (1 - right) + smooth[:, row, left + 1] * right for row in (top, top + 1))
    return np.asarray(above * (1 - bottom) + below * bottom)


def _spread(sample: Floats) -> tuple[Floats, Floats]:
    """Returns mean and covariance of values (n, k). The covariance is shrunk towards a multiple of the identity, the more
    the fewer pictures there are."""
    mean = sample.mean(axis=0)
    covariance = (sample - mean).T @ (sample - mean) / len(sample)
    ridge = np.trace(covariance) / len(covariance) * (0.05 + sample.shape[1] / len(sample) / 4)
    return mean, covariance + ridge * np.eye(len(covariance), dtype=np.float32)


def _unit(values: Floats) -> Floats:
    return np.asarray(values / (np.linalg.norm(values, axis=-1, keepdims=True) + 1e-9), np.float32)


def _first(
    queries: NDArray[np.uint8], known: NDArray[np.uint8], sample: Floats
) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """Returns for each query the nearest picture, the variant in which it is (those of inverted pictures follow the others), and
    the likeness."""
    plain = VARIANTS[0]
    mean, covariance = _spread(_grid(sample, FIRST, plain))
    values, vectors = np.linalg.eigh(covariance)
    whiten = np.asarray((vectors * values**-0.5) @ vectors.T, np.float32)
    bank = np.concatenate([_unit((_grid(_details(part), FIRST, plain) - mean) @ whiten) for part in _parts(known)]).T
    nearest, variant, likeness = [], [], []
    for part in _parts(queries):
        best = np.full(len(part), -np.inf, np.float32)
        at, by = np.zeros(len(part), int), np.zeros(len(part), int)
        details = _details(part)
        for number, each in enumerate(VARIANTS):
            seen = _grid(details, FIRST, each)
            for inverted, sign in enumerate((1, -1)):
                alike = _unit((sign * seen - mean) @ whiten) @ bank
                place = alike.argmax(axis=1)
                top = alike[np.arange(len(part)), place]
                better = top > best
                best[better], at[better] = top[better], place[better]
                by[better] = number + inverted * len(VARIANTS)
        nearest.append(at)
        variant.append(by)
        likeness.append(best)
    return np.concatenate(nearest), np.concatenate(variant), np.concatenate(likeness)


def _second(queries: NDArray[np.uint8], known: NDArray[np.uint8], variant: NDArray[np.intp], sample: Floats) -> Floats:
    """Returns the likeness of each query to the known picture of the same index, on the finer grid."""
    likeness = np.zeros(len(queries), np.float32)
    if not len(queries):
        return likeness
    mean, covariance = _spread(_grid(sample, SECOND, VARIANTS[0]))
    for number in np.unique(variant):
        rows = np.flatnonzero(variant == number)
        sign = -1 if number >= len(VARIANTS) else 1
        ours = sign * _grid(_details(queries[rows]), SECOND, VARIANTS[number % len(VARIANTS)]) - mean
        theirs = _grid(_details(known[rows]), SECOND, VARIANTS[0]) - mean
        one, other = (np.linalg.solve(covariance, each.T).T for each in (ours, theirs))
        size = np.sqrt((ours * one).sum(axis=1) * (theirs * other).sum(axis=1))
        likeness[rows] = (one * theirs).sum(axis=1) / size
    return likeness


def _parts(pictures: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    return [pictures[start : start + AT_ONCE] for start in range(0, len(pictures), AT_ONCE)]
