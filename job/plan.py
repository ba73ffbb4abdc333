"""Pure: a spec and the facts → what will be done. `check` prints the very plan that `run` executes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from job.model.fetch import BaseFacts
from job.model.lora import GROUPS, parameters, targets
from job.record import bytes_text
from job.serving import servers
from job.spec import JobSpec

Action = Literal["do", "resume", "skip"]

BYTES_PER_WEIGHT = {"4bit": 0.6, "16bit": 2.0, "32bit": 4.0}
"""nf4 with double quantisation holds 4.13 bits a weight; embeddings and the vision tower's norms stay in 16 bits."""
BYTES_PER_LORA_PARAMETER = 16
"""fp32 weight, gradient and AdamW's two moments."""
CHECKPOINT_BYTES_PER_LORA_PARAMETER = 12
"""fp32 weight and AdamW's two moments."""


@dataclass(frozen=True)
class Device:
    """Where the model will run. `memory` in bytes: the GPU's, or the machine's for a CPU."""

    kind: Literal["cuda", "cpu"]
    name: str
    memory: int


@dataclass(frozen=True)
class Facts:
    """What one look at the world found. None means not known here (another machine, a library not installed)."""

    keys: frozenset[str] = frozenset()
    checkpoints: tuple[int, ...] = ()
    data: dict[str, Any] | None = None
    base: BaseFacts | None = None
    device: Device | None = None
    scratch_free: int = 0
    example: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    name: str
    action: Action
    detail: str = ""


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes; `micro_batch` × `accumulation` = the effective batch."""

    stages: tuple[Stage, ...]
    total_steps: int | None
    micro_batch: int
    accumulation: int
    precision: str
    groups: dict[str, int] = field(default_factory=dict)
    estimates: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def action(self, name: str) -> Action:
        return next(stage.action for stage in self.stages if stage.name == name)


def make_plan(spec: JobSpec, facts: Facts) -> Plan:
    """The plan for these facts. Raises SpecError when the model has no layers of a group asked for."""
    micro = micro_batch(spec, facts.device)
    precision = held_precision(spec, facts)
    total = total_steps(spec, facts.data["train"], micro) if facts.data else None
    groups: dict[str, int] = {}
    if facts.base is not None:
        counts = parameters(spec.lora.r, facts.base.linears, targets(spec.lora, facts.base.linears))
        groups = {name: counts[name] for name in (*GROUPS, "other") if name in counts}
    return Plan(
        stages=tuple(stages(spec, facts, total)),
        total_steps=total,
        micro_batch=micro,
        accumulation=spec.training.effective_batch_size // micro,
        precision=precision,
        groups=groups,
        estimates=estimates(facts, precision, sum(groups.values()), spec.export.merged),
        warnings=tuple(warnings(spec, facts, total)),
    )


def micro_batch(spec: JobSpec, device: Device | None) -> int:
    """Samples per forward pass: the largest divisor of the effective batch that is at most 8 (2 on cards under 40 GB)."""
    given, effective = spec.training.per_device_train_batch_size, spec.training.effective_batch_size
    if given != "auto":
        return given
    small = device is not None and device.kind == "cuda" and device.memory < 40e9
    most = 2 if small else 8
    return max(size for size in range(1, most + 1) if effective % size == 0)


def held_precision(spec: JobSpec, facts: Facts) -> str:
    """`auto` resolved: 32bit on a CPU; 16bit on a GPU that holds it twice over, else 4bit."""
    if spec.model.precision != "auto":
        return spec.model.precision
    if facts.device is None or facts.device.kind == "cpu":
        return "32bit"
    weights = facts.base.parameters * BYTES_PER_WEIGHT["16bit"] if facts.base else 0
    return "16bit" if weights * 2 < facts.device.memory else "4bit"


def total_steps(spec: JobSpec, rows: int, micro: int) -> int:
    """Optimizer steps in all; the last step of an epoch may be short, as in transformers."""
    accumulation = spec.training.effective_batch_size // micro
    per_epoch = math.ceil(math.ceil(rows / micro) / accumulation)
    total = per_epoch * spec.training.num_train_epochs
    return min(total, spec.training.max_steps) if spec.training.max_steps else total


def stages(spec: JobSpec, facts: Facts, total: int | None) -> list[Stage]:
    """The flow of the house, each stage with do, resume or skip and why."""
    if "RESULT.json" in facts.keys:
        names = ("stage in", "load", "evaluate before", "train", "evaluate after", "export", "publish")
        return [Stage(name, "skip", "published already") for name in names]
    measured = facts.data is None or facts.data["evaluation"] > 0
    done = total is not None and total in facts.checkpoints
    kinds = {
        "merged weights": "merged",
        "the same in 4 bits": "merged_4bit",
        "the same in FP8": "merged_fp8",
        "GGUF": "gguf",
    }
    what = ", ".join(["adapter", *(name for name, field in kinds.items() if getattr(spec.export, field))])
    return [
        Stage("stage in", "do", "base model and data"),
        Stage("load", "do", spec.model.name_or_path),
        _evaluation("before", facts, measured),
        _training(facts, total, done),
        _evaluation("after", facts, measured) if done else _evaluation("after", Facts(), measured),
        Stage("export", "do", what),
        Stage("publish", "do", spec.output.url),
    ]


def _evaluation(when: str, facts: Facts, measured: bool) -> Stage:
    name = f"evaluate {when}"
    if not measured:
        return Stage(name, "skip", "no held-out rows")
    if f"evaluation/{when}.jsonl" in facts.keys:
        return Stage(name, "skip", "measured already")
    if f"evaluation/{when}.partial.jsonl" in facts.keys:
        return Stage(name, "resume", "some rows are done")
    return Stage(name, "do", f"{facts.data['evaluation']} rows" if facts.data else "")


def _training(facts: Facts, total: int | None, done: bool) -> Stage:
    steps = f"{total} steps" if total is not None else "steps not known yet"
    if done:
        return Stage("train", "skip", f"step {total} is saved")
    if facts.checkpoints:
        return Stage("train", "resume", f"from step {max(facts.checkpoints)} of {steps}")
    return Stage("train", "do", steps)


def estimates(facts: Facts, precision: str, lora: int, merged: bool) -> dict[str, int]:
    """Rough sizes in bytes, by the constants above; activations are not in them."""
    if facts.base is None:
        return {}
    weights = int(facts.base.parameters * BYTES_PER_WEIGHT[precision])
    sizes = {
        "weights in memory": weights,
        "adapter, gradients and optimizer": lora * BYTES_PER_LORA_PARAMETER,
        "one checkpoint": lora * CHECKPOINT_BYTES_PER_LORA_PARAMETER,
    }
    if merged:
        sizes["merged weights"] = facts.base.bytes
    return sizes


def warnings(spec: JobSpec, facts: Facts, total: int | None) -> list[str]:
    """What a careful colleague would say before this runs."""
    found = list(facts.notes)
    if facts.data is not None:
        if facts.data["evaluation"] == 0:
            found.append("no rows are held out, so nothing will be measured")
        elif facts.data["evaluation"] < 20:
            found.append(f"only {facts.data['evaluation']} rows are held out: intervals will be wide")
        if facts.data.get("same_in_both"):
            found.append(f"{facts.data['same_in_both']} groups or images are in both training and held-out rows")
        if spec.dataset.group_column is None and not (spec.dataset.eval_path or spec.dataset.eval_split):
            found.append("dataset.group_column is not set: rows of one patient may be on both sides of the split")
        if facts.data["quarantined"]:
            found.append(f"{facts.data['quarantined']} bad rows are set aside (data/quarantine.jsonl)")
    if total is not None and spec.checkpoint.save_steps > total:
        found.append(
            f"checkpoint.save_steps {spec.checkpoint.save_steps} is over the {total} steps: one save, at the end"
        )
    sizes = estimates(facts, held_precision(spec, facts), 0, spec.export.merged)
    if facts.device is not None and sizes and sizes["weights in memory"] > 0.9 * facts.device.memory:
        found.append(
            f"the weights ({bytes_text(sizes['weights in memory'])}) will not fit {facts.device.name} "
            f"({bytes_text(facts.device.memory)}); set model.precision to 4bit or take a larger card"
        )
    need = sizes.get("merged weights", 0) if spec.export.scratch_copy else 0
    if facts.scratch_free and need > facts.scratch_free:
        found.append(
            f"merged weights need {bytes_text(need)} of scratch, {bytes_text(facts.scratch_free)} are free; "
            "set export.scratch_copy to false, or point JOB_SCRATCH at a larger disk"
        )
    return found


def describe(spec: JobSpec, plan: Plan, facts: Facts) -> str:
    """The plan for people."""
    lines = [f"plan for {spec.name} → {spec.output.url}"]
    lines += [f"  {stage.name:<16} {stage.action:<7} {stage.detail}" for stage in plan.stages]
    if facts.data is not None:
        data = facts.data
        lines.append(
            f"data: {data['rows']} rows ({data['source']}): {data['train']} to train on, "
            f"{data['evaluation']} held out, {data['quarantined']} set aside"
        )
    batch = spec.training.effective_batch_size
    lines.append(f"batch: {batch} = {plan.micro_batch} at once × {plan.accumulation} accumulated")
    if facts.base is not None:
        base = facts.base
        lines.append(f"base: {base.architecture}, {base.parameters:,} parameters, held in {plan.precision}")
        lines.append(f"merged weights are served by: {servers(base.model_type)}")
    if plan.groups:
        trained = sum(plan.groups.values())
        share = f" ({100 * trained / facts.base.parameters:.2f} % of the base)" if facts.base else ""
        lines.append(f"LoRA: {trained:,} trainable parameters{share}")
        lines += [f"  {group:<20} {count:>12,}" for group, count in plan.groups.items()]
    lines += [f"estimate: {name} {bytes_text(size)}" for name, size in plan.estimates.items()]
    if facts.device is not None:
        lines.append(f"device: {facts.device.name}, {bytes_text(facts.device.memory)}")
    if facts.example is not None:
        lines += ["example (the loss is taken over ⟦…⟧ only):", *(f"  {line}" for line in facts.example.splitlines())]
    lines += [f"warning: {warning}" for warning in plan.warnings]
    return "\n".join(lines)
