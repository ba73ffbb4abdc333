"""Formats the samples that the report shows: a few at random, the worst, the most changed and the best."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from job.config.schema import LabelSpec
from job.evaluate.examples import PARTS, chosen, labels_read, rouge_l
from job.evaluate.label_metrics import stated_and_right
from job.evaluate.records import Answer, Sample
from job.evaluate.sums import Floats
from job.report.contents import Contents

LITTLE_IN_COMMON = 0.4
"""Below this ROUGE-L, no differences are marked: nearly every word would be, which makes the text hard to read."""
LEAST, APART = 0.01, 5.0
"""Least effect of the strongest cell of a map, in nats per token, and its distance from the others, in standard deviations."""
MOST_STEPS = 6
PIECE = re.compile(r"\s*\S+")
EDGES = re.compile(r"^\W+|\W+$")
Shown = dict[str, Any]


def shown(contents: Contents, images: Mapping[str, bytes]) -> dict[str, list[Shown]]:
    """Returns the samples of each part of the gallery, by the part's title. `images` maps row ids to JPEG bytes."""
    parts = chosen(contents.before, contents.after, contents.metrics)
    return {PARTS[part]: [sample(contents, index, images) for index in rows] for part, rows in parts.items()}


def sample(contents: Contents, index: int, images: Mapping[str, bytes]) -> Shown:
    """Returns row `index` of the stored answers in the form that the page's template reads.

    `image` is a data URI, or empty, and `further` those of the row's other images. `seen` holds the opacity (0 to 1) of each
    cell of the row's occlusion map, and is empty if there is no map, or nothing stands out in it. `strongest` is the largest
    effect of a cell on the loss of the answer, in nats per token; None if there is no map.
    """
    row, labels = contents.after[index], labels_read(contents.metrics)
    cells = np.array(contents.occlusion.get(row.id) or [[]])
    strongest = float(cells.max()) if cells.size else None
    answers = [("Before", contents.before[index]), ("After", row)]
    return {
        "id": row.id,
        "reference": row.reference,
        "about": [(name, _told(value)) for part in (row.labels, row.groups) for name, value in part.items() if value],
        "answers": [answer(when, each, labels) for when, each in answers],
        "image": data_uri(images[row.id]) if row.id in images else "",
        "further": [data_uri(images[key]) for key in images if key.rpartition(".")[0] == row.id],
        "source": row.source,
        "question": row.question,
        "seen": np.round(cells.clip(0) / strongest, 3).tolist() if strongest and stands_out(cells) else [],
        "strongest": strongest,
    }


def _told(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def stands_out(cells: Floats) -> bool:
    """Whether the strongest cell of a map is clearly apart from the others.

    It must raise the loss by `LEAST` and lie `APART` standard deviations over the median, with the deviation estimated from the
    median absolute deviation of all cells (times 1.4826, as for a normal distribution). Of 36 cells of normal noise, the
    strongest does in fewer than one map of a hundred; tests/report/test_good_and_bad_run.py counts.
    """
    middle = np.median(cells)
    deviation = 1.4826 * np.median(np.abs(cells - middle))
    return bool(cells.max() >= LEAST and cells.max() > middle + APART * deviation)


def while_training(samples: Sequence[Sample]) -> dict[str, list[Shown]]:
    """Returns the answers given during training, by row id and reference, at no more than `MOST_STEPS` evenly spaced steps."""
    steps = sorted({each.step for each in samples})
    kept = (
        {steps[place * (len(steps) - 1) // max(MOST_STEPS - 1, 1)] for place in range(MOST_STEPS)} if steps else set()
    )
    found: dict[str, list[Shown]] = {}
    for each in samples:
        if each.step in kept:
            row = Answer(each.id, each.reference, generated=each.generated)
            found.setdefault(f"{each.id}: {each.reference}", []).append(answer(f"Step {each.step:,}", row, {}))
    return found


def answer(when: str, row: Answer, labels: Mapping[str, LabelSpec]) -> Shown:
    """Formats one generated text: its differences from the reference, its ROUGE-L and its labels.

    Each label is its name, the value that the text states, and whether that is right. If the text is empty or has too little in
    common with the reference, `parts` marks no differences, and `note` says why.
    """
    pairs = {name: stated_and_right([row], name, label)[1][0] for name, label in labels.items()}
    reference, generated = row.reference, row.generated
    score = float(rouge_l([row])[0])
    parts, note = difference(reference, generated), ""
    if score < LITTLE_IN_COMMON:
        parts, note = [("same", generated)], "little in common with the reference" if generated.strip() else "empty"
    stated = [(name, pair[1], pair[0] == pair[1]) for name, pair in pairs.items() if pair]
    return {"when": when, "score": score, "labels": stated, "parts": parts, "note": note}


def difference(reference: str, generated: str) -> list[tuple[str, str]]:
    """Splits `generated` into runs of words that are the `same` in the reference or `added` to it. Runs that only the reference
    has are inserted where they are `missing`.

    Ignores case, and punctuation at the start and end of a word.
    """
    ours, theirs = PIECE.findall(reference), PIECE.findall(generated)
    bare = [[EDGES.sub("", word.strip()).casefold() or word.strip() for word in words] for words in (ours, theirs)]
    parts = []
    for kind, i1, i2, j1, j2 in SequenceMatcher(None, bare[0], bare[1], autojunk=False).get_opcodes():
        if kind != "equal":
            parts.append(("missing", "".join(ours[i1:i2])))
        parts.append(("same" if kind == "equal" else "added", "".join(theirs[j1:j2])))
    return [(kind, text) for kind, text in parts if text]


def data_uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
