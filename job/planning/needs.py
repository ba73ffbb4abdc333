"""What each stage takes of host memory, of scratch and of an output that is a folder: pure functions of a spec and facts.

Each need is a range. Its lower end is sure: files whose sizes the base's headers give, and weights in memory. Its upper end adds
what is only likely, `MARGIN`, and on disks `SMALL`. A job is refused by the lower end and warned by the upper one.

Left out: what libraries compile for a GPU, and pictures and features that are kept to save time. The latter stop growing where
the disk ends, and `room_for_features` leaves the export its room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from job.facts import Facts
from job.model.fetch import BaseFacts
from job.model.lora import group_of
from job.model.memory import ANSWER, NF4_BYTES, OPTIMIZER_BYTES, Kept, Memory, kept_by_towers, vision_tokens, vocabulary
from job.spec import JobSpec

MARGIN = 1.1
SMALL = 20_000_000
"""Bytes of logs, tables, answers, report and its pictures, in scratch and in the output each."""
LIBRARIES = {"cpu": 400_000_000, "cuda": 1_000_000_000}
"""Bytes that a process holds without any weights. CPU: RssAnon of a whole job with a model of 1 MB, 402 MB at its peak. CUDA:
stage in of a whole job on Unsloth, 1.0 to 1.1 GB."""
ON_CUDA = 900_000_000
"""What comes on top once there is a model on the GPU: 2.0 GB in all while held-out rows were answered (11B and 8B)."""
WEIGHT_BYTES = {"32bit": 4, "16bit": 2}
LOADER_BYTES = 500_000_000
"""Of /dev/shm, which is memory, for each loader on a GPU (`job.train.SHARED_BYTES`). A loader's own are 17 MB: it shares its
parent's."""
LOADED = 0.7
"""Share of that which batches were seen to fill (Llama 3.2 11B, 8 rows at once)."""
PIECES, PIECE = 7, 16 * 2**20
"""Pieces that a merge has in memory at a time, and their size unless one is a larger tensor (`job.export.merge`)."""
SENT_AT_ONCE = 2
"""Files, straight to the output (`job.export.merge`)."""
ANSWERS = 5
"""Sets of logits that the gate holds: merged, base + adapter, base, with rounding, and as trained (`job.export.gate`)."""
MERGING = "logs/merging.json"
"""What an earlier attempt finished of merged weights that go straight to the output (`job.export.merge`)."""
GROUP_SCALES = 2 / 128
"""Bytes of INT4's scales for each weight: 16 bits for 128 of them."""


class Range(NamedTuple):
    """Bytes: what is sure, and what is foreseen with its margin."""

    least: int = 0
    most: int = 0


@dataclass(frozen=True)
class Need:
    """What must be there for a stage to end. `memory` is held at its peak, by all processes of the node together. `scratch` and
    `output` are what has been written by then beyond what lay there when the job was planned, since nothing is removed before
    the end."""

    stage: str
    memory: Range
    scratch: Range
    output: Range


@dataclass(frozen=True)
class Training:
    """What the plan decided before: LoRA parameters, the model's `precision`, GPU memory by count (None: base not known), rows of
    a micro-batch, what is kept for the backward, steps (None: rows not known), and whether they are done."""

    lora: int
    precision: str
    memory: Memory | None
    micro_batch: int
    kept: Kept
    total_steps: int | None
    done: bool


def needs(spec: JobSpec, facts: Facts, training: Training, *, scratch_copy: bool) -> tuple[Need, ...]:
    """One for each stage, in their order; none where the base is not known."""
    if facts.base is None:
        return ()
    memory = _memory(spec, facts, facts.base, training, scratch_copy)
    scratch = _scratch(spec, facts, facts.base, training, scratch_copy)
    output = _output(spec, facts, facts.base, training, scratch_copy)
    found, on_scratch, on_output = list[Need](), Range(), Range()
    for stage, held in memory.items():
        on_scratch, on_output = scratch.get(stage, on_scratch), output.get(stage, on_output)
        found.append(Need(stage, held, on_scratch, on_output))
    return tuple(found)


