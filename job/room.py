"""What fits the card: the precision of the base, rows at once, and what is kept for the backward. Pure, as the plan is."""

from __future__ import annotations

from job.errors import SpecError
from job.facts import Device, Facts
from job.model import SUPPORTED
from job.model.memory import Kept, Memory
from job.model.memory import memory as model_memory
from job.record import bytes_text
from job.spec import JobSpec

HEADROOM = 0.9
"""Share of the card's memory that the plan fills: the rest is for longer rows and for what fragments."""
MOST_AT_ONCE = 16
"""Rows; more at once gain nothing on any card we know."""


def fitted(
    spec: JobSpec, facts: Facts, groups: dict[str, int], precision: str, share: int
) -> tuple[Kept, Memory | None, int]:
    """What is kept on the device for the backward, the memory that this takes, and the rows at once. As many rows as ever fit
    come first: they share what is done once a pass. Beside them, the more is kept the less is computed again."""
    ways = []
    for kept in kept_ways(spec, facts):
        memory = needed_memory(spec, facts, groups, precision, kept)
        ways.append((kept, memory, micro_batch(spec, facts.device, memory, share)))
    fitting = [way for way in ways if facts.device is None or fits(way[1], facts.device, way[2])]
    return max(fitting, key=lambda way: way[2]) if fitting else ways[-1]


def kept_ways(spec: JobSpec, facts: Facts) -> tuple[Kept, ...]:
    """What may be kept on the device, the most first. All of it on a GPU, unless asked for, only where that was measured: on
    Unsloth, and without dropout, which keeps every adapted layer's input once more."""
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
    """Whether Unsloth trains; where the backend is not known, whether the spec lets it."""
    return spec.model.by_unsloth if facts.backend is None else facts.backend == "unsloth"


def thriftier(kept: Kept, *, unsloth: bool) -> str:
    """The first cure to name where memory is short, with a comma behind it; nothing where no less can be kept."""
    if kept == "nothing" or (kept == "inputs" and not unsloth):
        return ""
    return f"set training.gradient_checkpointing to {'unsloth' if unsloth else 'true'}, "


def needed_memory(spec: JobSpec, facts: Facts, groups: dict[str, int], precision: str, kept: Kept) -> Memory | None:
    """What training will take, for the longest row; None when the base is not here to be measured."""
    if facts.base is None:
        return None
    tokens, pictures = facts.longest_row(spec.training.max_length)
    return model_memory(
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
    )


def fits(memory: Memory | None, device: Device, rows: int) -> bool:
    return memory is None or memory.of(rows) <= HEADROOM * device.memory


def share_of_batch(spec: JobSpec, world: int) -> int:
    """Rows of a step that each device takes. Raises SpecError when they cannot all take as many."""
    given, effective = spec.training.per_device_train_batch_size, spec.training.effective_batch_size
    least = world if given == "auto" else world * given
    if effective % least:
        each = "" if given == "auto" else f" of per_device_train_batch_size {given}"
        raise SpecError(
            f"training.effective_batch_size: {effective} rows cannot be dealt out to {world} devices{each}; make it a "
            f"multiple of {least}"
        )
    return effective // world


def refuse_many(facts: Facts, memory: Memory | None, cure: str) -> None:
    """Several devices share the rows, not the model; and the loss must be one that a whole step can be divided by."""
    device = facts.device
    if facts.world > 1 and facts.base and facts.base.model_type not in SUPPORTED:
        raise SpecError(
            f"model.name_or_path: whether a {facts.base.model_type} model divides its loss by the tokens of a whole step is "
            f"not known, so it trains on one device only; known are {', '.join(SUPPORTED.values())}"
        )
    if facts.world > 1 and device and device.kind == "cuda" and memory and memory.of(1) > device.memory and facts.base:
        raise SpecError(
            f"model.name_or_path: one row of {facts.base.architecture} needs about {bytes_text(memory.of(1))} "
            f"({bytes_text(memory.weights)} of it weights), and {device.name} has {bytes_text(device.memory)}; each of the "
            f"{facts.world} GPUs holds the whole model, since it is not sharded: {cure}"
        )


def micro_batch(spec: JobSpec, device: Device | None, memory: Memory | None, share: int) -> int:
    """Rows per forward pass: the largest divisor of the device's share that fits the card; at most 8 on a CPU."""
    given = spec.training.per_device_train_batch_size
    if given != "auto":
        return given
    if device is None or device.kind == "cpu":
        return max(size for size in range(1, 9) if share % size == 0)
    sizes = [size for size in range(1, MOST_AT_ONCE + 1) if share % size == 0]
    return max((size for size in sizes if fits(memory, device, size)), default=1)


def held_precision(spec: JobSpec, facts: Facts, groups: dict[str, int]) -> str:
    """`auto` resolved: 32bit on a CPU; on a GPU 16bit, which is quicker, where four rows at once fit with it, else 4bit."""
    if spec.model.precision != "auto":
        return spec.model.precision
    if facts.device is None or facts.device.kind == "cpu":
        return "32bit"
    rows, least = min(4, share_of_batch(spec, facts.world)), kept_ways(spec, facts)[-1]
    return "16bit" if fits(needed_memory(spec, facts, groups, "16bit", least), facts.device, rows) else "4bit"
