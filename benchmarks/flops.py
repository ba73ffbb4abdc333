"""Floating-point operations of training, by formula, for the share of the card's limit that a flow reaches (MFU).

A linear layer of `in × out` weights takes 2 · in · out operations a token, and attention 4 · queries · keys · width: q·kᵀ and
the product with v, masked or not, as PaLM's appendix B counts (Chowdhery et al., 2022). Norms, activations and embeddings are
left out.

- Forward: each layer once, over its own tokens. A tower's own layers see its tokens; keys and values of cross-attention see the
  image's; a layer of the connector sees as many as its input is wide: the image's, or a quarter of them where four are joined
  to one. The head sees the tokens whose loss is taken.
- Backward of a frozen weight: once more, for the gradient of its input; of attention: twice, since both factors have one.
- LoRA adds r · (in + out) weights to a layer, whose own gradient is taken too: three times the forward.
- Nothing is counted twice for being recomputed: MFU is about the work that the model needs, not what a flow makes of it.

tests/test_flops.py compares forward and backward with what PyTorch's FlopCounterMode counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from job.model.lora_targets import Linear, group_of

PEAK = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12}
"""Dense bf16 operations a second, by the vendor's data sheet."""


OF_512 = {
    "mllama": (6432, 6432, 1),
    "qwen2_5_vl": (1296, 218, 4),
    "qwen3_vl": (1024, 1024, 4),
    "qwen3_5": (1024, 1024, 4),
    "gemma3": (4096, 4096, 1),
    "internvl": (1025, 1025, 4),
}
"""Of an image of 512 × 512 pixels: tokens inside the tower, padding included; how many attend to each other (Qwen2.5-VL: 64 in 28
of 32 layers); and how many the connector joins to one."""


@dataclass(frozen=True)
class Row:
    """Tokens of one row: of its text (image tokens in it included), of those whose loss is taken, of its images inside the
    vision tower, and how many of these attend to each other."""

    text: int
    answers: int
    seen: int
    window: int


def forward(linears: Mapping[str, Linear], row: Row, joined: int = 1) -> dict[str, float]:
    """Operations of one row's forward pass, of `weights` and of `attention`, and of the vision tower's part of both."""
    found = {"weights": 0.0, "attention": 0.0, "vision weights": 0.0, "vision attention": 0.0}
    for name, layer in linears.items():
        group, leaf = group_of(name) or "", name.rpartition(".")[2]
        vision = group.startswith("vision/")
        tokens = row.text
        if vision or ("cross_attn" in name and leaf in ("k_proj", "v_proj")):
            tokens = row.seen
        elif name == "lm_head":
            tokens = row.answers
        elif not group.startswith("language/"):
            tokens = row.seen // joined
        found["vision weights" if vision else "weights"] += 2.0 * layer.in_features * layer.out_features * tokens
        if leaf in ("q_proj", "qkv"):
            width = layer.in_features if leaf == "qkv" else layer.out_features
            keys = row.window if vision else row.seen if "cross_attn" in name else row.text
            found["vision attention" if vision else "attention"] += 4.0 * tokens * keys * width
    return found


def training(linears: Mapping[str, Linear], row: Row, *, vision: bool, joined: int = 1) -> float:
    """Operations that one row of training needs, LoRA's own left out, which are below 1 %. With `vision`, gradients flow through
    the vision tower; else its forward alone is counted."""
    part = forward(linears, row, joined)
    language = 2 * part["weights"] + 3 * part["attention"]
    tower = (2, 3) if vision else (1, 1)
    return language + tower[0] * part["vision weights"] + tower[1] * part["vision attention"]


def share_of_peak(
    config: Mapping[str, Any], linears: Mapping[str, Linear], text: float, speed: float, *, vision: bool, gpu: str
) -> float | None:
    """Share of the card's bf16 limit that `speed` rows a second of `text` tokens and an image of 512 pixels reach; None where
    the card or the family is not known here, as no mixture is, whose experts are not counted."""
    family = str(config.get("model_type"))
    if gpu not in PEAK or family not in OF_512:
        return None
    seen, window, joined = OF_512[family]
    answers = text if joined == 1 else text - seen / joined
    row = Row(round(text), round(answers), seen, window)
    return speed * training(linears, row, vision=vision, joined=joined) / PEAK[gpu]
