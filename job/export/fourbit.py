"""Weights in 4 bits, by bitsandbytes: those that a base was held in while it trained, and merged ones for serving."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from job.export.merge import copy_rest
from job.spec import ModelSpec


def held_weights(model: Any) -> dict[str, Callable[[], Tensor]]:
    """For each weight that the model holds in 4 bits, by its name in the base: what it stands for, made when asked for."""
    found: dict[str, Callable[[], Tensor]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            layer = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            found[f"{layer}.weight"] = partial(_dequantised, weight, state)
    return found


def _dequantised(weight: Any, state: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    whole: Tensor = dequantize_4bit(weight.data, state)
    return whole


def quantise(spec: ModelSpec, merged: Path, into: Path, device: torch.device) -> Any:
    """Write the merged weights of a folder in nf4 with double quantisation, as `from_pretrained` loads them, and return the
    model."""
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForImageTextToText.from_pretrained(
        merged,
        dtype=torch.bfloat16,
        quantization_config=nf4,
        attn_implementation=spec.attn_implementation,
        trust_remote_code=spec.trust_remote_code,
        device_map={"": device},
    )
    copy_rest(merged, into)
    (into / "model.safetensors.index.json").unlink(missing_ok=True)
    model.save_pretrained(into)
    return model.eval()
