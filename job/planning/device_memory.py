"""Estimates the GPU memory of every stage, and how much of a 16-bit model the gate keeps outside it. Pure, like the plan."""

from __future__ import annotations

from job.config.schema import JobSpec
from job.errors import SpecError
from job.model.memory_model import (
    GATE_ROWS,
    WORKSPACE,
    Memory,
    asked_row,
    card_bytes,
    gate_batch,
    served_precision,
    weight_bytes,
)
from job.planning.facts import Facts
from job.runtime.status import bytes_text

FILLED = 0.85
"""Share of GPU memory that weights and rows may fill during evaluation: answers grow, and so does fragmentation. At 0.9 of 24 GB,
16 rows of Llama 3.2 11B in 4 bits ran out of memory."""
MOST_ANSWERED = 32
"""Rows generated at once at most; with more, repeating the lost answers of a stopped job would cost too much."""
HOST_BYTES_A_SECOND = 5e9
"""Speed at which offloaded weights reach the GPU, from the host's page cache through memory that is not pinned."""


def stage_memory(
    spec: JobSpec,
    facts: Facts,
    groups: dict[str, int],
    precision: str,
    training: Memory | None,
    micro: int,
    room: int | None,
) -> dict[str, int]:
    """Returns peak bytes on the GPU by stage; empty without a GPU or a base to measure. `room` comes from `gate_room`."""
    if facts.base is None or training is None or facts.device is None or facts.device.kind != "cuda":
        return {}
    weights, batch = card_bytes(facts.base, precision, facts.shards), spec.evaluation.batch
    held_out = batch if facts.data is None else facts.data.evaluation
    asked = _asked(spec, facts, groups, weights, min(batch, held_out))
    exported = asked
    if spec.export.merged:
        whole = weight_bytes(facts.base, served_precision(precision))
        exported = _gate(spec, facts, groups, whole if room is None else room)
    stages = {"load": weights + 4 * sum(groups.values())}
    stages |= {"evaluate before": asked, "evaluate after": asked} if held_out else {}
    stages["train"] = training.of(micro)
    if held_out and spec.evaluation.explained_rows:
        stages["map where it looks"] = _asked(spec, facts, groups, weights, gate_batch(spec))
    return stages | {"export": exported}


def gate_room(spec: JobSpec, facts: Facts, groups: dict[str, int], precision: str) -> int | None:
    """Returns the bytes of weights that the GPU holds in the gate if a 16-bit model does not fit whole; None if it does.

    A base trained whole in 16 bits fits as it did in training. A GPU that trained a base in 4 bits, or a share of one, has room
    for as many bytes of it in 16 bits, beside at least one row: the gate uses a smaller batch where it must. Raises SpecError
    for biases that are trained beside such a base.
    """
    device, base = facts.device, facts.base
    if base is None or device is None or device.kind != "cuda" or not spec.export.merged:
        return None
    if precision != "4bit" and facts.shards == 1:
        return None
    weights, filled = weight_bytes(base, served_precision(precision)), int(FILLED * device.memory)
    if weights + _gate(spec, facts, groups, 0) <= filled:
        return None
    if spec.lora.bias != "none":
        raise SpecError(
            f"lora.bias: {spec.lora.bias} cannot be checked in the merge, because the 16-bit base model ({bytes_text(weights)}) "
            f"does not fit on {device.name}; set it to none, or export.merged to false"
        )
    rooms = [filled - _gate(spec, facts, groups, 0, most=rows) for rows in (GATE_ROWS, 4, 2, 1)]
    return next((room for room in rooms if room >= card_bytes(base, precision, facts.shards)), rooms[-1])


def offload_seconds(spec: JobSpec, weights: int, room: int) -> float:
    """Returns the gate's extra seconds for offloaded weights: they are transferred for base + adapter, for the base, twice with
    jittered rounding, and for the merged model."""
    batches = -(-spec.export.gate.rows // gate_batch(spec))
    return 5 * batches * (weights - room) / HOST_BYTES_A_SECOND


def answer_batch(spec: JobSpec, facts: Facts, groups: dict[str, int], precision: str) -> int:
    """Resolves `evaluation.batch_size`: on a GPU, the largest power of two up to `MOST_ANSWERED` that fits beside the model."""
    given, device, base = spec.evaluation.batch_size, facts.device, facts.base
    if given != "auto" or device is None or device.kind != "cuda" or base is None:
        return spec.evaluation.batch
    room = FILLED * device.memory - _beside(groups) - card_bytes(base, precision, facts.shards)
    fitting = [rows for rows in (MOST_ANSWERED, 16, 8, 4, 2) if rows * _row(spec, facts) <= room]
    return max(fitting, default=1)


def _asked(spec: JobSpec, facts: Facts, groups: dict[str, int], weights: int, rows: int) -> int:
    """Bytes for generation and losses with `rows` rows and `weights` bytes of weights."""
    return int(weights + _beside(groups) + rows * _row(spec, facts))


def _gate(spec: JobSpec, facts: Facts, groups: dict[str, int], weights: int, most: int = GATE_ROWS) -> int:
    return _asked(spec, facts, groups, weights, min(most, gate_batch(spec), facts.held_out(spec.export.gate.rows)))


def _beside(groups: dict[str, int]) -> float:
    """Bytes of adapters in 32 bits and of buffers."""
    return WORKSPACE + 4 * sum(groups.values())


def _row(spec: JobSpec, facts: Facts) -> float:
    assert facts.base is not None
    tokens, pictures = facts.longest_row(spec.training.max_length)
    learned, new = facts.most_learned(tokens), spec.evaluation.max_new_tokens
    return asked_row(facts.base.config, facts.base.linears, tokens, pictures, new, learned)
