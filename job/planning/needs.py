"""Estimates each stage's needs of host memory, of scratch and of an output that is a folder: pure functions of a spec and facts.

Each need is a range. Its lower end is certain: files whose sizes the base's headers give, and weights in memory. Its upper end
adds what is only likely, `MARGIN` and, on disks, `SMALL`. The lower end refuses a job, the upper end warns.

Not counted: what libraries compile for a GPU, and cached images and features. The caches stop growing when the disk is full, and
`room_for_features` leaves room for the export.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from job.config.schema import JobSpec
from job.layout import CHECKPOINTS, MERGING_KEY
from job.model.base_model import BaseFacts
from job.model.families import family_of
from job.model.lora_targets import group_of
from job.model.memory_model import (
    ANSWER,
    CALIBRATION_ROWS,
    NF4_BYTES,
    OPTIMIZER_BYTES,
    Kept,
    Memory,
    card_bytes,
    kept_by_towers,
    vision_tokens,
    vocabulary,
)
from job.planning.facts import Facts

MARGIN = 1.1
SMALL = 20_000_000
"""Bytes of logs, tables, answers, report and its images, in scratch and in the output each."""
LIBRARIES = {"cpu": 400_000_000, "cuda": 1_000_000_000}
"""Bytes that a process holds without any weights. CPU: peak RssAnon of a whole job with a 1 MB model, 402 MB. CUDA: stage in of a
whole job on Unsloth, at least 1.0 GB."""
ON_CUDA = 1_500_000_000
"""Additional bytes once a model is on the GPU: 2.0 to 2.8 GB in total while held-out rows were answered (4B to 11B). About half
came with importing and loading: 1.1 to 2.1 GB in total, which differs by 0.7 GB from start to start of the same job."""
WEIGHT_BYTES = {"32bit": 4, "16bit": 2}
MOST_LOADERS, LOADER_BYTES = 4, 500_000_000
"""Loaders that `auto` starts on a GPU at most, and bytes of /dev/shm, which is memory, for each: two batches of eight four-tile
images in float32. A loader's own memory is 17 MB: it shares its parent's."""
LOADED = 0.4
"""Share of that which batches were seen to fill: up to 4.4 GB in total while Llama 3.2 11B trained, micro-batches of 8."""
PIECES, PIECE = 7, 16 * 2**20
"""Pieces that a merge holds in memory at a time, and their size unless one is a larger tensor (`job.export.merge`)."""
SENT_AT_ONCE = 2
"""Files, sent straight to the output (`job.export.merge`)."""
ANSWERS = 4
"""Sets of logits that the gate holds: base + adapter, base, as trained, and merged or with rounding (`job.export.gate`)."""
LAYER_INPUTS = 4
"""Copies of a layer's inputs in 16 bits that calibration of INT4 keeps for each row: llm-compressor's, and auto-round's inputs,
outputs and outputs once quantised."""
SERVER_BYTES = 3_000_000_000
"""Bytes of a vLLM beside its weights: two processes of 1 GB, seen on a CPU, and 1 GiB of keys and values. Not seen on a GPU."""
DECODER_BYTES = 180_000_000
"""Bytes of an idle process that decodes DICOM (`benchmarks/decoding.py`). Each loader has one, or the job itself."""
GROUP_SCALES = 2 / 128
"""Bytes of INT4 scales per weight: 16 bits for every 128 weights."""


class Range(NamedTuple):
    """Bytes: the certain part, and the estimate with its margin."""

    least: int = 0
    most: int = 0


@dataclass(frozen=True)
class Need:
    """What a stage needs to finish. `memory` is the peak of all processes of the node together. `scratch` and `output` are what
    has been written by then beyond what was there when the job was planned, since nothing is removed before the end."""

    stage: str
    memory: Range
    scratch: Range
    output: Range


@dataclass(frozen=True)
class Training:
    """What the plan decided before: LoRA parameters, the model's `precision`, estimated GPU memory (None: base unknown), rows of
    a micro-batch, what is kept for the backward pass, steps (None: rows unknown), and whether training is done."""

    lora: int
    precision: str
    memory: Memory | None
    micro_batch: int
    kept: Kept
    total_steps: int | None
    done: bool


def needs(spec: JobSpec, facts: Facts, training: Training, *, scratch_copy: bool) -> tuple[Need, ...]:
    """Returns one need per stage, in order; empty if the base is unknown."""
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
    """Returns the bytes of the folders that the job publishes, by name."""
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
    """Counts weights in 32 bits and the optimizer's two moments: 12 bytes per parameter, 6 with 8-bit moments."""
    return lora * (4 + OPTIMIZER_BYTES[spec.training.optim])


