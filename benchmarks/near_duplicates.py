"""How well are copies across the split found, how often are different pictures taken for copies, and how fast is the search?

    python benchmarks/near_duplicates.py

On drawn radiographs (examples/radiographs.py), which are as alike as pictures of one kind are.
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance
from record import append

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples.radiographs import draw_cases, draw_images
from job.data.near_duplicates import BITS, NEAR, near_pairs, perceptual_hash

PICTURES = 600
COPIES = 200
MANY = (10_000, 100_000)


def recompressed(picture: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=50)
    return Image.open(stream)


def cropped(picture: Image.Image) -> Image.Image:
    edge = picture.width // 50
    return picture.crop((edge, edge, picture.width - edge, picture.height - edge))


CHANGES = {
    "JPEG of quality 50": recompressed,
    "half the size": lambda picture: picture.resize((picture.width // 2, picture.height // 2)),
    "brighter by a fifth": lambda picture: ImageEnhance.Brightness(picture).enhance(1.2),
    "flatter by a fifth": lambda picture: ImageEnhance.Contrast(picture).enhance(0.8),
    "cropped by 2 % a side": cropped,
}


def main() -> None:
    chance = np.random.default_rng(7)
    pictures = [Image.fromarray(each) for each in draw_images(draw_cases(PICTURES, chance), chance)]
    hashes = np.stack([perceptual_hash(picture) for picture in pictures])
    for name, change in CHANGES.items():
        copies = np.stack([perceptual_hash(change(picture)) for picture in pictures[:COPIES]])
        apart = (copies != hashes[:COPIES]).sum(axis=1)
        append("near duplicates", f"copies found: {name}", 100 * float((apart <= NEAR).mean()), "%")
    apart = (BITS - hashes.astype(int) @ hashes.T.astype(int)) // 2
    others = apart[np.triu_indices(PICTURES, 1)]
    append(
        "near duplicates",
        f"different pictures taken for copies, of {len(others):,}",
        float((others <= NEAR).sum()),
        "pairs",
    )
    some, many = (chance.choice([-1, 1], (count, BITS)).astype(np.int8) for count in MANY)
    began = time.monotonic()
    near_pairs(some, many)
    append(
        "near duplicates", f"search of {MANY[0]:,} held-out pictures among {MANY[1]:,}", time.monotonic() - began, "s"
    )


if __name__ == "__main__":
    main()
