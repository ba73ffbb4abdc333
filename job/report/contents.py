"""Defines what the report and the model cards show, and which part of it is stored in `evaluation/report.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from job.evaluate.records import Answer, Comparison, Maps, Requirement, Sample

Numbers = Mapping[str, float]
"""A line of `logs/metrics.jsonl`."""
KEPT = (
    "name",
    "plan",
    "lineage",
    "gate",
    "occlusion",
    "data",
    "privacy",
    "base",
    "instruction",
    "unwritten",
    "requirements",
)
"""The fields stored in `evaluation/report.json`. Other files of the output hold the rest."""
PARENT = ("parent_adapter", "parent_sha256")
"""Fields that are stored only if the run started from an adapter."""


@dataclass(frozen=True)
class Lineage:
    """Where a result comes from, including the adapter that training started from, if any."""

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
    written: str | None = None
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
    """Everything that the report and the model cards are made from. They leave out what is missing.

    `plan`, `gate` and `data` are nested names and values, which are listed as they are. Two entries have a further use: the
    report shows first why the job was `refused` (in `gate`), and its heading gives the number of rows to `train` on (in `data`).
    `left_out` names the settings of the base model's `generation_config.json` that would change answers, and are not used.
    `system`, `date`, `unwritten` and `bounds` are those of `job.export.serving.Serving`.
    """

    name: str = ""
    plan: Mapping[str, object] = field(default_factory=dict)
    requirements: list[Requirement] = field(default_factory=list)
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
        """Returns the fields in `KEPT` as JSON, which `from_json` reads again."""
        tree = asdict(self, dict_factory=lambda pairs: {k: v for k, v in pairs if v is not None or k not in PARENT})
        return {name: tree[name] for name in KEPT}
