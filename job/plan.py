"""Pure: a spec and the facts → what will be done. `check` prints the very plan that `run` executes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from job.errors import SpecError
from job.facts import Facts
from job.model.lora import GROUPS, parameters, targets
from job.model.memory import Kept, Memory, last_cure, weight_bytes
from job.planning.compile import can_compile, compiles, compiling_text
from job.planning.describe import describe_needs
from job.planning.device_memory import answer_batch, gate_room, offload_seconds, stage_memory
from job.planning.needs import Training, checkpoint_bytes, room_for_features
from job.planning.shortage import Foreseen, foresee
from job.preemption import FITS
from job.record import bytes_text
from job.room import by_unsloth, fits, fitted, held_precision, refuse_many, share_of_batch, thriftier
from job.serving import servers
from job.spec import JobSpec

Action = Literal["do", "resume", "skip"]

SIZES = ("smallest", "median", "largest")
KEPT_TEXT = {
    "all": "all that layers compute (nothing is computed again)",
    "inputs": "the layers' inputs (the rest is computed again)",
    "nothing": "nothing (the layers' inputs wait in the host's memory, the rest is computed again)",
}

NOTHING_KNOWN = Foreseen(True, (), ())


@dataclass(frozen=True)
class Stage:
    name: str
    action: Action
    detail: str = ""


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes; `micro_batch` × `accumulation` × `world` = the effective batch. `kept` is what stays on the device for
    the backward; `device_memory` the peak of each stage on a GPU; `answer_batch` the rows generated at once;
    `gate_room` the bytes of weights that the GPU holds while the
    gate asks a model in 16 bits, None where it holds all. With `compile`, whole micro-batches of training go through
    torch.compile. `features` is the room for those of a frozen vision tower, None where what is free is not known."""

    stages: tuple[Stage, ...]
    total_steps: int | None
    micro_batch: int
    accumulation: int
    world: int
    precision: str
    kept: Kept
    answer_batch: int = 8
    gate_room: int | None = None
    device_memory: dict[str, int] = field(default_factory=dict)
    compile: bool = False
    groups: dict[str, int] = field(default_factory=dict)
    estimates: dict[str, int] = field(default_factory=dict)
    foreseen: Foreseen = NOTHING_KNOWN
    features: int | None = None
    warnings: tuple[str, ...] = ()

    def action(self, name: str) -> Action:
        return next(stage.action for stage in self.stages if stage.name == name)


def make_plan(spec: JobSpec, facts: Facts) -> Plan:
    """The plan for these facts. Raises SpecError when the model has no layers of a group asked for, cannot have its rows
    in one batch, or cannot be trained on so many devices."""
    share = share_of_batch(spec, facts.world)
    groups: dict[str, int] = {}
    if facts.base is not None:
        counts = parameters(spec.lora.r, facts.base.linears, targets(spec.lora, facts.base.linears))
        groups = {name: counts[name] for name in (*GROUPS, "other") if name in counts}
    precision = held_precision(spec, facts, groups)
    kept, memory, micro = fitted(spec, facts, groups, precision, share)
    cure = thriftier(kept, unsloth=by_unsloth(spec, facts))
    refuse_many(facts, memory, cure + last_cure(precision))
    answered = answer_batch(spec, facts, groups, precision)
    spec = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"batch_size": answered})})
    _refuse_mixed_batches(spec, facts, micro)
    total = total_steps(spec, facts.data["train"]) if facts.data else None
    trainable = facts.device is not None and fits(memory, facts.device, 1)  # what does not fit has its own warning
    room = gate_room(spec, facts, groups, precision) if trainable else None
    todo, foreseen = stages(spec, facts, total), NOTHING_KNOWN
    if "RESULT.json" not in facts.keys:
        done = next(stage.action for stage in todo if stage.name == "train") == "skip"
        training = Training(sum(groups.values()), precision, memory, micro, kept, total, done)
        foreseen = foresee(spec, facts, training)
    return Plan(
        stages=tuple(todo),
        total_steps=total,
        micro_batch=micro,
        accumulation=share // micro,
        world=facts.world,
        precision=precision,
        kept=kept,
        answer_batch=answered,
        gate_room=room,
        device_memory=stage_memory(spec, facts, groups, precision, memory, micro, room),
        compile=compiles(spec, facts, total),
        groups=groups,
        estimates=estimates(spec, facts, groups, memory, micro),
        foreseen=foreseen,
        features=room_for_features(spec, facts, foreseen.needs),
        warnings=(*warnings(spec, facts, total, memory, cure, precision), *short_of(foreseen)),
    )


