"""Loads models with Unsloth. The only module that imports it, and before transformers, which Unsloth patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import unsloth  # noqa: F401 - first, see above

import torch  # isort: skip

from job.config.schema import JobSpec
from job.errors import OutOfMemory, SpecError, is_host_memory
from job.model.generation import greedy
from job.model.loaded import Loaded
from job.model.lora_targets import census, parameters, targets
from job.model.memory_model import Kept, last_cure
from job.model.patches.layer_norm import without_casts
from job.model.patches.rms_norm import fuse_rms_norms
from job.model.patches.unsloth_flex_attention import without_flex_attention
from job.model.patches.unsloth_pad_token import vocabulary_kept
from job.model.transformers_backend import (
    adapted,
    begin_from,
    first_line,
    linears,
    load_processor,
    lora_settings,
    patched,
    tables,
)

OFFLOADED = 512
"""Below this `max_seq_length`, Unsloth keeps the layers' inputs on the GPU whatever it is asked for."""


RECOMPUTING: dict[Kept, bool | str] = {"all": False, "inputs": True, "nothing": "unsloth"}


def load(spec: JobSpec, folder: Path, device: torch.device, start: Path | None, precision: str, kept: Kept) -> Loaded:
    """Like `transformers_backend.load`, with Unsloth's kernels and activation checkpointing."""
    from unsloth import FastVisionModel

    recomputing = RECOMPUTING[kept]
    try:
        with vocabulary_kept():
            model, _ = FastVisionModel.from_pretrained(
                str(folder),
                max_seq_length=max(spec.training.max_length, OFFLOADED),
                dtype=torch.bfloat16,
                load_in_4bit=precision == "4bit",
                use_gradient_checkpointing=recomputing,
                trust_remote_code=spec.model.trust_remote_code,
            )
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"the base model does not fit the GPU; {last_cure(precision)}") from error
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
    ) as error:  # out of memory is a RuntimeError too, so it comes first
        if is_host_memory(error):
            raise
        raise SpecError(
            f"model.name_or_path: {folder} is not a model that Unsloth loads: {first_line(error)}"
        ) from error
    if precision == "4bit" and not getattr(model, "is_loaded_in_4bit", False):
        raise SpecError(
            "model.precision: Unsloth loaded the base in 16 bits, because bitsandbytes does not work here; mend it (python -m "
            "bitsandbytes says what is wrong), or choose 16bit"
        )
    if spec.model.attn_implementation == "sdpa":
        without_flex_attention(model)
    patched(spec.model, model)
    without_casts(model)
    fuse_rms_norms(model)
    processor = load_processor(spec.model, folder)
    model.generation_config = greedy(processor, folder)
    layers = linears(model)
    chosen = targets(spec.lora, layers, tables(model))
    counts = parameters(spec.lora.r, layers, chosen)
    model = FastVisionModel.get_peft_model(
        model,
        **lora_settings(spec.lora, chosen),
        target_parameters=[],  # if left out, Unsloth adds the fused experts of a mixture to the layers that are named
        random_state=spec.training.seed,
        use_gradient_checkpointing=recomputing,
    )
    census(chosen, adapted(model))
    if start is not None:
        begin_from(model, spec.lora, start, layers)
    return Loaded(model.eval(), processor, folder, "unsloth", precision, device, counts)


def for_training(model: Any) -> None:
    from unsloth import FastVisionModel

    FastVisionModel.for_training(model)


def for_generation(model: Any) -> None:
    from unsloth import FastVisionModel

    FastVisionModel.for_inference(model)
