"""Estimates the GPU memory of training from the headers of the weights.

The terms follow from the architecture; the factors were fitted to peaks of allocated memory measured with
benchmarks/throughput.py (Llama 3.2 11B Vision, LoRA r 16, Unsloth, with every kind of activation checkpointing and with none).
tests/model/test_memory_model.py compares the estimates with those same peaks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from job.config.schema import JobSpec
from job.model.base_model import BaseFacts
from job.model.families import Family, family_of
from job.model.lora_targets import Linear, group_of

NF4_BYTES = 0.516
"""Bytes per weight in nf4 with double quantisation: 4 bits, plus 8 bits per block of 64 and 32 bits per 256 blocks (Dettmers
et al., 2023)."""
OPTIMIZER_BYTES = {"adamw_torch": 8, "adamw_torch_fused": 8, "adamw_8bit": 2}
WORKSPACE = 0.6e9
"""Buffers that do not depend on the batch: dequantised weights, kernels, chunks of the loss."""
LOOK = 0.35e9
"""Bytes for one image of 6432 tokens in a frozen tower of width 1280, a quarter of what four take in one call."""
CROSS, CROSS_KEPT = 4.6, 2.7
"""Copies of the vision states that a cross-attention layer holds for one row (keys, values, both repeated, gradients), and how
many of them it keeps for its backward."""
LAYER = (12, 8)
"""Multiples of the hidden and the intermediate width that one language layer holds per token during its backward."""
VISION_LAYER = (12, 4)
"""Like `LAYER`, for a trained vision layer."""
ON_THEIR_WAY = 0.7
"""Share of the layers' inputs to count when they are offloaded to host memory. Fitted to two peaks; the cause was not
observed, but copies in flight could explain it."""


CALIBRATION_ROWS = 128
"""Training rows that calibrate INT4 at most."""
GATE_ROWS = 8
"""Micro-batch size of the gate and of occlusion maps: without generation, more rows gain little and leave less room for
weights that do not all fit."""
ANSWER = 128
"""Tokens of an answer where none were counted; most of a row's tokens belong to the image and the question."""
ASKED = 1.3
"""Ratio of inference memory to the counted terms: fitted to peaks of 36.2 and 36.7 GB at 16 rows of Llama 3.2 11B, and of 20.0
and 21.2 GB at 18 rows of Qwen3-VL 8B, in 16 bits."""
FORWARD = (4, 3)
"""Like `LAYER`, without gradients."""
LOGIT_BYTES = 7
"""Bytes per logit while the loss is computed, at each column of a batch where any row has its answer: 16 bits, and for the
half of them that usually are answers another 16 bits and twice 32."""


Kept = Literal["nothing", "inputs", "all"]
"""What stays on the GPU for the backward: all activations; with activation checkpointing, the layers' inputs; or nothing, when
Unsloth offloads those to host memory."""


class Memory(NamedTuple):
    """Bytes: `weights` and `training` state (adapters, gradients, optimizer, buffers) for any batch, and `row` for each row of
    a micro-batch."""

    weights: int
    training: int
    row: int

    def of(self, rows: int) -> int:
        return self.weights + self.training + rows * self.row


class Widths(NamedTuple):
    """Hidden width, intermediate width and number of layers of one tower; zeros if it has none."""

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
    learned: int = ANSWER,
) -> Memory:
    """Estimate memory for rows of `tokens` text tokens, whose loss is taken at `learned` of them, and of `pictures` images;
    `groups` counts LoRA parameters by group."""
    lora = sum(groups.values())
    language, vision = widths(linears, "language"), widths(linears, "vision")
    seen = vision_tokens(config, tokens, pictures)
    trained = any(group.startswith("vision/") for group in groups)
    for_language, for_vision = kept_by_towers(linears, trained, kept, tokens, seen, family_in(config))
    reading = 2.0 * tokens * values(language, LAYER)
    if family_in(config).cross_attention:
        reading += 2 * CROSS * seen * language.hidden
    logits = 10.0 * vocabulary(config, linears)  # of a token: once in 16 and twice in 32 bits
    if not family_in(config).loss_divides:
        reading = max(reading, min(tokens, learned) * logits)  # our own loss
    elif not unsloth:
        reading += tokens * logits
    looking = 2.0 * seen * values(vision, VISION_LAYER) if trained else 0
    row = for_vision + max(for_language + reading, looking)  # the language model runs its backward first
    one = vision_tokens(config, tokens, 1)
    once = WORKSPACE + (0 if trained else 4 * LOOK * one * vision.hidden / (6432 * 1280))
    return Memory(weights_of(linears, parameters, precision), int(lora * (8 + OPTIMIZER_BYTES[optim]) + once), int(row))


def weights_of(linears: Mapping[str, Linear], parameters: int, precision: str) -> int:
    """Bytes of a base in memory. 4bit quantises its linear layers except the head; the rest stays in 16 bits."""
    if precision != "4bit":
        return {"16bit": 2, "32bit": 4}[precision] * parameters
    quantised = sum(layer.in_features * layer.out_features for name, layer in linears.items() if name != "lm_head")
    return int(2 * (parameters - quantised) + NF4_BYTES * quantised)


def weight_bytes(base: BaseFacts, precision: str) -> int:
    """Apply `weights_of` to a base's facts."""
    return weights_of(base.linears, base.parameters, precision)


