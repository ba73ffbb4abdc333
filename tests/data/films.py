"""Draws chest films that are as alike as films are, and changes them as copies in the wild are changed.

All films share body, lungs, spine, heart, ribs and clavicles, in slightly different places and sizes. What sets one apart
is faint: a texture of 2.8 % of the grey levels, as of vessels and skin folds, and noise.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

SIDE = 128
Floats = NDArray[np.float32]
Picture = Image.Image


def draw_films(count: int, chance: np.random.Generator) -> list[Picture]:
    def spread(low: float, high: float) -> Floats:
        return chance.uniform(low, high, (count, 1, 1)).astype(np.float32)

    def about(middle: float, deviation: float) -> Floats:
        return (middle + deviation * chance.standard_normal((count, 1, 1))).astype(np.float32)

    axis = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE
    y = axis[None, :, None] * about(1, 0.02) + about(0, 0.012) + 0.004 * _clouds(count, 3.0, chance)
    x = axis[None, None, :] * about(1, 0.02) + about(0, 0.012) + 0.004 * _clouds(count, 3.0, chance)
    across = np.abs(x - 0.5)
    body = _soft(1 - (across / spread(0.46, 0.5)) ** 4 - ((y - 0.55) / 0.56) ** 6, 0.15)
    lungs = _soft(1 - ((across - 0.2) / spread(0.145, 0.165)) ** 2 - ((y - 0.46) / spread(0.34, 0.38)) ** 2, 0.2)
    spine = _soft(0.05 - across, 0.02) * (0.9 + 0.1 * np.sin(y * spread(68, 74) + spread(0, 6)))
    heart = _soft(1 - ((x - 0.55) / spread(0.11, 0.14)) ** 2 - ((y - 0.66) / 0.13) ** 2, 0.4)
    ribs = _soft(np.sin((y + 0.9 * (across - 0.2) ** 2) * spread(49, 53) + about(0, 0.5)) - 0.6, 0.25) * (across > 0.05)
    clavicles = np.exp(-(((y - 0.16 - 0.12 * (across - 0.2)) / 0.015) ** 2)) * (across > 0.04)
    film = 0.08 + body * (0.52 - 0.27 * lungs + 0.2 * spine + 0.13 * heart + 0.07 * ribs + 0.06 * clavicles)
    film += body * 0.028 * _clouds(count, 1.4, chance)
    film = 0.5 + (film - 0.5) * spread(0.9, 1.1) + spread(-0.04, 0.04)
    film += 0.02 * chance.standard_normal(film.shape, dtype=np.float32)
    return [Image.fromarray(each) for each in (film.clip(0, 1) * 255).astype(np.uint8)]


def _soft(signed: Floats, width: float) -> Floats:
    return np.asarray((signed / width + 0.5).clip(0, 1), np.float32)


def _clouds(count: int, power: float, chance: np.random.Generator) -> Floats:
    """Noise of deviation 1 whose amplitude falls with the given power of the frequency."""
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None, :])
    amplitude = np.where(frequency > 0, np.maximum(frequency, 1e-9) ** -power, 0)
    white = np.fft.rfft2(chance.standard_normal((count, SIDE, SIDE), dtype=np.float32))
    clouds = np.fft.irfft2(white * amplitude, s=(SIDE, SIDE))
    return np.asarray(clouds / clouds.std(axis=(1, 2), keepdims=True), np.float32)


def _curve(change: Callable[[float], float]) -> Callable[[Picture], Picture]:
    table = [int(min(max(255 * change(level / 255), 0), 255) + 0.5) for level in range(256)]
    return lambda picture: picture.point(table)


def _recompressed(picture: Picture) -> Picture:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=50)
    return Image.open(stream)


def _cropped(picture: Picture) -> Picture:
    edge = round(0.03 * picture.width)
    return picture.crop((edge, edge, picture.width - edge, picture.height - edge))


CHANGES: dict[str, Callable[[Picture], Picture]] = {
    "inverted": ImageOps.invert,
    "windowed (darkest and brightest fifth cut)": _curve(lambda level: (level - 0.2) / 0.6),
    "mirrored": ImageOps.mirror,
    "cropped by 3 % a side": _cropped,
    "turned by 2°": lambda picture: picture.rotate(2, Image.Resampling.BICUBIC),
    "gamma 0.6": _curve(lambda level: level**0.6),
    "gamma 1.6": _curve(lambda level: level**1.6),
    "brighter by a fifth": lambda picture: ImageEnhance.Brightness(picture).enhance(1.2),
    "flatter by a fifth": lambda picture: ImageEnhance.Contrast(picture).enhance(0.8),
    "JPEG of quality 50": _recompressed,
    "half the size": lambda picture: picture.resize((picture.width // 2, picture.height // 2)),
}
