"""Decides whether the ranks share the base's weights among them. Pure, like the plan."""

from __future__ import annotations

from dataclasses import replace

from job.config.schema import JobSpec
from job.errors import SpecError
from job.model.base_model import BaseFacts
from job.model.families import FAMILIES, family_of
from job.model.lora_targets import parameters, targets
from job.model.memory_model import Memory, card_bytes, weight_bytes
from job.planning.batch_fit import kept_ways, needed_memory
from job.planning.facts import Device, Facts
from job.runtime.status import bytes_text


def sharded(spec: JobSpec, facts: Facts, memory: Memory | None) -> Facts | None:
    """Returns the facts of sharded training; None if each device holds the whole base, which needs `memory`. Raises SpecError if
    the spec asks for sharding and this model or these rows cannot have it."""
    given = spec.training.shard
    if given == "none" or facts.world == 1 or facts.base is None:
        return None
    why_not = _obstacle(facts.base, facts)
    if given == "fsdp" and why_not:
        raise SpecError(f"training.shard: {why_not}; set it to none")
    wanted = given == "fsdp" or (_outgrown(facts.device, memory) and spec.model.precision != "4bit")
    if not wanted or why_not or (given == "auto" and facts.backend == "unsloth"):
        return None
    return replace(facts, backend="transformers", shards=facts.world)


def refuse_many(spec: JobSpec, facts: Facts, memory: Memory | None, cure: str) -> None:
    """Raises SpecError if several devices cannot train this model, whole or sharded."""
    if facts.world == 1 or facts.base is None or not _outgrown(facts.device, memory):
        return
    assert facts.device is not None
    assert memory is not None
    held = f"its share of the model; use more GPUs, {cure}"
    if facts.shards == 1:
        why = _obstacle(facts.base, facts)
        if spec.training.shard == "none":
            why = "training.shard is none; set it to auto"
        elif spec.model.precision == "4bit":
            why = "a base in 4 bits is not sharded; set model.precision to 16bit"
        elif facts.backend == "unsloth":
            why = "Unsloth needs whole weights; set model.backend to transformers"
        held = f"the whole model, since {why}, or {cure}"
    raise SpecError(
        f"model.name_or_path: one row of {facts.base.architecture} needs about {bytes_text(memory.of(1))} "
        f"({bytes_text(memory.weights)} of it weights), and {facts.device.name} has {bytes_text(facts.device.memory)}; each of "
        f"the {facts.world} GPUs holds {held}"
    )


def shared_precision(spec: JobSpec, facts: Facts) -> str:
    """Resolves `auto` for a sharded base, which is never held in 4 bits."""
    if spec.model.precision != "auto":
        return spec.model.precision
    return "32bit" if facts.device is None or facts.device.kind == "cpu" else "16bit"


def backend_for(spec: JobSpec, backend: str, base: BaseFacts, device: Device, world: int) -> str:
    """Returns `transformers` in place of `unsloth`, which needs whole weights, if the base is to be sharded. A backend is
    imported before the rows are known, so `auto` asks whether a row of `training.max_length` tokens would fit."""
    given = spec.training.shard
    if backend != "unsloth" or spec.model.backend == "unsloth" or world == 1 or given == "none":
        return backend
    if given == "auto":
        facts = Facts(base=base, device=device, backend=backend, world=world)
        precision = "4bit" if spec.model.precision == "auto" else spec.model.precision
        groups = parameters(spec.lora.r, base.linears, targets(spec.lora, base.linears, base.tables))
        memory = needed_memory(spec, facts, groups, precision, kept_ways(spec, facts)[-1])
        if spec.model.precision == "4bit" or not _outgrown(device, memory) or _obstacle(base, facts):
            return backend
    return "transformers"


def sharding_text(base: BaseFacts, precision: str, shards: int, accumulation: int) -> str:
    """Describes in one line what each device holds and what sharding costs."""
    whole = weight_bytes(base, precision)
    moved = 2 * accumulation * (whole - whole // shards)
    return (
        f"sharded over {shards} devices: each holds {bytes_text(card_bytes(base, precision, shards))} of "
        f"{bytes_text(whole)} of weights, two layers being gathered, and receives up to {bytes_text(moved)} from the others in a "
        "step; trained by transformers + PEFT, since Unsloth needs whole weights"
    )


def _outgrown(device: Device | None, memory: Memory | None) -> bool:
    """Whether one row does not fit a GPU that holds the whole base."""
    return device is not None and device.kind == "cuda" and memory is not None and memory.of(1) > device.memory


def _obstacle(base: BaseFacts, facts: Facts) -> str:
    """Says why the base cannot be sharded; empty if it can."""
    family = family_of(base.model_type)
    if not family.whole:
        known = ", ".join(each.name for each in FAMILIES.values() if each.whole)
        return f"{base.architecture} is not sharded, only {known} are"
    without = facts.data.without_images if facts.data else 0
    if facts.data is not None and family.cross_attention and 0 < without < facts.data.rows:
        return f"{without} rows have no image, and skip layers of {family.name} on which the other ranks of a sharded model wait"
    return ""
