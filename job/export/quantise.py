"""Quantises merged weights for serving."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from job.config.schema import JobSpec, ModelSpec
from job.errors import JobError
from job.export.logits import spread_rows
from job.export.merge import copy_rest
from job.model.base_model import json_object
from job.model.collator import Collator
from job.model.loaded import Loaded, release
from job.model.lora_targets import CONNECTORS, HEAD, VISION
from job.model.memory_model import CALIBRATION_ROWS
from job.model.oom_retry import free_cached
from job.model.transformers_backend import Offload, placement

log = logging.getLogger("job")
INDEX = "model.safetensors.index.json"

STEPS, BATCH = 200, 8
"""Steps of auto-round for each layer, and rows of a step: its own defaults."""
TOWERS = "|".join(sorted(VISION))
UNTOUCHED = [
    f"re:.*{HEAD}",
    "re:.*embed_tokens.*",
    "re:.*conv1d.*",
    f"re:.*({TOWERS}).*",
    f"re:.*({CONNECTORS.pattern}).*",
]


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
    (into / INDEX).unlink(missing_ok=True)  # fewer files hold it
    model.save_pretrained(into)
    return model


def write_fp8(spec: ModelSpec, merged: Path, into: Path, device: torch.device, offload: Offload | None = None) -> Any:
    """Write a folder's merged weights in FP8, and return the model: a scale for each row of a weight, and activations scaled
    dynamically. It needs no data."""
    return _rounded("FP8_DYNAMIC", spec, merged, into, device, offload)


def write_int4(
    spec: ModelSpec,
    merged: Path,
    into: Path,
    device: torch.device,
    processor: Any,
    calibration: Sequence[Mapping[str, Tensor]],
    offload: Offload | None = None,
) -> Any:
    """Write a folder's merged weights in INT4 (W4A16: a scale for each 128 columns), and return the model.

    AutoRound (Cheng et al., 2024) tunes the rounding of each layer of the language model by signed gradient descent, so that
    its output on the `calibration` inputs of the model, one row each, stays what it was. A model that it cannot handle, or a
    GPU too small for it, has its weights rounded to the nearest, with a warning. So have all without `calibration` inputs.
    """
    if calibration:
        try:
            _tune(_load(spec, merged, device, offload), merged, into, processor, calibration)
            return _load(spec, into, device, offload)
        except JobError:
            raise
        except Exception as error:  # whatever the libraries raise; hours of training are behind
            log.warning("merged_int4/ is rounded to the nearest, since auto-round failed: %s", str(error)[:300])
        shutil.rmtree(into, ignore_errors=True)
        free_cached()
    return _rounded("W4A16", spec, merged, into, device, offload)


def _tune(model: Any, merged: Path, into: Path, processor: Any, calibration: Sequence[Mapping[str, Tensor]]) -> None:
    from llmcompressor import oneshot, reset_session
    from llmcompressor.modifiers.autoround import AutoRoundModifier
    from torch.utils.data import DataLoader

    rows = len(calibration)
    recipe = AutoRoundModifier(
        targets="Linear",
        scheme="W4A16",
        ignore=UNTOUCHED,
        iters=STEPS,
        batch_size=min(BATCH, rows),
        enable_torch_compile=False,
    )
    reset_session()
    try:
        oneshot(
            model=model,
            processor=processor,
            dataset=DataLoader(calibration, batch_size=None),  # type: ignore[arg-type]
            recipe=recipe,
            num_calibration_samples=rows,
            shuffle_calibration_samples=False,
            pipeline="sequential",
        )
        copy_rest(merged, into)
        (into / INDEX).unlink(missing_ok=True)  # fewer files hold it
        model.save_pretrained(into, save_compressed=True)
        config = json_object(into / "config.json")
        config["quantization_config"]["ignore"] = _ignored(config["quantization_config"]["ignore"])
        (into / "config.json").write_text(json.dumps(config, indent=2))
    finally:
        reset_session()
        release(model)


def _ignored(names: Sequence[str]) -> list[str]:
    """Return patterns for the layers that are not quantised, of their names in the files: loaders have other names for them."""
    others = [name for name in names if not any(re.match(pattern[3:], name) for pattern in UNTOUCHED)]
    return [*UNTOUCHED, *(f"re:.*{re.escape(name[max(name.find('layers.'), 0) :])}$" for name in others)]


def _rounded(
    scheme: str, spec: ModelSpec, merged: Path, into: Path, device: torch.device, offload: Offload | None
) -> Any:
    """Write in a scheme of compressed-tensors, rounded to the nearest, file by file, as vLLM and SGLang serve it. Only the
    language model's layers are quantised, as in llm-compressor's own examples for vision models."""
    from llmcompressor.entrypoints.model_free import model_free_ptq

    model_free_ptq(merged, into, scheme=scheme, ignore=UNTOUCHED, device=device)
    return _load(spec, into, device, offload)


def calibration_rows(loaded: Loaded, rows: Any, spec: JobSpec) -> list[dict[str, Tensor]]:
    """Return the model's inputs for at most `CALIBRATION_ROWS` training rows, spread evenly, one row each, on the CPU in
    bfloat16. None for Llama 3.2: auto-round 0.15 confuses the inputs of its cross-attention."""
    if loaded.model.config.model_type == "mllama":
        return []
    collate = Collator(loaded.processor, spec.training.max_length, truncate=spec.dataset.over_length == "truncate")
    return [_inputs(collate(batch)) for batch in spread_rows(rows, CALIBRATION_ROWS, 1)]


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    batch.pop("labels")
    return {name: each.bfloat16() if each.is_floating_point() else each for name, each in batch.items()}


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
