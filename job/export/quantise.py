"""Quantises merged weights for serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from job.config.schema import ModelSpec
from job.export.merge import copy_rest
from job.model.lora_targets import CONNECTORS, HEAD, VISION
from job.model.transformers_backend import Offload, placement

TOWERS = "|".join(sorted(VISION))
UNTOUCHED = [f"re:.*{HEAD}", "re:.*embed_tokens.*", f"re:.*({TOWERS}).*", f"re:.*({CONNECTORS.pattern}).*"]


def write_nf4(spec: ModelSpec, merged: Path, into: Path, device: torch.device) -> Any:
    """Write a folder's merged weights in bitsandbytes' nf4 with double quantisation, and return the model."""
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = _load(spec, merged, device, quantization_config=nf4)
    copy_rest(merged, into)
    (into / "model.safetensors.index.json").unlink(missing_ok=True)  # fewer files hold it
    model.save_pretrained(into)
    return model


def write_compressed(
    scheme: str, spec: ModelSpec, merged: Path, into: Path, device: torch.device, offload: Offload | None = None
) -> Any:
    """Write a folder's merged weights in a scheme of compressed-tensors, file by file, as vLLM and SGLang serve it, and return
    the model.

    FP8_DYNAMIC has a scale for each row of a weight, and activations scaled dynamically; W4A16 has four bits, rounded to
    nearest, and a scale for each 128 columns. Neither needs data. Only the language model's layers are quantised, as in
    llm-compressor's own examples for vision models.
    """
    from llmcompressor.entrypoints.model_free import model_free_ptq

    model_free_ptq(merged, into, scheme=scheme, ignore=UNTOUCHED, device=device)
    return _load(spec, into, device, offload)


def _load(spec: ModelSpec, folder: Path, device: torch.device, offload: Offload | None = None, **how: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        attn_implementation=spec.attn_implementation,
        trust_remote_code=spec.trust_remote_code,
        **placement(device, offload),
        **how,
    )
    return model.eval()
