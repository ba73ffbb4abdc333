"""Defines what the report and the model cards show, and the JSON of what no other file of the output holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from job.evaluate.records import Answer, Comparison, Maps, Sample

Numbers = Mapping[str, float]
"""A line of `logs/metrics.jsonl`."""
KEPT = ("name", "plan", "lineage", "gate", "occlusion", "data", "privacy", "base", "instruction", "unwritten")
"""The fields that `evaluation/report.json` holds."""
PARENT = ("parent_adapter", "parent_sha256")
"""Keys that only a run that started from an adapter has."""


@dataclass(frozen=True)
class Lineage:
    """The origin of a result, including the adapter that training started from, if any."""

    parent_adapter: str | None = None
    parent_sha256: str | None = None
    spec_digest: str | None = None
    base_model: str | None = None
    base_revision: str | None = None
    base_sha256: str | None = None
    dataset: str | None = None
    dataset_revision: str | None = None
    device: str | None = None
    image: str | None = None
    price_per_hour: str | None = None
    train_sha256: str | None = None
    held_out_sha256: str | None = None
    trained_steps: int | None = None
    taken_step: int | None = None
    taken: str | None = None
    attempts: int | None = None
    foreseen: Mapping[str, object] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    package_lock: str | None = None
    package_lock_sha256: str | None = None


@dataclass(frozen=True)
class Privacy:
    report_images: bool = True


@dataclass(frozen=True)
class BaseModel:
    name_or_path: str = ""
    model_type: str | None = None


@dataclass(frozen=True)
class Contents:
    """All that the report and the model cards are made from; what is missing is left out.

    `plan`, `gate` and `data` are names and values of any nesting, which are only listed, but for the number of rows to `train` on
    in the data, and for `refused` in the gate: a reason, which the report shows first. `left_out` are the settings of the base's
    generation that would change answers. `system`, `date`, `unwritten` and `bounds` are those of
    `job.export.serving.Serving`.
    """

    name: str = ""
    plan: Mapping[str, object] = field(default_factory=dict)
    lineage: Lineage = field(default_factory=Lineage)
    gate: Mapping[str, object] = field(default_factory=dict)
    occlusion: Maps = field(default_factory=dict)
    data: Mapping[str, object] = field(default_factory=dict)
    privacy: Privacy = field(default_factory=Privacy)
    base: BaseModel = field(default_factory=BaseModel)
    instruction: str | None = None
    metrics: Comparison = field(default_factory=Comparison)
    before: list[Answer] = field(default_factory=list)
    after: list[Answer] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    log: Sequence[Numbers] = field(default_factory=list)
    max_new_tokens: int = 128
    left_out: Sequence[str] = ()
    system: Any = None
    date: str | None = None
    unwritten: Sequence[str] = ()
    bounds: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads again, but for what other files hold."""
        tree = asdict(self, dict_factory=lambda pairs: {k: v for k, v in pairs if v is not None or k not in PARENT})
        return {name: tree[name] for name in KEPT}
