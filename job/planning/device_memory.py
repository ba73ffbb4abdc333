"""The GPU memory of every stage, and how much of a model in 16 bits the gate leaves outside it. Pure, as the plan is."""

from __future__ import annotations

from job.errors import SpecError
from job.facts import Facts
from job.model.memory import GATE_ROWS, WORKSPACE, Memory, asked_row, gate_batch, weight_bytes
from job.record import bytes_text
from job.spec import JobSpec

FILLED = 0.85
"""Share of the GPU's memory that weights and rows may fill while a model is asked: answers grow, and so does what fragments. At
0.9 of 24 GB, 16 rows of Llama 3.2 11B in 4 bits ran out."""
MOST_ANSWERED = 32
"""Rows that are answered at once; more would make the answers of a stopped job that are made again cost too much."""
COVERED = 37
"""Pictures of a row whose map is made: each cell covered, and none (`job.evaluate.occlusion`)."""
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
    asked = _asked(spec, facts, groups, precision)
    exported = asked
    if spec.export.merged:
        whole = weight_bytes(facts.base, gate_precision(precision))
        exported = _gate(spec, facts, groups, whole if room is None else room)
    measured = {"evaluate before": asked, "evaluate after": asked} if _held_out(facts) else {}
    mapped = (
        {"map where it looks": _asked(spec, facts, groups, precision, COVERED)}
        if _held_out(facts) and spec.evaluation.explained_rows
        else {}
    )
    return {
        "load": weight_bytes(facts.base, precision) + 4 * sum(groups.values()),
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


def gate_precision(precision: str) -> str:
    """What merged weights are asked in: 16 bits where the base was held in 4."""
    return "16bit" if precision == "4bit" else precision


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


def _asked(spec: JobSpec, facts: Facts, groups: dict[str, int], precision: str, most: int | None = None) -> int:
    """Generation and losses of a batch of held-out rows, or of at most `most` pictures with a part covered."""
    assert facts.base is not None
    rows = spec.evaluation.batch
    if most is not None:
        rows = min(gate_batch(spec), most)
    elif facts.data is not None:
        rows = min(rows, facts.data["evaluation"])
    return int(weight_bytes(facts.base, precision) + _beside(groups) + rows * _row(spec, facts))


def _gate(spec: JobSpec, facts: Facts, groups: dict[str, int], weights: int, most: int = GATE_ROWS) -> int:
    held_out = (facts.data or {}).get("evaluation", 0) or spec.export.gate.rows
    rows = min(most, gate_batch(spec), spec.export.gate.rows, held_out)
    return int(weights + _beside(groups) + rows * _row(spec, facts))


def _beside(groups: dict[str, int]) -> float:
    """Adapters in 32 bits, and buffers."""
    return WORKSPACE + 4 * sum(groups.values())


def _row(spec: JobSpec, facts: Facts) -> float:
    assert facts.base is not None
    data = facts.data or {}
    tokens = min(data.get("tokens", {}).get("longest", spec.training.max_length), spec.training.max_length)
    pictures = data.get("images", {}).get("most", 1)
    return asked_row(facts.base.config, facts.base.linears, tokens, pictures, spec.evaluation.max_new_tokens)


def _held_out(facts: Facts) -> bool:
    return facts.data is None or facts.data["evaluation"] > 0