def decided(spec: JobSpec, plan: Plan) -> JobSpec:
    """The spec with what `auto` of `export.scratch_copy` and of `evaluation.batch_size` became. Its digest stays, since these
    fields decide no result."""
    export = spec.export.model_copy(update={"scratch_copy": plan.foreseen.scratch_copy})
    evaluation = spec.evaluation.model_copy(update={"batch_size": plan.answer_batch})
    return spec.model_copy(update={"export": export, "evaluation": evaluation})


def _refuse_mixed_batches(spec: JobSpec, facts: Facts, micro: int) -> None:
    """mllama looks at images beside the text, not in it: a row without would look at what is padding."""
    without = facts.data.get("without_images", 0) if facts.data else 0
    mllama = facts.base is not None and facts.base.model_type == "mllama"
    if mllama and facts.data and 0 < without < facts.data["train"] and max(micro, spec.evaluation.batch) > 1:
        raise SpecError(
            f"training.per_device_train_batch_size, evaluation.batch_size: {without} rows have no image and the others have, "
            "which cannot share a batch of Llama 3.2 Vision; set both to 1"
        )


def total_steps(spec: JobSpec, rows: int) -> int:
    """Optimizer steps in all; the last step of an epoch may be short, as in transformers."""
    total = math.ceil(rows / spec.training.effective_batch_size) * spec.training.num_train_epochs
    return min(total, spec.training.max_steps) if spec.training.max_steps else total


def stages(spec: JobSpec, facts: Facts, total: int | None) -> list[Stage]:
    """The flow of the house, each stage with do, resume or skip and why."""
    if "RESULT.json" in facts.keys:
        names = ("stage in", "load", "evaluate before", "train", "evaluate after", "export", "publish")
        return [Stage(name, "skip", "published already") for name in names]
    measured = facts.data is None or facts.data["evaluation"] > 0
    done = total is not None and total in facts.checkpoints
    if spec.evaluation.patience and "evaluation/after.jsonl" in facts.keys:
        done = True  # training was over before its last step
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
        _evaluation("before", facts, measured),
        _training(facts, total, done),
        _evaluation("after", facts if done else Facts(data=facts.data), measured),
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
        return Stage("train", "skip", f"step {max(facts.checkpoints, default=total)} is saved")
    if facts.checkpoints:
        return Stage("train", "resume", f"from step {max(facts.checkpoints)} of {steps}")
    return Stage("train", "do", steps)


def estimates(spec: JobSpec, facts: Facts, groups: dict[str, int], memory: Memory | None, micro: int) -> dict[str, int]:
    """Sizes in bytes, as far as they are known before anything runs."""
    if facts.base is None or memory is None:
        return {}
    sizes = {"weights in memory": memory.weights}
    if facts.device is not None and facts.device.kind == "cuda":
        sizes |= {"adapters, gradients, optimizer, buffers": memory.training, "each row at once": memory.row}
        sizes["GPU memory in all"] = memory.of(micro)
    sizes["one checkpoint"] = checkpoint_bytes(spec, sum(groups.values()))
    if spec.export.merged:
        sizes["merged weights"] = facts.base.bytes
    return sizes


def warnings(
    spec: JobSpec, facts: Facts, total: int | None, memory: Memory | None, cure: str, precision: str
) -> list[str]:
    """What a careful colleague would say before this runs; `cure` comes first where memory is short in this `precision`."""
    found = list(facts.notes)
    if facts.data is not None:
        if facts.data["evaluation"] == 0:
            found.append("no rows are held out, so nothing will be measured")
        elif facts.data["evaluation"] < 20:
            found.append(f"only {facts.data['evaluation']} rows are held out: intervals will be wide")
        found += _data_warnings(spec, facts.data)
    if spec.evaluation.take == "best" or spec.evaluation.patience:
        found.append(
            "the step is chosen by its loss on rows that the result is measured on too, which flatters it a little; keep "
            "rows apart that this job never sees"
        )
    if facts.checkpoint_seconds is not None and facts.checkpoint_seconds > FITS * facts.grace_seconds:
        found.append(
            f"a checkpoint took {facts.checkpoint_seconds:.0f} s to become safe in an earlier attempt, and a notice leaves "
            f"{facts.grace_seconds:.0f} s (JOB_GRACE_SECONDS): give more time, or lower checkpoint.save_steps"
        )
    if total is not None and spec.checkpoint.save_steps > total:
        found.append(
            f"checkpoint.save_steps {spec.checkpoint.save_steps} is over the {total} steps: one save, at the end"
        )
    device = facts.device
    if device is not None and device.kind == "cuda" and memory is not None and not fits(memory, device, 1):
        found.append(
            f"one row at once needs about {bytes_text(memory.of(1))} ({bytes_text(memory.weights)} of it weights), and "
            f"{device.name} has {bytes_text(device.memory)}; {cure}shrink images with "
            f"dataset.image_max_side, {last_cure(precision)}"
        )
    return found


