"""Makes a plan from a spec and facts, as a pure function. `check` prints the very plan that `run` executes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from job.config.schema import JobSpec
from job.errors import SpecError
from job.layout import RESULT_KEY, answers_key, partial_key
from job.model.families import family_of
from job.model.lora_targets import GROUPS, left_alone, parameters, targets
from job.model.memory_model import Kept, Memory, last_cure
from job.planning.batch_fit import by_unsloth, fits, fitted, held_precision, share_of_batch, thriftier
from job.planning.compile import compiles
from job.planning.device_memory import answer_batch, gate_room, stage_memory
from job.planning.facts import Facts
from job.planning.needs import Training, checkpoint_bytes, room_for_features
from job.planning.sharding import refuse_many, sharded, shared_precision
from job.planning.shortage import Foreseen, foresee
from job.planning.warnings import short_of, warnings

Action = Literal["do", "resume", "skip"]

NOTHING_KNOWN = Foreseen(True, (), ())


@dataclass(frozen=True)
class Stage:
    name: str
    action: Action
    detail: str = ""


@dataclass(frozen=True)
class Plan:
    """Sizes are in bytes; `micro_batch` × `accumulation` × `world` = the effective batch. `kept` is what stays on the device for
    the backward pass; `device_memory` is each stage's peak on a GPU; `answer_batch` is the rows generated at once; `gate_room` is
    the bytes of weights that the GPU holds while the gate runs a 16-bit model, None if it holds all. `shards` is the number of
    devices that share the base, 1 if each holds all of it. With `compile`, whole
    micro-batches of training use torch.compile. `features` is the room for the vision cache, None if free space is unknown."""

    stages: tuple[Stage, ...]
    total_steps: int | None
    micro_batch: int
    accumulation: int
    world: int
    precision: str
    kept: Kept
    shards: int = 1
    answer_batch: int = 8
    gate_room: int | None = None
    device_memory: dict[str, int] = field(default_factory=dict)
    compile: bool = False
    groups: dict[str, int] = field(default_factory=dict)
    left_alone: dict[str, int] = field(default_factory=dict)
    """The base's weights without adapters, by kind of layer."""
    estimates: dict[str, int] = field(default_factory=dict)
    foreseen: Foreseen = NOTHING_KNOWN
    features: int | None = None
    warnings: tuple[str, ...] = ()

    def action(self, name: str) -> Action:
        return next(stage.action for stage in self.stages if stage.name == name)


def make_plan(spec: JobSpec, facts: Facts) -> Plan:
    """Makes the plan for these facts. Raises SpecError if the model has no layers of a requested group, cannot have its rows in
    one batch, or cannot be trained on this many devices."""
    share = share_of_batch(spec, facts.world)
    groups, alone, chosen = dict[str, int](), dict[str, int](), list[str]()
    if facts.base is not None:
        chosen = targets(spec.lora, facts.base.linears, facts.base.tables)
        counts, alone = parameters(spec.lora.r, facts.base.linears, chosen), left_alone(facts.base.matrices, chosen)
        groups = {name: counts[name] for name in (*GROUPS, "other") if name in counts}
    precision = held_precision(spec, facts, groups)
    kept, memory, micro = fitted(spec, facts, groups, precision, share)
    if (shared := sharded(spec, facts, memory)) is not None:
        facts, precision = shared, shared_precision(spec, facts)
        kept, memory, micro = fitted(spec, facts, groups, precision, share)
    cure = thriftier(kept, unsloth=by_unsloth(spec, facts))
    refuse_many(spec, facts, memory, cure + last_cure(precision))
    answered = answer_batch(spec, facts, groups, precision)
    spec = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"batch_size": answered})})
    _refuse_mixed_batches(spec, facts, micro)
    total = total_steps(spec, facts.data.train) if facts.data else None
    trainable = facts.device is not None and fits(memory, facts.device, 1)  # what does not fit has its own warning
    room = gate_room(spec, facts, groups, precision) if trainable else None
    todo, foreseen = stages(spec, facts, total), NOTHING_KNOWN
    if RESULT_KEY not in facts.keys:
        done = next(stage.action for stage in todo if stage.name == "train") == "skip"
        training = Training(sum(groups.values()), precision, memory, micro, kept, total, done)
        foreseen = foresee(spec, facts, training)
    return Plan(
        stages=tuple(todo),
        total_steps=total,
        micro_batch=micro,
        accumulation=share // micro,
        world=facts.world,
        shards=facts.shards,
        precision=precision,
        kept=kept,
        answer_batch=answered,
        gate_room=room,
        device_memory=stage_memory(spec, facts, groups, precision, memory, micro, room),
        compile=compiles(spec, facts, total),
        groups=groups,
        left_alone=alone,
        estimates=estimates(spec, facts, groups, memory, micro),
        foreseen=foreseen,
        features=room_for_features(spec, facts, foreseen.needs),
        warnings=(*warnings(spec, facts, chosen, total, memory, cure, precision), *short_of(foreseen)),
    )