def card_bytes(base: BaseFacts, precision: str, shards: int) -> int:
    """Bytes of a base on each of `shards` devices that share its language model (`job.model.sharding`): its share, the rest
    whole, and what is gathered at a time, which was not measured: three layers (one computes, the next arrives and is copied)
    and twice the embeddings or the head."""
    whole = weight_bytes(base, precision)
    if shards == 1:
        return whole
    layers = Counter[str]()
    for name, size in base.matrices.items():
        if match := re.match(r"model\.language_model\.layers\.\d+\.", name):
            layers[match[0]] += size
    table = vocabulary(base.config, base.linears) * int(base.config.get("text_config", {}).get("hidden_size", 0))
    shared = layers.total() + table + base.matrices.get("lm_head", 0)
    gathered = 3 * max(layers.values(), default=0) + 2 * table
    return int(whole / base.parameters * (base.parameters - shared + shared / shards + min(gathered, shared)))


def asked_row(
    config: Mapping[str, Any],
    linears: Mapping[str, Linear],
    tokens: int,
    pictures: int,
    new_tokens: int,
    learned: int = ANSWER,
) -> float:
    """Bytes per row during inference, without gradients: generation of `new_tokens` tokens, or the loss of `learned` tokens.

    The tower encodes all images of a batch first; its output stays beside keys and values, or beside the answers' logits.
    """
    language, vision = widths(linears, "language"), widths(linears, "vision")
    seen = vision_tokens(config, tokens, pictures)
    looking = LOOK * seen * vision.hidden / (6432 * 1280)
    keys = max(
        (layer.out_features for name, layer in linears.items() if name.endswith("k_proj")), default=language.hidden
    )
    cache = 2.0 * 2 * keys * language.layers * (tokens + new_tokens)
    logits = LOGIT_BYTES * min(tokens, learned) * vocabulary(config, linears)
    reading = 2.0 * tokens * values(language, FORWARD)
    if family_in(config).cross_attention:
        crossing = sum("cross_attn.q_proj" in name for name in linears)
        reading += 2.0 * seen * (CROSS * language.hidden + 2 * keys * crossing)
    return ASKED * max(looking, reading + max(cache, logits))


def served_precision(precision: str) -> str:
    """Precision in which merged weights are evaluated and served: 16 bits where the base was held in 4."""
    return "16bit" if precision == "4bit" else precision


def gate_batch(spec: JobSpec) -> int:
    """Micro-batch size of the gate and of occlusion maps."""
    return min(spec.evaluation.batch, GATE_ROWS)


def last_cure(precision: str) -> str:
    """Return the remaining cure when a model in `precision` and one row do not fit the GPU together."""
    return "use a GPU with more memory" if precision == "4bit" else "set model.precision to 4bit, or use a larger GPU"


def kept_by_towers(
    linears: Mapping[str, Linear], trained: bool, kept: Kept, tokens: int, seen: int, family: Family
) -> tuple[float, float]:
    """Bytes that one row of `tokens` text tokens and `seen` vision tokens keeps on the GPU for the backward, in the language
    model and, if it is `trained`, in the vision tower."""
    language, vision = widths(linears, "language"), widths(linears, "vision")
    looked = seen if trained else 0
    if kept == "all":
        of_layer, of_vision_layer = family.kept
        crossing = 2 * CROSS_KEPT * seen * language.hidden * sum("cross_attn.q_proj" in name for name in linears)
        layers = 2.0 * tokens * language.layers * values(language, of_layer)
        return layers + crossing, 2.0 * looked * vision.layers * values(vision, of_vision_layer)
    share = 1.0 if kept == "inputs" else ON_THEIR_WAY
    return share * 2 * tokens * language.hidden * language.layers, share * 2 * looked * vision.hidden * vision.layers


def values(tower: Widths, times: tuple[int, int]) -> int:
    return times[0] * tower.hidden + times[1] * tower.intermediate


def widths(linears: Mapping[str, Linear], tower: str) -> Widths:
    """Read the widths from the layers' shapes, because configurations omit default values."""
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
    """Return the maximum tokens of a row's images inside the vision tower."""
    family, vision = family_in(config), config.get("vision_config", {})
    patches = (int(vision.get("image_size", 560)) // int(vision.get("patch_size", 14))) ** 2
    if family.budgets:  # the processor pads each image to as many patches as its setting allows
        of_image = max((each for each in family.budgets if pictures * each <= tokens), default=family.budgets[0])
        return pictures * of_image * patches_per_token(config)
    if family.tiles is None:
        return max(patches_per_token(config) * tokens, pictures * patches if "image_size" in vision else 0)
    if not family.padded_tiles:
        return pictures * family.tiles * patches
    # Each tile has one extra token and is padded to a multiple of eight.
    return pictures * int(vision.get("max_num_tiles", family.tiles)) * -(-(patches + 1) // 8) * 8


def patches_per_token(config: Mapping[str, Any]) -> int:
    """Return how many patches of the tower are joined into one token of the text: by the names that the families give to the
    side of their square, or to its inverse; 4 where none is given."""
    vision = config.get("vision_config", {})
    for part, side in ((vision, "pooling_kernel_size"), (vision, "spatial_merge_size"), (config, "spatial_merge_size")):
        if part.get(side):
            return int(part[side]) ** 2
    if config.get("scale_factor"):
        return int(config["scale_factor"]) ** 2
    ratio = config.get("downsample_ratio") or vision.get("pixel_shuffle_ratio") or 0.5
    return round(1 / float(ratio) ** 2)


def family_in(config: Mapping[str, Any]) -> Family:
    return family_of(str(config.get("model_type")))


def vocabulary(config: Mapping[str, Any], linears: Mapping[str, Linear]) -> int:
    head = linears.get("lm_head")
    return head.out_features if head else int(config.get("text_config", {}).get("vocab_size", 0))
