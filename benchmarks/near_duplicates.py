"""How many copies across the split are found, how many different films are taken for copies, and what does it cost?

    python benchmarks/near_duplicates.py

On films that are as alike as films are (tests/data/films.py): half of them held out, and copies of 200.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from results import append

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from PIL import Image

from examples.radiographs import draw_cases, draw_images
from job.data.near_duplicates import SECOND, Thumbnail, near_pairs, thumbnail
from tests.data.films import CHANGES, draw_films

COPIES = 200
AT_ONCE = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, default=10_000)
    count = parser.parse_args().films
    chance = np.random.default_rng(7)
    films, thumbnails, seconds = list[Image.Image](), list[Thumbnail](), 0.0
    while len(thumbnails) < count:
        drawn = draw_films(AT_ONCE, chance)
        films += drawn if len(films) < COPIES else []
        began = time.process_time()
        thumbnails += map(thumbnail, drawn)
        seconds += time.process_time() - began
    everything = np.stack(thumbnails[:count])
    append("near duplicates", "thumbnail of a film of 128 × 128", 1e3 * seconds / count, "ms")
    for name, change in CHANGES.items():
        copies = np.stack([thumbnail(change(film)) for film in films[:COPIES]])
        copied = [place == other for place, other, _ in near_pairs(copies, everything)]
        right, wrong = copied.count(True), copied.count(False)
        share = right / COPIES
        append("near duplicates", f"copies found: {name}", 100 * share, "%", goal="at least 90", meets=share >= 0.9)
        if wrong:
            append("near duplicates", f"copies found of another film: {name}", wrong, "films", goal="none", meets=False)
    held = count // 2
    began = time.process_time()
    found = near_pairs(everything[:held], everything[held:])
    spent = time.process_time() - began
    title = f"different films taken for copies, {held:,} against {count - held:,}"
    append("near duplicates", title, len(found), "pairs", goal="none", meets=not found, detail=f"bound {SECOND.least}")
    title = f"search among {count - held:,} films, for each held-out one"
    append("near duplicates", title, 1e3 * spent / held, "ms", detail="processor time")
    drawn = [Image.fromarray(each) for each in draw_images(draw_cases(600, chance), chance)]
    small = np.stack(list(map(thumbnail, drawn)))
    found = near_pairs(small[:300], small[300:])
    title = "different drawn radiographs taken for copies, 300 against 300"
    append("near duplicates", title, len(found), "pairs", goal="none", meets=not found)


if __name__ == "__main__":
    main()