def _scratch(spec: JobSpec, facts: Facts, base: BaseFacts, training: Training, scratch_copy: bool) -> dict[str, Range]:
    """Checkpoints wait in `trainer/` until they are in the output (a second one while the first uploads), beside the restored
    one; `export/` holds what is published. What an earlier attempt left in either is reused or removed."""
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
    """Counts kept checkpoints, one more while the newest is committed; then what is published. An earlier attempt's merged
    weights are removed first, unless they go straight to the output: finished files then stay, and if that attempt made them the
    other way, each new file is written beside the old one."""
    at_peak, at_end = (
        (0, 0) if training.done else (kept_checkpoints(spec, training.total_steps, more) for more in (1, 0))
    )
    one, there = checkpoint_bytes(spec, training.lora), facts.written.get(CHECKPOINTS, 0)
    during, after = (max(0, count * one + base.rest * bool(count) - there) for count in (at_peak, at_end))
    left = {name: size - facts.written.get(name, 0) for name, size in published(spec, base, training.lora).items()}
    beside = 0 if MERGING_KEY in facts.keys else min(SENT_AT_ONCE * base.largest, facts.written.get("merged", 0))
    whole = after + sum(max(0, size) for size in left.values())
    straight = after if scratch_copy else after + max(0, left.get("merged", 0)) + beside
    return {"train": disk_range(during), "export": disk_range(straight), "publish": disk_range(whole)}


def kept_checkpoints(spec: JobSpec, total_steps: int | None, more: int) -> int:
    """Returns how many are in the output with `more` beside those kept; never more than are made."""
    made = math.inf if total_steps is None else math.ceil(total_steps / spec.checkpoint.save_steps)
    return int(min(made, spec.checkpoint.keep + more))


def disk_range(size: int) -> Range:
    return Range(size, int(MARGIN * size) + SMALL)


