"""Which samples a report shows, and how: a few at random, the worst, the most changed and the best."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from job.evaluate.labels import stated_and_right
from job.evaluate.scores import Floats, Row, rouge
from job.spec import LabelSpec

EACH = 4
LITTLE_IN_COMMON = 0.4
"""ROUGE-L below which to mark every word that differs would only hide the text."""
MOST_STEPS = 6
PARTS = {
    "changed": "Most changed",
    "worst": "Worst after tuning",
    "best": "Best after tuning",
    "random": "At random",
}
PIECE = re.compile(r"\s*\S+")
EDGES = re.compile(r"^\W+|\W+$")
Sample = dict[str, Any]


def chosen(facts: Mapping[str, Any]) -> dict[str, list[int]]:
    """The rows of each part of the gallery, each row once: {"random": [3, 17], "worst": …}; empty without rows.

    Those at random are drawn first, from the run's seed and without a look at the results, so that they are a fair
    sample. The others are ranked by the share of labels right plus ROUGE-L (so by ROUGE-L alone without labels).
    """
    before, after = facts.get("before") or [], facts.get("after") or []
    if not after or len(before) != len(after):
        return {}
    old, new = _scores(before, _labels(facts)), _scores(after, _labels(facts))
    seed = ((facts.get("metrics") or {}).get("settings") or {}).get("seed", 0)
    parts = {"random": np.random.default_rng([seed, 3]).permutation(len(after))[:EACH].tolist()}
    taken = set(parts["random"])
    for name, order in (("worst", new), ("changed", _most_changed(new - old)), ("best", -new)):
        parts[name] = [index for index in np.argsort(order, kind="stable").tolist() if index not in taken][:EACH]
        taken.update(parts[name])
    return {name: parts[name] for name in PARTS if parts[name]}


def shown(facts: Mapping[str, Any], images: Mapping[str, bytes]) -> dict[str, list[Sample]]:
    """The gallery's samples by the title of their part. `images` are JPEG bytes by row id."""
    return {PARTS[part]: [sample(facts, index, images) for index in rows] for part, rows in chosen(facts).items()}


def sample(facts: Mapping[str, Any], index: int, images: Mapping[str, bytes]) -> Sample:
    """Row `index` of the stored evaluations, as the page takes it.

    `image` is a data URI, or empty. `seen` has the opacity, 0 to 1, of each cell of its map, empty without one; `strongest`
    what the strongest cell did to the answer's loss, nats per token.
    """
    row = facts["after"][index]
    identity = str(row["id"])
    cells = np.array((facts.get("occlusion") or {}).get(identity) or [[0.0]])
    strongest = float(cells.max())
    answers = [("Before", facts["before"][index]), ("After", row)]
    return {
        "id": identity,
        "reference": str(row["reference"]),
        "about": [
            (name, value) for part in ("labels", "groups") for name, value in (row.get(part) or {}).items() if value
        ],
        "answers": [answer(when, each, _labels(facts)) for when, each in answers],
        "image": data_uri(images[identity]) if identity in images else "",
        "seen": np.round(cells.clip(0) / strongest, 3).tolist() if strongest > 0 else [],
        "strongest": strongest,
    }


def while_training(facts: Mapping[str, Any]) -> dict[str, list[Sample]]:
    """What was said to the fixed rows as training went on, by their reference; of many steps, a few evenly spread."""
    lines = facts.get("samples") or []
    steps = sorted({line["step"] for line in lines})
    some = (
        {steps[place * (len(steps) - 1) // max(MOST_STEPS - 1, 1)] for place in range(MOST_STEPS)} if steps else set()
    )
    found: dict[str, list[Sample]] = {}
    for line in lines:
        if line["step"] in some:
            found.setdefault(f"{line['id']}: {line['reference']}", []).append(
                answer(f"Step {line['step']:,}", line, {})
            )
    return found


def answer(when: str, row: Row, labels: Mapping[str, LabelSpec]) -> dict[str, Any]:
    """One generated text: its differences from the reference, its ROUGE-L, its labels (name, stated, right).

    `note` says why `parts` are not differences: the text is empty, or has too little in common with the reference.
    """
    pairs = {name: stated_and_right([row], name, label)[1][0] for name, label in labels.items()}
    reference, generated = str(row["reference"]), str(row["generated"])
    score = float(_rouge_l([row])[0])
    parts, note = difference(reference, generated), ""
    if score < LITTLE_IN_COMMON:
        parts, note = [("same", generated)], "little in common with the reference" if generated.strip() else "empty"
    stated = [(name, pair[1], pair[0] == pair[1]) for name, pair in pairs.items() if pair]
    return {"when": when, "score": score, "labels": stated, "parts": parts, "note": note}


def difference(reference: str, generated: str) -> list[tuple[str, str]]:
    """`generated` in runs of words: `same`, `added`, and between them those `missing`, which only the reference has.

    Case and punctuation around a word do not count.
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


def _labels(facts: Mapping[str, Any]) -> dict[str, LabelSpec]:
    """How each label was read, from the stored metrics."""
    stored = (facts.get("metrics") or {}).get("labels") or {}
    return {
        name: LabelSpec(column=name, values=label["values"] or label["classes"], pattern=label["pattern"])
        for name, label in stored.items()
    }


def _scores(rows: Sequence[Row], labels: Mapping[str, LabelSpec]) -> Floats:
    """(n,) share of labels right plus ROUGE-L."""
    right = [
        [pair is not None and pair[0] == pair[1] for pair in stated_and_right(rows, name, label)[1]]
        for name, label in labels.items()
    ]
    return np.asarray(_rouge_l(rows) + (np.mean(right, axis=0) if right else 0.0))


def _rouge_l(rows: Sequence[Row]) -> Floats:
    return rouge([str(row["reference"]) for row in rows], [str(row["generated"]) for row in rows])["rougeL"].rows[:, 0]


def _most_changed(change: Floats) -> Floats:
    """An order (lowest first) that takes the largest loss, the largest gain, the next loss, the next gain, and so on.

    By size alone, the gains of a run that went well would fill every place, and what tuning broke would not be seen.
    """
    loss, gain = (np.argsort(np.argsort(side, kind="stable")) for side in (change, -change))
    return np.where(change < 0, 2.0 * loss, np.where(change > 0, 2.0 * gain + 1, np.inf))
