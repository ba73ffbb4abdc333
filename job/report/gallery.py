"""Selects and formats a report's samples: a few at random, the worst, the most changed and the best."""

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
from job.report.contents import Contents

LITTLE_IN_COMMON = 0.4
"""ROUGE-L below which marking every word that differs would only hide the text."""
MOST_STEPS = 6
PIECE = re.compile(r"\s*\S+")
EDGES = re.compile(r"^\W+|\W+$")
Shown = dict[str, Any]


def shown(contents: Contents, images: Mapping[str, bytes]) -> dict[str, list[Shown]]:
    """Returns the gallery's samples by the title of their part. `images` are JPEG bytes by row id."""
    parts = chosen(contents.before, contents.after, contents.metrics)
    return {PARTS[part]: [sample(contents, index, images) for index in rows] for part, rows in parts.items()}


def sample(contents: Contents, index: int, images: Mapping[str, bytes]) -> Shown:
    """Returns row `index` of the stored evaluations as the page takes it.

    `image` is a data URI, or empty. `seen` holds the opacity, 0 to 1, of each cell of its occlusion map, empty without one;
    `strongest` is the strongest cell's effect on the answer's loss, in nats per token.
    """
    row, labels = contents.after[index], labels_read(contents.metrics)
    cells = np.array(contents.occlusion.get(row.id) or [[0.0]])
    strongest = float(cells.max())
    answers = [("Before", contents.before[index]), ("After", row)]
    return {
        "id": row.id,
        "reference": row.reference,
        "about": [(name, value) for part in (row.labels, row.groups) for name, value in part.items() if value],
        "answers": [answer(when, each, labels) for when, each in answers],
        "image": data_uri(images[row.id]) if row.id in images else "",
        "seen": np.round(cells.clip(0) / strongest, 3).tolist() if strongest > 0 else [],
        "strongest": strongest,
    }


def while_training(samples: Sequence[Sample]) -> dict[str, list[Shown]]:
    """Returns the answers to the fixed rows during training, by their reference; of many steps, a few evenly spread."""
    steps = sorted({each.step for each in samples})
    some = (
        {steps[place * (len(steps) - 1) // max(MOST_STEPS - 1, 1)] for place in range(MOST_STEPS)} if steps else set()
    )
    found: dict[str, list[Shown]] = {}
    for each in samples:
        if each.step in some:
            said = Answer(each.id, each.reference, generated=each.generated)
            found.setdefault(f"{each.id}: {each.reference}", []).append(answer(f"Step {each.step:,}", said, {}))
    return found


def answer(when: str, row: Answer, labels: Mapping[str, LabelSpec]) -> Shown:
    """Formats one generated text: its differences from the reference, its ROUGE-L, its labels (name, stated, right).

    `note` says why `parts` are not differences: the text is empty, or has too little in common with the reference.
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
    """Splits `generated` into runs of words: `same`, `added`, and between them `missing`, which only the reference has.

    Ignores case and the punctuation around a word.
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