def short_of(foreseen: Foreseen) -> list[str]:
    """What `run` refuses is only told here: `check` may look from a machine on which the job will not run."""
    return [f"run refuses this here: {each.text}" if each.sure else each.text for each in foreseen.shortages]


def _describe_data(data: dict[str, Any]) -> list[str]:
    lines = [
        f"data: {data['rows']} rows ({data['source']}): {data['train']} to train on, "
        f"{data['evaluation']} held out, {data['quarantined']} set aside"
    ]
    if "looked_at" in data:
        lines[0] += f"; of {data['looked_at']} rows looked at, and the rest in proportion (check --data looks at all)"
    lines += [f"  set aside: {count} × {reason}" for reason, count in data.get("reasons", {}).items()]
    if "images" in data:
        sizes = ", ".join(f"{name} {data['images'][name][0]}×{data['images'][name][1]}" for name in SIZES)
        lines.append(f"  images: {data['images']['count']}, {sizes}")
    if "tokens" in data:
        lines.append(f"  tokens a row: median {data['tokens']['median']}, longest {data['tokens']['longest']}")
    return lines


def _data_warnings(spec: JobSpec, data: dict[str, Any]) -> list[str]:
    found = []
    if data.get("same_in_both"):
        found.append(f"{data['same_in_both']} groups or images are in both training and held-out rows")
    if data.get("near_duplicates"):
        found.append(
            f"{data['near_duplicates']} held-out pictures are nearly the same as one to train on (data/near_duplicates.jsonl)"
        )
    if not (data.get("grouped") or spec.dataset.group_column) and not (
        spec.dataset.eval_path or spec.dataset.eval_split
    ):
        found.append("dataset.group_column is not set: rows of one patient may be on both sides of the split")
    if data["quarantined"]:
        found.append(f"bad rows set aside: {data['quarantined']} (data/quarantine.jsonl)")
    if data.get("over_length"):
        found.append(f"{data['over_length']} rows are over training.max_length: their answers are cut there")
    if data.get("burned_in_yes"):
        found.append(f"{data['burned_in_yes']} rows say that words are burned into their pixels: look for names")
    if data.get("burned_in_maybe"):
        found.append(
            f"{data['burned_in_maybe']} rows do not say whether names are burned into their pixels, and may have them"
        )
    return found


def describe(spec: JobSpec, plan: Plan, facts: Facts) -> str:
    """The plan for people."""
    lines = [f"plan for {spec.name} → {spec.output.url}"]
    lines += [f"  {stage.name:<16} {stage.action:<7} {stage.detail}" for stage in plan.stages]
    if facts.data is not None:
        lines += _describe_data(facts.data)
    batch = spec.training.effective_batch_size
    devices = f" × {plan.world} devices" if plan.world > 1 else ""
    lines.append(f"batch: {batch} = {plan.micro_batch} at once × {plan.accumulation} accumulated{devices}")
    lines.append(f"answers: {plan.answer_batch} rows at once")
    if facts.base is not None:
        base = facts.base
        lines.append(f"base: {base.architecture}, {base.parameters:,} parameters, held in {plan.precision}")
        lines.append(f"merged weights are served by: {servers(base.model_type)}")
    if plan.groups:
        trained = sum(plan.groups.values())
        share = f" ({100 * trained / facts.base.parameters:.2f} % of the base)" if facts.base else ""
        lines.append(f"LoRA: {trained:,} trainable parameters{share}")
        lines += [f"  {group:<20} {count:>12,}" for group, count in plan.groups.items()]
    if facts.base is not None and facts.device is not None and facts.device.kind == "cuda":
        lines.append(f"kept on the GPU for the backward: {KEPT_TEXT[plan.kept]}")
    if plan.gate_room is not None and facts.base is not None:
        weights = weight_bytes(facts.base, "16bit")
        lines.append(
            f"gate: of {bytes_text(weights)} of weights in 16 bits the GPU holds {bytes_text(plan.gate_room)}; the others come "
            f"out of host memory, for about {offload_seconds(spec, weights, plan.gate_room):.0f} s in all"
        )
    if can_compile(spec, facts):
        lines.append(compiling_text(spec, facts, plan.total_steps))
    lines += [f"estimate: {name} {bytes_text(size)}" for name, size in plan.estimates.items()]
    lines += describe_needs(plan.foreseen.needs, facts.limits, plan.device_memory)
    if spec.export.merged and not plan.foreseen.scratch_copy:
        lines.append("merged weights go straight to the output")
    if facts.device is not None:
        lines.append(f"device: {facts.device.name}, {bytes_text(facts.device.memory)}")
    if facts.example is not None:
        lines += ["example (the loss is taken over ⟦…⟧ only):", *(f"  {line}" for line in facts.example.splitlines())]
    lines += [f"warning: {warning}" for warning in plan.warnings]
    return "\n".join(lines)
