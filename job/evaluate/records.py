"""Defines what an evaluation stores: the answer to each row, and the comparison of before and after.

The JSON of each is its `asdict`, with keys in the order of its fields; `from_json` reads it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

PerRow = Mapping[str, Sequence[Any]]
"""Values for each row, by metric: a number each, or CheXbert's labels (`job.evaluate.radeval.LABELS`)."""
Maps = dict[str, list[list[float]]]
"""Occlusion maps by row id."""
Said = Literal["better", "worse", "changed", "unchanged", "no clear change", "unproven", "too few rows"]
T = TypeVar("T")


@dataclass(frozen=True)
class HeldOutRow:
    """The fields of a held-out row that come from the data. Rows of one `unit` (a patient, say) belong together. A label of which
    a row may have several is a list; those that the truth leaves open are under `schema.uncertain_key`. `question` is the last
    thing that was asked of it, None if all rows are asked the same; `source` names its image files, as the data do."""

    id: str
    reference: str
    labels: dict[str, str | list[str] | None] = field(default_factory=dict)
    groups: dict[str, str | None] = field(default_factory=dict)
    unit: int | None = None
    question: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Answer(HeldOutRow):
    """A line of `before.jsonl` or `after.jsonl`: the generated text and its tokens; the mean loss over the tokens of the true
    answer, in nats, and their number; the same loss with the images of another row, None for a row that has no other to swap
    with."""

    generated: str = ""
    tokens: int = 0
    loss: float | None = None
    answer_tokens: int = 0
    swapped_loss: float | None = None


@dataclass(frozen=True)
class Sample:
    """A line of `samples.jsonl`: what the model answered at a step of training."""

    step: int
    id: str
    reference: str
    generated: str


@dataclass(frozen=True)
class Estimate:
    """The value of a metric on `n` rows and its confidence interval; None where undefined."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0


@dataclass(frozen=True)
class Change(Estimate):
    """The difference after − before, its p-value, and the number of rows that score differently."""

    p: float | None = None
    moved: int | None = None


@dataclass(frozen=True)
class Measured:
    """Every metric of one set of rows, by name."""

    before: dict[str, Estimate] = field(default_factory=dict)
    after: dict[str, Estimate] = field(default_factory=dict)
    change: dict[str, Change] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    rows: int = 0
    too_few: bool = False


@dataclass(frozen=True)
class Group(Measured, Size):
    """Every metric on the rows of one group. In its JSON, the size comes first."""


@dataclass(frozen=True)
class Gap:
    """The largest difference of a metric between two groups after tuning. `flagged` means more than chance explains."""

    value: float = 0.0
    highest: str = ""
    lowest: str = ""
    p: float | None = None
    flagged: bool = False


@dataclass(frozen=True)
class Finding:
    """One value of a label of which rows may have several: what its metrics' names begin with, its prevalence, the share of
    reference texts that are read as the data say, {"before" or "after": {truth: {stated: rows}}}, and the share that CheXbert
    reads as the data say, None if it was not asked or knows no such finding."""

    slug: str = ""
    prevalence: Estimate = field(default_factory=Estimate)
    ceiling: float | None = None
    confusion: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    chexbert_ceiling: float | None = None


@dataclass(frozen=True)
class LabelTable:
    """How a label was read (see `LabelSpec`), its classes, all that was `stated`, the accuracy of always answering the
    commonest, {"before" or "after": {reference: {stated: rows}}}, and the `ceiling`: the accuracy of the reference texts, the
    most that a model can reach that writes as they do. Where rows may have several values, `findings` takes the place of the
    confusion."""

    values: list[str] | None = None
    pattern: str | None = None
    classes: list[str] = field(default_factory=list)
    stated: list[str] = field(default_factory=list)
    commonest_share: float | None = None
    confusion: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    ceiling: float | None = None
    findings: dict[str, Finding] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageUse:
    """How much the loss rises when every row gets the images of another row, before and after training; and the share of the
    gain in loss that remains with those images (None if there was no gain)."""

    before: Change = field(default_factory=Change)
    after: Change = field(default_factory=Change)
    gain_without: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The one conclusion that is drawn: about `metric`, on the held-out rows that are not also in training.

    `said` is empty if nothing was measured. `change` is that of `rows` rows of `units` units; `leaked` rows were left out.
    `constant` is the score of the best single answer given to every row, and `over_constant` how far the tuned model is from
    it; both are None for metrics that no single answer has. `different` counts the different answers of the tuned model.
    """

    metric: str = ""
    said: Said | None = None
    doubts: list[str] = field(default_factory=list)
    change: Change = field(default_factory=Change)
    rows: int = 0
    units: int = 0
    leaked: int = 0
    constant: float | None = None
    over_constant: Change | None = None
    different: int = 0


@dataclass(frozen=True)
class Requirement:
    """A bound of `evaluation.require`: its metric, whether it is met, and a sentence on both."""

    metric: str = ""
    met: bool = False
    said: str = ""


@dataclass(frozen=True)
class Settings:
    """Number of resamples and permutations, confidence level and seed."""

    bootstrap_samples: int = 0
    confidence: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Method(Settings):
    """How a comparison was made, of how many rows and units."""

    rows: int = 0
    units: int | None = None
    scorers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison(Measured):
    """The content of `metrics.json`: groups by column and value, gaps by column and metric, and labels by name."""

    groups: dict[str, dict[str, Group]] = field(default_factory=dict)
    gaps: dict[str, dict[str, Gap]] = field(default_factory=dict)
    labels: dict[str, LabelTable] = field(default_factory=dict)
    image_use: ImageUse | None = None
    verdict: Verdict = field(default_factory=Verdict)
    settings: Method = field(default_factory=Method)


def from_json(kind: type[T], tree: Any) -> T:
    """Read a dataclass from JSON, of earlier versions too: a missing or null key has its default, an unknown one is ignored."""
    if get_origin(kind) is UnionType:  # `X | None`
        kind = next(each for each in get_args(kind) if each is not NoneType)
    if is_dataclass(kind):
        types = _types(kind)
        known = {name: value for name, value in tree.items() if name in types and value is not None}
        return kind(**{name: from_json(types[name], value) for name, value in known.items()})
    if get_origin(kind) is dict:
        tree = {name: from_json(get_args(kind)[1], value) for name, value in tree.items()}
    if get_origin(kind) is list and is_dataclass(get_args(kind)[0]):
        tree = [from_json(get_args(kind)[0], value) for value in tree]
    return tree  # type: ignore[no-any-return]


_types = cache(get_type_hints)