def _memory(spec: JobSpec, facts: Facts, base: BaseFacts, training: Training, scratch_copy: bool) -> dict[str, Range]:
    """On a GPU, weights go from mapped files to the device and count as cache, not memory, and what training held stays pinned in
    the process. On a CPU, the model is memory. Every rank of a node holds its own; only rank 0 exports."""
    kind = facts.device.kind if facts.device else "cpu"
    ranks, libraries = facts.on_this_node, LIBRARIES[kind]
    weights = ranks * card_bytes(base, training.precision, facts.shards) * (kind == "cpu")
    loaded = ranks * libraries + weights
    likely = ranks * ON_CUDA * (kind == "cuda")
    checkpoint = 0 if training.done else checkpoint_bytes(spec, training.lora)
    state = training.lora * (8 + OPTIMIZER_BYTES[spec.training.optim]) * (kind == "cpu") * (not training.done)
    step = likely + ranks * _step_memory(spec, facts, base, training, kind)
    after = step + checkpoint if kind == "cuda" else ranks * state
    export = _export_memory(spec, facts, base, training, scratch_copy) if spec.export.merged else 0
    return {
        "stage in": memory_range(ranks * libraries, likely // 2),
        "load": memory_range(loaded, likely // 2),
        "evaluate before": memory_range(loaded, likely),
        "train": memory_range(loaded + ranks * state + checkpoint, step),
        "evaluate after": memory_range(loaded, after),
        "export": memory_range(loaded, after + export),
        "publish": memory_range(ranks * libraries, after),
    }


def _step_memory(spec: JobSpec, facts: Facts, base: BaseFacts, training: Training, kind: str) -> int:
    """Returns what a step likely holds in host memory. On a CPU, all that the forward pass keeps: `Memory.row` counts 16 bits per
    value. On a GPU, batches prefetched by loaders, and layer inputs if they are offloaded."""
    if training.done or training.memory is None:
        return 0
    given = spec.training.dataloader_num_workers
    loaders = (0 if kind == "cpu" else MOST_LOADERS) if given == "auto" else given
    decoders = DECODER_BYTES * max(1, loaders) if facts.data and facts.data.decoders else 0
    if kind == "cpu":
        return decoders + training.micro_batch * training.memory.row * (2 if training.precision == "32bit" else 1)
    ahead = decoders + int(LOADED * loaders * LOADER_BYTES)
    if training.kept != "nothing":
        return ahead
    tokens, pictures = facts.longest_row(spec.training.max_length)
    seen = vision_tokens(base.config, tokens, pictures)
    return ahead + training.micro_batch * int(
        sum(kept_by_towers(base.linears, True, "inputs", tokens, seen, family_of(base.model_type)))
    )


def _export_memory(spec: JobSpec, facts: Facts, base: BaseFacts, training: Training, scratch_copy: bool) -> int:
    """Returns what the export likely holds beside the one model: pinned pieces of the merge, the gate's logits with a server that
    is compared with them, and a file being quantised. The server's weights take the place of the job's own."""
    item = base.bytes / base.parameters if base.parameters else 0
    layers = [layer.out_features * layer.in_features for name, layer in base.linears.items() if name != "lm_head"]
    pieces = PIECES * max(PIECE, int(item * max(layers, default=0))) * (1 if scratch_copy else SENT_AT_ONCE)
    rows = facts.held_out(spec.export.gate.rows)
    tokens = rows * min(spec.evaluation.max_new_tokens, ANSWER) // 2  # on average
    logits = ANSWERS * tokens * vocabulary(base.config, base.linears) * WEIGHT_BYTES.get(training.precision, 2)
    sizes = published(spec, base, training.lora)
    small = sizes.get("merged_4bit", 0)  # safetensors writes a file from memory
    small = max(small, base.largest * (spec.export.merged_fp8 or spec.export.merged_int4))
    converter = LIBRARIES["cpu"] * spec.export.gguf
    server = SERVER_BYTES * (spec.export.serve.engine is not None)
    return pieces + max(logits + server, small + _calibration_memory(spec, facts, base), converter)


def _calibration_memory(spec: JobSpec, facts: Facts, base: BaseFacts) -> int:
    """Returns what the training rows that calibrate INT4 likely hold."""
    rows = min(facts.data.train, CALIBRATION_ROWS) if facts.data else CALIBRATION_ROWS
    tokens, _ = facts.longest_row(spec.training.max_length)
    width = int(base.config.get("text_config", base.config).get("hidden_size", 0))
    return rows * tokens * width * 2 * LAYER_INPUTS * spec.export.merged_int4


def memory_range(sure: int, likely: int = 0) -> Range:
    return Range(sure, int(MARGIN * (sure + likely)))


def room_for_features(spec: JobSpec, facts: Facts, found: Sequence[Need]) -> int | None:
    """Returns the bytes that cached features of a frozen vision tower may take: `training.vision_cache_gb`, or half of what is
    free for `auto`, limited to what the export leaves. None if free space is unknown."""
    if facts.limits is None or facts.limits.scratch is None:
        return None
    disk, shared = facts.limits.scratch, facts.limits.one_disk
    given = spec.training.vision_cache_gb
    asked = disk.room // 2 if given == "auto" else int(given * 1e9)
    export = max((need.scratch.most + need.output.most * shared for need in found), default=0)
    return min(asked, max(0, disk.room - export))
