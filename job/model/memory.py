"""What training will take of a GPU's memory, from the headers of the weights alone.

The terms follow from the architecture; the factors were fitted to peaks of allocated memory measured with
benchmarks/throughput.py (Llama 3.2 11B Vision, LoRA r 16, Unsloth, with every kind of gradient checkpointing and with none):
tests/model/test_memory.py compares them with the very peaks that they were fitted to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from job.model.fetch import BaseFacts
from job.model.lora import Linear, group_of
from job.spec import JobSpec

NF4_BYTES = 0.516
"""A weight in nf4 with double quantisation: 4 bits, and 8 bits a block of 64, and 32 bits 256 blocks (Dettmers et al., 2023)."""
OPTIMIZER_BYTES = {"adamw_torch": 8, "adamw_torch_fused": 8, "adamw_8bit": 2}
WORKSPACE = 0.6e9
"""Buffers that are there whatever the batch: de-quantised weights, kernels, the loss's chunks."""
LOOK = 0.35e9
"""One picture of 6432 tokens going through a frozen tower of width 1280, a quarter of what four of them take at once."""
CROSS, CROSS_KEPT = 4.6, 2.7
"""Copies of the vision states that a cross-attention layer holds for one row: keys, values, both repeated, gradients; and
those of them that it keeps for its backward."""
LAYER = (12, 8)
"""Values of the hidden and of the intermediate width that one token of one language layer holds while it goes backward."""
VISION_LAYER = (12, 4)
"""As `LAYER`, for a vision layer that is trained."""
KEPT = {
    "mllama": ((9, 4), (9, 2)),
    "qwen2_5_vl": ((9, 4), (13, 4)),
    "qwen3_vl": ((11, 4), (11, 2)),
    "gemma3": ((15, 4), (9, 2)),
    "llava": ((10, 4), (9, 6)),
}
"""Values of both widths that a language and a vision layer keep for their backward where nothing is recomputed (Korthikanti et
al., 2022, section 4.1, without attention's own matrix and without dropout): norms in 32 bits, gates and rotations make the
families differ. tests/model/test_memory.py counts them."""
KEPT_AT_MOST = ((15, 4), (13, 6))
"""The same for a family that nobody counted."""
ON_THEIR_WAY = 0.7
"""Share of the layers' inputs to count where they are moved to the host's memory. Fitted to two peaks, and the cause not seen:
copies that are under way are one reading."""


GATE_ROWS = 8
"""Rows that the gate, and maps of where the model looks, ask at once: without generation more gain little, and leave less room
for weights where not all of them fit."""
ANSWER = 128
"""Tokens of an answer, at most, whose logits are counted: of a row's tokens most are the picture's and the question's."""
ASKED = 1.12
"""What asking takes over what is counted of it: fitted to 36.1 GB at 16 rows of Llama 3.2 11B in 16 bits."""
LOGIT_BYTES = 10
"""Of a logit while a loss is made of it: 16 bits, and 32 twice."""


Kept = Literal["nothing", "inputs", "all"]
"""What stays on the card for the backward: all of it; with gradient checkpointing the layers' inputs; or nothing, where Unsloth
moves those to the host's memory."""


class Memory(NamedTuple):
    """Bytes: `weights` and `training` state (adapters, gradients, optimizer, buffers) whatever the batch, and `row` for each
    row that goes through at once."""

    weights: int
    training: int
    row: int

    def of(self, rows: int) -> int:
        return self.weights + self.training + rows * self.row


class Widths(NamedTuple):
    """Of one tower: hidden and intermediate width, number of layers. Zeros where it has none."""

    hidden: int
    intermediate: int
    layers: int


def memory(
    config: Mapping[str, Any],
    linears: Mapping[str, Linear],
    parameters: int,
    groups: Mapping[str, int],
    *,
    precision: str,
    optim: str,
    unsloth: bool,
    kept: Kept,
    tokens: int,
    pictures: int = 1,
) -> Memory:
    """For rows of `tokens` text tokens and so many `pictures`; `groups` counts LoRA parameters by group."""
    lora = sum(groups.values())
    language, vision = widths(linears, "language"), widths(linears, "vision")
    seen = vision_tokens(config, tokens, pictures)
    trained = any(group.startswith("vision/") for group in groups)
    for_language, for_vision = kept_by_towers(linears, trained, kept, tokens, seen, str(config.get("model_type")))
    reading = 2.0 * tokens * values(language, LAYER)
    if config.get("model_type") == "mllama":
        reading += 2 * CROSS * seen * language.hidden
    if not unsloth:
        reading += 10.0 * tokens * vocabulary(config, linears)  # the logits in 16 and twice in 32 bits
    looking = 2.0 * seen * values(vision, VISION_LAYER) if trained else 0
    row = for_vision + max(for_language + reading, looking)  # the language model goes backward first
    one = vision_tokens(config, tokens, 1)
    once = WORKSPACE + (0 if trained else 4 * LOOK * one * vision.hidden / (6432 * 1280))
    return Memory(weights_of(linears, parameters, precision), int(lora * (8 + OPTIMIZER_BYTES[optim]) + once), int(row))