def published(spec: JobSpec, base: BaseFacts, lora: int) -> dict[str, int]:
    """Bytes of the folders that the job publishes, by their names."""
    item = base.bytes / base.parameters if base.parameters else 0
    layers = {name: layer.out_features * layer.in_features for name, layer in base.linears.items() if name != "lm_head"}
    language = sum(size for name, size in layers.items() if (group_of(name) or "").startswith("language"))
    quantised = sum(layers.values())
    sizes = {
        "merged": base.bytes,
        "merged_4bit": NF4_BYTES * quantised + 2 * (base.parameters - quantised),
        "merged_fp8": language + item * (base.parameters - language),
        "merged_int4": (0.5 + GROUP_SCALES) * language + item * (base.parameters - language),
        "gguf": 2 * base.parameters,
    }
    asked = {name: int(size) + base.rest for name, size in sizes.items() if getattr(spec.export, name)}
    return {"adapter": 4 * lora + base.rest} | asked


def checkpoint_bytes(spec: JobSpec, lora: int) -> int:
    """Weights in 32 bits and the optimizer's two moments: 12 bytes a parameter, 6 with moments in 8 bits."""
    return lora * (4 + OPTIMIZER_BYTES[spec.training.optim])


def _scratch(spec: JobSpec, facts: Facts, base: BaseFacts, training: Training, scratch_copy: bool) -> dict[str, Range]:
    """Checkpoints wait in `trainer/` until they are in the output (a second one while the first is on its way), beside the one
    that was restored; `export/` holds what is published. What an earlier attempt left of both is used again or removed."""
    checkpoint = checkpoint_bytes(spec, training.lora)
    restored = (checkpoint + base.rest) * bool(facts.checkpoints)
    waiting = (checkpoint + 2 * base.rest) * (not training.done)
    there = facts.left.get("trainer", 0)
    train = [max(0, restored + count * waiting - there) for count in (1, 2)]
    folders = published(spec, base, training.lora)
    if "merged" in folders and not scratch_copy:
        folders["merged"] = base.rest + base.largest  # one file at a time is read back
    exported = sum(max(0, size - facts.left.get(f"export/{name}", 0)) for name, size in folders.items())
    kept = max(0, restored + base.rest - there)
    return {
        "stage in": disk_range(facts.to_fetch),
        "train": Range(facts.to_fetch + train[0], disk_range(facts.to_fetch + train[1]).most),
        "export": disk_range(facts.to_fetch + kept + exported),
    }


def _output(spec: JobSpec, facts: Facts, base: BaseFacts, training: Training, scratch_copy: bool) -> dict[str, Range]:
    """Checkpoints that are kept, one more while the newest is committed; then what is published. Merged weights that an earlier
    attempt wrote are removed first, but where they go there straight: what it finished of them stays, and where it made them in
    the other way each new file is written beside the old one."""
    at_peak, at_end = (
        (0, 0) if training.done else (kept_checkpoints(spec, training.total_steps, more) for more in (1, 0))
    )
    one, there = checkpoint_bytes(spec, training.lora), facts.written.get("checkpoints", 0)
    during, after = (max(0, count * one + base.rest * bool(count) - there) for count in (at_peak, at_end))
    left = {name: size - facts.written.get(name, 0) for name, size in published(spec, base, training.lora).items()}
    beside = (
        0 if scratch_copy or MERGING in facts.keys else min(SENT_AT_ONCE * base.largest, facts.written.get("merged", 0))
    )
    whole = after + sum(max(0, size) for size in left.values())
    straight = 0 if scratch_copy else max(0, left.get("merged", 0)) + beside
    straight += after
    return {"train": disk_range(during), "export": disk_range(straight), "publish": disk_range(whole)}


def kept_checkpoints(spec: JobSpec, total_steps: int | None, more: int) -> int:
    """How many lie in the output with `more` beside those that are kept; never more than are made."""
    made = math.inf if total_steps is None else math.ceil(total_steps / spec.checkpoint.save_steps)
    every = total_steps // spec.checkpoint.keep_every if total_steps and spec.checkpoint.keep_every else 0
    return int(min(made, spec.checkpoint.keep + every + more))


def disk_range(size: int) -> Range:
    return Range(size, int(MARGIN * size) + SMALL)


