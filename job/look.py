"""Makes a page of what the model will see, the odd rows first, before a GPU is used. `job look` writes it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.config.environment import Environment
from job.config.schema import JobSpec
from job.errors import SpecError
from job.output.stored import open_output
from job.planning.survey import as_seen, survey
from job.runtime.progress import progress_bar

if TYPE_CHECKING:
    from PIL.Image import Image

    from job.data import Data, Row

EACH = 6
"""Rows of each part."""
QUALITY, LARGEST = 85, 448
"""Of the page's JPEGs: quality, and the longest side in pixels."""
BLANK = 3.0
"""Standard deviation of the grey values (0 to 255) below which an image is almost blank."""
MOST_BAD = 40


@dataclass(frozen=True)
class Seen:
    """What the parts of the page are chosen by: which side of the split, the place there, the row's id, the least deviation of
    the grey values of its images, their shortest side in pixels, how many times more pixels one had before it was shrunk, whether
    text may be burned into one, and the words of the answer."""

    side: str
    place: int
    id: str
    deviation: float
    shortest: int
    shrunk: float
    burned_in: bool
    words: int


def look(spec: JobSpec, scratch: Path, environment: Environment, most: int) -> str:
    """Return the page, with parts chosen from at most `most` rows, evenly spread over training and held-out rows.

    All rows are validated first. Raises SpecError if the spec keeps its rows private, and whatever `check --data` raises.
    """
    from job.model.transformers_backend import load_processor
    from job.report.page import fill

    if not spec.privacy.report_images:
        raise SpecError(
            "privacy.report_images is false, and this page shows images and texts; if you may see them, set "
            "JOB__PRIVACY__REPORT_IMAGES=true for this command"
        )
    found = survey(spec, open_output(spec).inner, scratch, environment, fetch=False, all_data=True)
    if found.data is None or found.base is None:
        raise SpecError("job look needs the rows and the base model's processor; install the train extra")
    processor, data = load_processor(spec.model, found.base), found.data
    sides = {"training": data.train, "validation": data.validation, "held out": data.evaluation}
    seen = list(_examined(sides, most))
    parts = {
        title: [_shown(spec, processor, each, sides[each.side][each.place]) for each in rows]
        for title, rows in _parts(seen, data).items()
        if rows
    }
    return fill(
        "look.html",
        autoescape=True,
        name=spec.name,
        facts=data.facts,
        bad=data.quarantined[:MOST_BAD],
        more_bad=max(0, len(data.quarantined) - MOST_BAD),
        examined=len(seen),
        parts=parts,
    )


def _examined(sides: dict[str, Any], most: int) -> Iterator[Seen]:
    total = sum(map(len, sides.values()))
    for side, rows in sides.items():
        count = min(len(rows), max(1, most * len(rows) // total)) if len(rows) else 0
        with progress_bar(f"look at {side} rows", count) as bar:
            for place in (index * len(rows) // count for index in range(count)):
                yield _seen(side, place, rows[place])
                bar.update()


def _seen(side: str, place: int, row: Row) -> Seen:
    import numpy as np

    from job.data.images import WHOLE

    images = row["images"]
    grey = [np.asarray(image.convert("L").resize((64, 64)), dtype=float) for image in images]
    return Seen(
        side,
        place,
        row["id"],
        min((float(each.std()) for each in grey), default=255.0),
        min((min(image.size) for image in images), default=0),
        max((prod(image.info.get(WHOLE, image.size)) / prod(image.size) for image in images), default=1.0),
        any(image.info.get("burned_in") for image in images),
        len(row["reference"].split()),
    )


def _parts(seen: list[Seen], data: Data) -> dict[str, list[Seen]]:
    """Choose the rows of each part; each row is shown once, in the first part that has it."""
    from job.evaluate.generate import rows_ids

    shown = set[tuple[str, int]]()

    def first(rows: Iterable[Seen]) -> list[Seen]:
        taken = list(islice((each for each in rows if (each.side, each.place) not in shown), EACH))
        shown.update((each.side, each.place) for each in taken)
        return taken

    places = {
        side: {name: place for place, name in enumerate(rows_ids(rows))}
        for side, rows in (("training", data.train), ("held out", data.evaluation))
    }
    pairs = [
        Seen(side, places[side][name], name, 255.0, 0, 1.0, False, 0)
        for pair in data.near
        for side, name in (("held out", pair.evaluation), ("training", pair.train))
        if name in places[side]
    ]
    with_images = [each for each in seen if each.shortest]
    return {
        "Nearly the same image in training and held-out rows": first(pairs),
        "Almost blank images": first(
            sorted((each for each in with_images if each.deviation < BLANK), key=lambda each: each.deviation)
        ),
        "Possible burned-in text": first(each for each in with_images if each.burned_in),
        "Images shrunk most": first(
            sorted((each for each in with_images if each.shrunk > 1), key=lambda each: -each.shrunk)
        ),
        "Smallest images": first(sorted(with_images, key=lambda each: each.shortest)),
        "Shortest answers": first(sorted(seen, key=lambda each: each.words)),
        "Longest answers": first(sorted(seen, key=lambda each: -each.words)),
        "Evenly spread": first(seen[:: max(1, len(seen) // (2 * EACH))]),
    }


def _shown(spec: JobSpec, processor: Any, seen: Seen, row: Row) -> dict[str, Any]:
    """Return a row in the form that the template reads; `text` alternates between what is not learned and what is."""
    from job.report.gallery import data_uri

    text, tokens, learned = as_seen(spec, processor, row)
    return {
        "id": f"{seen.id}, {seen.side}",
        "images": [{"uri": data_uri(_jpeg(image)), "size": image.size} for image in row["images"]],
        "text": re.split("[⟦⟧]", text),
        "tokens": tokens,
        "learned": learned,
    }


def _jpeg(image: Image) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((LARGEST, LARGEST))
    with io.BytesIO() as file:
        small.save(file, "JPEG", quality=QUALITY)
        return file.getvalue()
