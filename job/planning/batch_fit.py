"""Chooses precision, micro-batch size and activation checkpointing to fit GPU memory. Pure, like the plan."""

from __future__ import annotations

from job.config.schema import JobSpec
from job.errors import SpecError
from job.model.memory_model import Kept, Memory, card_bytes
from job.model.memory_model import memory as model_memory
from job.planning.facts import Device, Facts

HEADROOM = 0.9
"""Share of GPU memory that the plan fills; the rest is for longer rows and fragmentation."""
MOST_AT_ONCE = 16
"""Rows in a micro-batch; more gain nothing on any GPU we know."""


def fitted(
    spec: JobSpec, facts: Facts, groups: dict[str, int], precision: str, share: int
) -> tuple[Kept, Memory | None, int]:
    """Returns what is kept on the device for the backward pass, the memory this takes, and the micro-batch size. The largest
    micro-batch comes first, since its rows share the cost of a pass; then keeping more, since less is recomputed."""
    ways = []
    for kept in kept_ways(spec, facts):
        memory = needed_memory(spec, facts, groups, precision, kept)
        ways.append((kept, memory, micro_batch(spec, facts.device, memory, share)))
    fitting = [way for way in ways if facts.device is None or fits(way[1], facts.device, way[2])]
    return max(fitting, key=lambda way: way[2]) if fitting else ways[-1]


def kept_ways(spec: JobSpec, facts: Facts) -> tuple[Kept, ...]:
    """Returns what may be kept on the device, the most first. On a GPU, keeping everything is an option only if asked for or
    where it was measured: on Unsloth without dropout, which keeps every adapted layer's input once more."""
    given, unsloth = spec.training.gradient_checkpointing, by_unsloth(spec, facts)
    least: Kept = "nothing" if unsloth else "inputs"
    if given != "auto":
        return ("all",) if given is False else ("inputs",) if given is True else (least,)
    if facts.device is None:
        return (least,)
    if facts.device.kind == "cpu":
        return ("all",)
    return ("all", "inputs", least) if unsloth and not spec.lora.lora_dropout else ("inputs", least)


def by_unsloth(spec: JobSpec, facts: Facts) -> bool:
    """Whether Unsloth trains; if the backend is unknown, whether the spec allows it."""
    return spec.model.by_unsloth if facts.backend is None else facts.backend == "unsloth"


def thriftier(kept: Kept, *, unsloth: bool) -> str:
    """Returns the first cure to name if memory is short, with a trailing comma; empty if no less can be kept."""
    if kept == "nothing" or (kept == "inputs" and not unsloth):
        return ""
    return f"set training.gradient_checkpointing to {'unsloth' if unsloth else 'true'}, "


def needed_memory(spec: JobSpec, facts: Facts, groups: dict[str, int], precision: str, kept: Kept) -> Memory | None:
    """Returns the memory that training needs for the longest row; None if the base is not here to be measured."""
    if facts.base is None:
        return None
    tokens, pictures = facts.longest_row(spec.training.max_length)
    memory = model_memory(
        facts.base.config,
        facts.base.linears,
        facts.base.parameters,
        groups,
        precision=precision,
        optim=spec.training.optim,
        unsloth=by_unsloth(spec, facts),
        kept=kept,
        tokens=tokens,
        pictures=pictures,
        learned=facts.most_learned(tokens),
    )
    return memory._replace(weights=card_bytes(facts.base, precision, facts.shards))


def fits(memory: Memory | None, device: Device, rows: int) -> bool:
    return memory is None or memory.of(rows) <= HEADROOM * device.memory


def share_of_batch(spec: JobSpec, world: int) -> int:
    """Returns the rows of a step that each device takes. Raises SpecError if they cannot be divided evenly."""
    given, effective = spec.training.per_device_train_batch_size, spec.training.effective_batch_size
    least = world if given == "auto" else world * given
    if effective % least:
        each = "" if given == "auto" else f" of per_device_train_batch_size {given}"
        raise SpecError(
            f"training.effective_batch_size: {effective} rows cannot be divided among {world} devices{each}; make it a "
            f"multiple of {least}"
        )
    return effective // world


def micro_batch(spec: JobSpec, device: Device | None, memory: Memory | None, share: int) -> int:
    """Rows per forward pass: the largest divisor of the device's share that fits GPU memory; at most 8 on a CPU."""
    given = spec.training.per_device_train_batch_size
    if given != "auto":
        return given
    if device is None or device.kind == "cpu":
        return max(size for size in range(1, 9) if share % size == 0)
    sizes = [size for size in range(1, MOST_AT_ONCE + 1) if share % size == 0]
    return max((size for size in sizes if fits(memory, device, size)), default=1)


def held_precision(spec: JobSpec, facts: Facts, groups: dict[str, int]) -> str:
    """Resolves `auto`: 32bit on a CPU; on a GPU 16bit, which is faster, if a micro-batch of four rows fits with it, else 4bit."""
    if spec.model.precision != "auto":
        return spec.model.precision
    if facts.device is None or facts.device.kind == "cpu":
        return "32bit"
    rows, least = min(4, share_of_batch(spec, facts.world)), kept_ways(spec, facts)[-1]
    return "16bit" if fits(needed_memory(spec, facts, groups, "16bit", least), facts.device, rows) else "4bit"