def _memory(spec: JobSpec, facts: Facts, base: BaseFacts, training: Training, scratch_copy: bool) -> dict[str, Range]:
    """On a GPU the weights go from mapped files to the device and are cache, not memory, and what training held stays with the
    process, pinned. On a CPU the model is memory. Every rank of a node holds its own; rank 0 alone exports."""
    kind = facts.device.kind if facts.device else "cpu"
    ranks, libraries = facts.on_this_node, LIBRARIES[kind]
    weights = ranks * base.parameters * WEIGHT_BYTES.get(training.precision, 0) * (kind == "cpu")
    loaded = ranks * libraries + weights
    likely = ranks * ON_CUDA * (kind == "cuda")
    checkpoint = 0 if training.done else checkpoint_bytes(spec, training.lora)
    state = training.lora * (8 + OPTIMIZER_BYTES[spec.training.optim]) * (kind == "cpu") * (not training.done)
    step = likely + ranks * _step_memory(spec, facts, base, training, kind)
    after = step + checkpoint if kind == "cuda" else ranks * state
    export = _export_memory(spec, facts, base, training, scratch_copy) if spec.export.merged else 0
    return {
        "stage in": memory_range(ranks * libraries),
        "load": memory_range(loaded, likely),
        "evaluate before": memory_range(loaded, likely),
        "train": memory_range(loaded + ranks * state + checkpoint, step),
        "evaluate after": memory_range(loaded, after),
        "export": memory_range(loaded, after + export),
        "publish": memory_range(ranks * libraries, after),
    }


def _step_memory(spec: JobSpec, facts: Facts, base: BaseFacts, training: Training, kind: str) -> int:
    """What a step likely holds in host memory. On a CPU all that the forward pass keeps: `Memory.row` counts 16 bits a value. On
    a GPU batches that loaders made ahead, and layers' inputs where they are moved there."""
    if training.done or training.memory is None:
        return 0
    if kind == "cpu":
        return training.micro_batch * training.memory.row * (2 if training.precision == "32bit" else 1)
    loaders = 4 if spec.training.dataloader_num_workers == "auto" else spec.training.dataloader_num_workers
    ahead = int(LOADED * loaders * LOADER_BYTES)
    if training.kept != "nothing":
        return ahead
    tokens, pictures = facts.longest_row(spec.training.max_length)
    seen = vision_tokens(base.config, tokens, pictures)
    return ahead + training.micro_batch * int(
        sum(kept_by_towers(base.linears, True, "inputs", tokens, seen, base.model_type))
    )


def _export_memory(spec: JobSpec, facts: Facts, base: BaseFacts, training: Training, scratch_copy: bool) -> int:
    """What the export likely holds beside the one model: pieces of the merge, pinned; the gate's logits; a file that is made
    smaller."""
    item = base.bytes / base.parameters if base.parameters else 0
    layers = [layer.out_features * layer.in_features for name, layer in base.linears.items() if name != "lm_head"]
    pieces = PIECES * max(PIECE, int(item * max(layers, default=0))) * (1 if scratch_copy else SENT_AT_ONCE)
    rows = min(spec.export.gate.rows, (facts.data or {}).get("evaluation", 0) or spec.export.gate.rows)
    tokens = rows * min(spec.evaluation.max_new_tokens, ANSWER)
    logits = ANSWERS * tokens * vocabulary(base.config, base.linears) * WEIGHT_BYTES.get(training.precision, 2)
    sizes = published(spec, base, training.lora)
    small = sizes.get("merged_4bit", 0)  # safetensors writes a file from memory
    small = max(small, base.largest * (spec.export.merged_fp8 or spec.export.merged_int4))
    converter = LIBRARIES["cpu"] * spec.export.gguf
    return pieces + max(logits, small, converter)


def memory_range(sure: int, likely: int = 0) -> Range:
    return Range(sure, int(MARGIN * (sure + likely)))


def room_for_features(spec: JobSpec, facts: Facts, found: Sequence[Need]) -> int | None:
    """Bytes that the features of a frozen vision tower may take: what `training.vision_cache_gb` says, `auto` half of what is
    free; of that, what the export leaves. None where nobody knows what is free."""
    if facts.limits is None or facts.limits.scratch is None:
        return None
    disk, shared = facts.limits.scratch, facts.limits.one_disk
    given = spec.training.vision_cache_gb
    asked = disk.room // 2 if given == "auto" else int(given * 1e9)
    export = max((need.scratch.most + need.output.most * shared for need in found), default=0)
    return min(asked, max(0, disk.room - export))
