"""Which samples a report shows, and how: a few at random, the worst, the most changed and the best."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from job.evaluate import labels as label_fields
from job.evaluate.differences import Part, difference
from job.evaluate.scores import Floats, Row, rouge

EACH = 4
LARGEST_IMAGE_BYTES = 120_000
SHRUNK_SIDE = 640
LITTLE_IN_COMMON = 0.25
SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
}


@dataclass(frozen=True)
class Answer:
    """One generated text of a sample: its differences from the reference, its ROUGE-L, its labels (stated, right).

    `note` says why `parts` are not differences: the text is empty, or has so little in common with the reference that
    marking every word would only hide it.
    """

    when: str
    parts: list[Part]
    score: float
    labels: list[tuple[str, str, bool]]
    note: str


@dataclass(frozen=True)
class Sample:
    """One held-out row as it is shown; `image` is a data URI, or empty. `seen` has the opacity, 0 to 1, of each cell of its
    map, empty without one; `strongest` what the strongest cell did to the answer's loss, nats per token."""

    id: str
    reference: str
    labels: list[tuple[str, str]]
    groups: list[tuple[str, str]]
    before: Answer
    after: Answer
    image: str
    seen: list[list[float]]
    strongest: float


def chosen(facts: Mapping[str, Any]) -> dict[str, list[int]]:
    """The rows of each part of the gallery, each row once: {"random": [3, 17], "worst": …}; empty without rows.

    Those at random are drawn first, from the run's seed and without a look at the results, so that they are a fair
    sample. The others are ranked by the share of labels right plus ROUGE-L (so by ROUGE-L alone without labels).
    """
    before, after = facts.get("before") or [], facts.get("after") or []
    if not after or len(before) != len(after):
        return {}
    specs = specs_of(facts)
    old, new = _scores(before, specs), _scores(after, specs)
    seed = ((facts.get("metrics") or {}).get("settings") or {}).get("seed", 0)
    drawn = np.random.default_rng([seed, 3]).permutation(len(after))[:EACH].tolist()
    taken = set(drawn)
    parts = {"random": drawn}
    for name, order in (("worst", new), ("changed", _most_changed(new - old)), ("best", -new)):
        parts[name] = [index for index in np.argsort(order, kind="stable").tolist() if index not in taken][:EACH]
        taken.update(parts[name])
    return {name: parts[name] for name in ("changed", "worst", "best", "random") if parts[name]}


def sample(facts: Mapping[str, Any], index: int, images: Mapping[str, bytes]) -> Sample:
    """Row `index` of the stored evaluations, ready to show."""
    before, after = facts["before"][index], facts["after"][index]
    specs = specs_of(facts)
    image = images.get(str(after["id"]))
    cells: list[list[float]] = (facts.get("occlusion") or {}).get(str(after["id"])) or []
    return Sample(
        id=str(after["id"]),
        reference=str(after["reference"]),
        labels=[(name, str(value)) for name, value in (after.get("labels") or {}).items() if value],
        groups=[(name, str(value)) for name, value in (after.get("groups") or {}).items() if value is not None],
        before=_answer("Before", before, specs),
        after=_answer("After", after, specs),
        image=data_uri(image) if image else "",
        seen=_opacities(cells),
        strongest=max((value for line in cells for value in line), default=0.0),
    )


def _opacities(cells: list[list[float]]) -> list[list[float]]:
    """The share of the largest rise in loss; nothing where no cell makes the answer less likely."""
    most = max((value for line in cells for value in line), default=0.0)
    return [[round(max(value, 0.0) / most, 3) for value in line] for line in cells] if most > 0 else []


def data_uri(content: bytes) -> str:
    """The image for a page, made smaller where it is large; empty for what is not a picture that can be shown."""
    kind = next((kind for start, kind in SIGNATURES.items() if content.startswith(start)), None)
    if kind is None or len(content) > LARGEST_IMAGE_BYTES:
        content, kind = _shrunk(content), "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}" if content else ""


def specs_of(facts: Mapping[str, Any]) -> dict[str, SimpleNamespace]:
    """How each label was read, from the stored metrics."""
    stored = (facts.get("metrics") or {}).get("labels") or {}
    return {
        name: SimpleNamespace(values=label.get("values") or label.get("classes"), pattern=label.get("pattern"))
        for name, label in stored.items()
    }


def _scores(rows: Sequence[Row], specs: Mapping[str, SimpleNamespace]) -> Floats:
    """(n,) share of labels right plus ROUGE-L."""
    right = np.zeros((max(len(specs), 1), len(rows)))
    for line, (name, spec) in zip(right, specs.items(), strict=False):
        line[:] = [
            pair is not None and pair[0] == pair[1] for pair in label_fields.stated_and_right(rows, name, spec)[1]
        ]
    return np.asarray(right.mean(axis=0) + _rouge_l(rows))


def _rouge_l(rows: Sequence[Row]) -> Floats:
    return rouge([str(row["reference"]) for row in rows], [str(row["generated"]) for row in rows])["rougeL"].rows[:, 0]


def _most_changed(change: Floats) -> Floats:
    """An order (lowest first) that takes the largest loss, the largest gain, the next loss, the next gain, and so on.

    By size alone, the gains of a run that went well would fill every place, and what tuning broke would not be seen.
    """
    loss, gain = (np.argsort(np.argsort(side, kind="stable")) for side in (change, -change))
    return np.where(change < 0, 2.0 * loss, np.where(change > 0, 2.0 * gain + 1, np.inf))


def _answer(when: str, row: Row, specs: Mapping[str, SimpleNamespace]) -> Answer:
    stated = []
    for name, spec in specs.items():
        pair = label_fields.stated_and_right([row], name, spec)[1][0]
        if pair:
            stated.append((name, pair[1], pair[0] == pair[1]))
    score = float(_rouge_l([row])[0])
    reference, generated = str(row["reference"]), str(row["generated"])
    if not generated.strip():
        return Answer(when, [], score, stated, "empty")
    if score < LITTLE_IN_COMMON:
        return Answer(when, [Part("same", generated)], score, stated, "little in common with the reference")
    return Answer(when, difference(reference, generated), score, stated, "")


def _shrunk(content: bytes) -> bytes:
    """A JPEG of at most `SHRUNK_SIDE` pixels a side; empty where Pillow is absent or cannot read the image."""
    try:
        from PIL import Image
    except ImportError:
        return b""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.thumbnail((SHRUNK_SIDE, SHRUNK_SIDE))
            out = io.BytesIO()
            image.convert("RGB").save(out, "JPEG", quality=80)
    except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return b""
    return out.getvalue()