def apply_plan(spec: JobSpec, plan: Plan) -> JobSpec:
    """Returns the spec with `auto` resolved for `export.scratch_copy` and `evaluation.batch_size`. Its digest stays, since these
    fields affect no result."""
    export = spec.export.model_copy(update={"scratch_copy": plan.foreseen.scratch_copy})
    evaluation = spec.evaluation.model_copy(update={"batch_size": plan.answer_batch})
    return spec.model_copy(update={"export": export, "evaluation": evaluation})


def _refuse_mixed_batches(spec: JobSpec, facts: Facts, micro: int) -> None:
    """Raises SpecError if rows without images would share a batch of a cross-attention model and attend to padding."""
    without = facts.data.without_images if facts.data else 0
    family = family_of(facts.base.model_type if facts.base else "")
    mixed = facts.data is not None and 0 < without < facts.data.train
    if family.cross_attention and mixed and max(micro, spec.evaluation.batch) > 1:
        raise SpecError(
            f"training.per_device_train_batch_size, evaluation.batch_size: {without} rows have no image, and "
            f"cannot share a batch of {family.name} with rows that have one; set both to 1"
        )


def total_steps(spec: JobSpec, rows: int) -> int:
    """Total optimizer steps; the last step of an epoch may be short, as in transformers."""
    total = math.ceil(rows / spec.training.effective_batch_size) * spec.training.num_train_epochs
    return min(total, spec.training.max_steps) if spec.training.max_steps else total


def stages(spec: JobSpec, facts: Facts, total: int | None) -> list[Stage]:
    """Returns the stages in order, each with do, resume or skip, and why."""
    if RESULT_KEY in facts.keys:
        names = ("stage in", "load", "evaluate before", "train", "evaluate after", "export", "publish")
        return [Stage(name, "skip", "already published") for name in names]
    done = total is not None and total in facts.checkpoints
    if spec.evaluation.patience and answers_key("after") in facts.keys:
        done = True  # training ended before its last step
    kinds = {
        "merged weights": "merged",
        "the same in 4 bits": "merged_4bit",
        "the same in FP8": "merged_fp8",
        "the same in INT4": "merged_int4",
        "GGUF": "gguf",
    }
    what = ", ".join(["adapter", *(name for name, field in kinds.items() if getattr(spec.export, field))])
    return [
        Stage("stage in", "do", "base model and data"),
        Stage("load", "do", spec.model.name_or_path),
        _evaluation("before", facts, spec),
        _training(facts, total, done),
        _evaluation("after", facts if done else Facts(data=facts.data), spec),
        Stage("export", "do", what),
        Stage("publish", "do", spec.output.url),
    ]


def _evaluation(when: str, facts: Facts, spec: JobSpec) -> Stage:
    name, held_out = f"evaluate {when}", facts.data and facts.data.evaluation
    if held_out == 0:
        return Stage(name, "skip", "no held-out rows")
    if answers_key(when) in facts.keys:
        return Stage(name, "skip", "already measured")
    if partial_key(when) in facts.keys:
        return Stage(name, "resume", "some rows are answered")
    return Stage(name, "do", f"{min(held_out, spec.evaluation.max_rows)} rows" if held_out else "")


def _training(facts: Facts, total: int | None, done: bool) -> Stage:
    steps = f"{total} steps" if total is not None else "steps not known yet"
    if done:
        return Stage("train", "skip", f"step {max(facts.checkpoints, default=total)} is saved")
    if facts.checkpoints:
        return Stage("train", "resume", f"from step {max(facts.checkpoints)} of {steps}")
    return Stage("train", "do", steps)


def estimates(spec: JobSpec, facts: Facts, groups: dict[str, int], memory: Memory | None, micro: int) -> dict[str, int]:
    """Returns sizes in bytes, as far as they are known before anything runs."""
    if facts.base is None or memory is None:
        return {}
    sizes = {"weights in memory": memory.weights}
    if facts.device is not None and facts.device.kind == "cuda":
        sizes |= {"adapters, gradients, optimizer, buffers": memory.training, "each row of a micro-batch": memory.row}
        sizes["GPU memory in all"] = memory.of(micro)
    sizes["one checkpoint"] = checkpoint_bytes(spec, sum(groups.values()))
    if spec.export.merged:
        sizes["merged weights"] = facts.base.bytes
    return sizes
