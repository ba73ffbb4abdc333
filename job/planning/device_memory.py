"""The GPU memory of every stage, and how much of a model in 16 bits the gate leaves outside it. Pure, as the plan is."""

from __future__ import annotations

from job.errors import SpecError
from job.facts import Facts
from job.model.memory import GATE_ROWS, WORKSPACE, Memory, asked_row, gate_batch, served_precision, weight_bytes
from job.record import bytes_text
from job.spec import JobSpec

FILLED = 0.85
"""Share of the GPU's memory that weights and rows may fill while a model is asked: answers grow, and so does what fragments. At
0.9 of 24 GB, 16 rows of Llama 3.2 11B in 4 bits ran out."""
MOST_ANSWERED = 32
"""Rows that are answered at once; more would make the answers of a stopped job that are made again cost too much."""
HOST_BYTES_A_SECOND = 5e9
"""At which weights that wait outside come to the GPU, out of the host's file cache through memory that is not pinned."""


def stage_memory(
    spec: JobSpec,
    facts: Facts,
    groups: dict[str, int],
    precision: str,
    training: Memory | None,
    micro: int,
    room: int | None,
) -> dict[str, int]:
    """Peak bytes on the GPU by stage; empty without a GPU or a base to measure. `room` as `gate_room` says."""
    if facts.base is None or training is None or facts.device is None or facts.device.kind != "cuda":
        return {}
    weights, batch = weight_bytes(facts.base, precision), spec.evaluation.batch
    held_out = batch if facts.data is None else facts.data["evaluation"]
    asked = _asked(spec, facts, groups, weights, min(batch, held_out))
    exported = asked
    if spec.export.merged:
        whole = weight_bytes(facts.base, served_precision(precision))
        exported = _gate(spec, facts, groups, whole if room is None else room)
    measured = {"evaluate before": asked, "evaluate after": asked} if held_out else {}
    mapped = {}
    if held_out and spec.evaluation.explained_rows:
        mapped = {"map where it looks": _asked(spec, facts, groups, weights, gate_batch(spec))}
    return {
        "load": weights + 4 * sum(groups.values()),
        **measured,
        "train": training.of(micro),
        **mapped,
        "export": exported,
    }


def gate_room(spec: JobSpec, facts: Facts, groups: dict[str, int], precision: str) -> int | None:
    """Bytes of weights that the GPU holds in the gate, where a model in 16 bits does not fit it as a whole; None where it does.

    A base that is trained in 16 bits fits as it did in training, and the GPU that trained one in 4 bits has room for as many
    bytes of it in 16, beside at least one row: the gate asks fewer rows at once where it must. Raises SpecError for biases
    that are trained beside such a base.
    """
    device, base = facts.device, facts.base
    if base is None or device is None or device.kind != "cuda" or precision != "4bit" or not spec.export.merged:
        return None
    weights, filled = weight_bytes(base, "16bit"), int(FILLED * device.memory)
    if weights + _gate(spec, facts, groups, 0) <= filled:
        return None
    if spec.lora.bias != "none":
        raise SpecError(
            f"lora.bias: {spec.lora.bias} is trained beside a base whose 16 bits ({bytes_text(weights)}) do not fit "
            f"{device.name} whole, and such a merge cannot be checked; set it to none, or export.merged to false"
        )
    rooms = [filled - _gate(spec, facts, groups, 0, most=rows) for rows in (GATE_ROWS, 4, 2, 1)]
    return next((room for room in rooms if room >= weight_bytes(base, "4bit")), rooms[-1])


def offload_seconds(spec: JobSpec, weights: int, room: int) -> float:
    """What the gate takes longer for the weights that wait outside: they come for base + adapter, for the base, with rounding
    jittered, and for the merged model."""
    batches = -(-spec.export.gate.rows // gate_batch(spec))
    return 4 * batches * (weights - room) / HOST_BYTES_A_SECOND


def answer_batch(spec: JobSpec, facts: Facts, groups: dict[str, int], precision: str) -> int:
    """`evaluation.batch_size` resolved: on a GPU the largest power of two, up to `MOST_ANSWERED`, that fits with the model."""
    given, device, base = spec.evaluation.batch_size, facts.device, facts.base
    if given != "auto" or device is None or device.kind != "cuda" or base is None:
        return spec.evaluation.batch
    room = FILLED * device.memory - _beside(groups) - weight_bytes(base, precision)
    fitting = [rows for rows in (MOST_ANSWERED, 16, 8, 4, 2) if rows * _row(spec, facts) <= room]
    return max(fitting, default=1)


def _asked(spec: JobSpec, facts: Facts, groups: dict[str, int], weights: int, rows: int) -> int:
    """Generation and losses of so many rows with so many bytes of weights."""
    return int(weights + _beside(groups) + rows * _row(spec, facts))


def _gate(spec: JobSpec, facts: Facts, groups: dict[str, int], weights: int, most: int = GATE_ROWS) -> int:
    held_out = (facts.data or {}).get("evaluation", 0) or spec.export.gate.rows
    return _asked(spec, facts, groups, weights, min(most, gate_batch(spec), spec.export.gate.rows, held_out))


def _beside(groups: dict[str, int]) -> float:
    """Adapters in 32 bits, and buffers."""
    return WORKSPACE + 4 * sum(groups.values())


def _row(spec: JobSpec, facts: Facts) -> float:
    assert facts.base is not None
    tokens, pictures = facts.longest_row(spec.training.max_length)
    return asked_row(facts.base.config, facts.base.linears, tokens, pictures, spec.evaluation.max_new_tokens)