def weights_of(linears: Mapping[str, Linear], parameters: int, precision: str) -> int:
    """Bytes of a base in memory. 4 bits hold its linear layers but the head, and the rest in 16 bits."""
    if precision != "4bit":
        return {"16bit": 2, "32bit": 4}[precision] * parameters
    quantised = sum(layer.in_features * layer.out_features for name, layer in linears.items() if name != "lm_head")
    return int(2 * (parameters - quantised) + NF4_BYTES * quantised)


def weight_bytes(base: BaseFacts, precision: str) -> int:
    """`weights_of` a base by its facts."""
    return weights_of(base.linears, base.parameters, precision)


def asked_row(
    config: Mapping[str, Any], linears: Mapping[str, Linear], tokens: int, pictures: int, new_tokens: int
) -> float:
    """Bytes that one row takes while a model is asked, without gradients: generation of `new_tokens`, or the loss of its answer.

    The tower looks at all pictures of a batch first; what it said, keys and values, and the answer's logits come behind.
    """
    language, vision = widths(linears, "language"), widths(linears, "vision")
    seen = vision_tokens(config, tokens, pictures)
    looking = LOOK * seen * vision.hidden / (6432 * 1280)
    keys = max(
        (layer.out_features for name, layer in linears.items() if name.endswith("k_proj")), default=language.hidden
    )
    cache = 2.0 * 2 * keys * language.layers * (tokens + new_tokens)
    answer = min(tokens, ANSWER)
    reading = 2.0 * tokens * values(language, LAYER) + LOGIT_BYTES * answer * vocabulary(config, linears)
    if config.get("model_type") == "mllama":
        crossing = sum("cross_attn.q_proj" in name for name in linears)
        reading += 2.0 * seen * (CROSS * language.hidden + 2 * keys * crossing)
    return ASKED * max(looking, cache + reading)


def served_precision(precision: str) -> str:
    """What merged weights are asked and served in: 16 bits where the base was held in 4."""
    return "16bit" if precision == "4bit" else precision


def gate_batch(spec: JobSpec) -> int:
    """Rows that the gate, and maps of where the model looks, ask at once."""
    return min(spec.evaluation.batch, GATE_ROWS)


def last_cure(precision: str) -> str:
    """What is left to do where a model in `precision` and one row do not fit the GPU together."""
    return "take a GPU with more memory" if precision == "4bit" else "set model.precision to 4bit, or take a larger GPU"


def kept_by_towers(
    linears: Mapping[str, Linear], trained: bool, kept: Kept, tokens: int, seen: int, model_type: str
) -> tuple[float, float]:
    """Bytes of one row of `tokens` text tokens and `seen` vision tokens that wait on the card for the backward, in the language
    model and, where it is `trained`, in the vision tower."""
    language, vision = widths(linears, "language"), widths(linears, "vision")
    looked = seen if trained else 0
    if kept == "all":
        of_layer, of_vision_layer = KEPT.get(model_type, KEPT_AT_MOST)
        crossing = 2 * CROSS_KEPT * seen * language.hidden * sum("cross_attn.q_proj" in name for name in linears)
        layers = 2.0 * tokens * language.layers * values(language, of_layer)
        return layers + crossing, 2.0 * looked * vision.layers * values(vision, of_vision_layer)
    share = 1.0 if kept == "inputs" else ON_THEIR_WAY
    return share * 2 * tokens * language.hidden * language.layers, share * 2 * looked * vision.hidden * vision.layers


def values(tower: Widths, times: tuple[int, int]) -> int:
    return times[0] * tower.hidden + times[1] * tower.intermediate


def widths(linears: Mapping[str, Linear], tower: str) -> Widths:
    """Read off the layers' shapes: configurations leave out what is a default."""
    attention = [layer for name, layer in linears.items() if group_of(name) == f"{tower}/attention"]
    mlp = [max(layer) for name, layer in linears.items() if group_of(name) == f"{tower}/mlp"]
    numbers = {
        match.group()
        for name in linears
        if group_of(name) == f"{tower}/mlp" and (match := re.match(r".*?\.\d+(?=\.)", name))
    }
    hidden = max((layer.in_features for layer in attention), default=0)
    return Widths(hidden, max(mlp, default=0), len(numbers))


def vision_tokens(config: Mapping[str, Any], tokens: int, pictures: int) -> int:
    """Tokens of a row's pictures inside the vision tower; at most, as their sizes are not known here. Qwen-VL's stand in the
    text, four of them as one."""
    vision = config.get("vision_config", {})
    side = int(vision.get("image_size", 560)) // int(vision.get("patch_size", 14))
    if config.get("model_type") == "mllama":
        return pictures * int(vision.get("max_num_tiles", 4)) * -(-(side * side + 1) // 8) * 8
    if str(config.get("model_type")).startswith("qwen"):
        return 4 * tokens
    return pictures * side * side


def vocabulary(config: Mapping[str, Any], linears: Mapping[str, Linear]) -> int:
    head = linears.get("lm_head")
    return head.out_features if head else int(config.get("text_config", {}).get("vocab_size", 0))
