"""The GPU memory of every stage, and how much of a model in 16 bits the gate leaves outside it. Pure, as the plan is."""

from __future__ import annotations

from job.errors import SpecError
from job.facts import Facts
from job.model.memory import WORKSPACE, Memory, asked_row, weight_bytes
from job.record import bytes_text
from job.spec import JobSpec

FILLED = 0.9
"""Share of the GPU's memory that weights and rows of the gate may fill."""
LEAST_ROOM = 2_000_000_000
"""Bytes of weights that must have room on the GPU: accelerate keeps as much free as the largest layer takes, and a head with a
vocabulary of 262,000 takes 1.3 GB."""
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
        exported = max(asked, _gate(spec, facts, groups, whole if room is None else room))
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

    A base that is trained in 16 bits fits as it did in training. Raises SpecError where the GPU has no room even so.
    """
    device, base = facts.device, facts.base
    if base is None or device is None or device.kind != "cuda" or precision != "4bit" or not spec.export.merged:
        return None
    weights, beside = weight_bytes(base, "16bit"), _gate(spec, facts, groups, 0)
    if weights + beside <= FILLED * device.memory:
        return None
    room = int(FILLED * device.memory) - beside
    if room < LEAST_ROOM:
        raise SpecError(
            f"export.merged: the gate asks the merged model in 16 bits ({bytes_text(weights)}), part by part, and "
            f"{device.name} has room for {bytes_text(max(room, 0))} of it beside its rows; lower evaluation.batch_size, shrink "
            "images with dataset.image_max_side, take a larger GPU, or set export.merged to false"
        )
    if spec.lora.bias != "none":
        raise SpecError(
            f"lora.bias: {spec.lora.bias} is trained beside a base whose 16 bits ({bytes_text(weights)}) do not fit "
            f"{device.name} whole, and such a merge cannot be checked; set it to none, or export.merged to false"
        )
    return room


def gate_precision(precision: str) -> str:
    """What merged weights are asked in: 16 bits where the base was held in 4."""
    return "16bit" if precision == "4bit" else precision


def offload_seconds(spec: JobSpec, weights: int, room: int) -> float:
    """What the gate takes longer for the weights that wait outside: they come for base + adapter, for the base, with rounding
    jittered, and for the merged model."""
    batches = -(-spec.export.gate.rows // spec.evaluation.batch)
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
        rows = min(rows, most)
    elif facts.data is not None:
        rows = min(rows, facts.data["evaluation"])
    return int(weight_bytes(facts.base, precision) + _beside(groups) + rows * _row(spec, facts))


def _gate(spec: JobSpec, facts: Facts, groups: dict[str, int], weights: int) -> int:
    rows = min(
        spec.evaluation.batch, spec.export.gate.rows, (facts.data or {}).get("evaluation", 0) or spec.export.gate.rows
    )
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
