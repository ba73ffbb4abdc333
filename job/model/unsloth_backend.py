"""The boundary on Unsloth. The only module that imports it, and before transformers, which it patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import unsloth  # noqa: F401 - first, see above

import torch  # isort: skip

from job.errors import OutOfMemory, SpecError
from job.model import Loaded
from job.model.lora import census, parameters, pattern, targets
from job.model.transformers_backend import adapted, linears, load_adapter, load_processor
from job.spec import JobSpec


def load(spec: JobSpec, folder: Path, device: torch.device, start: Path | None, precision: str) -> Loaded:
    """As `transformers_backend.load`, on Unsloth's kernels and its gradient checkpointing."""
    from unsloth import FastVisionModel

    try:
        model, _ = FastVisionModel.from_pretrained(
            str(folder),
            max_seq_length=spec.training.max_length,
            dtype=torch.bfloat16,
            load_in_4bit=precision == "4bit",
            use_gradient_checkpointing="unsloth",
            trust_remote_code=spec.model.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise SpecError(f"model.name_or_path: {folder} is not a model that Unsloth loads: {first}") from error
    except torch.OutOfMemoryError as error:
        raise OutOfMemory("the base model does not fit the GPU; set model.precision to 4bit") from error
    lora = spec.lora
    chosen = targets(lora, linears(model))
    counts = parameters(lora.r, linears(model), chosen)
    model = FastVisionModel.get_peft_model(
        model,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        target_modules=pattern(chosen),
        random_state=spec.training.seed,
        use_gradient_checkpointing="unsloth",
    )
    census(chosen, adapted(model))
    if start is not None:
        load_adapter(model, start)
    return Loaded(model.eval(), load_processor(spec.model, folder), folder, "unsloth", precision, device, counts)


def for_training(model: Any) -> None:
    from unsloth import FastVisionModel

    FastVisionModel.for_training(model)


def for_generation(model: Any) -> None:
    from unsloth import FastVisionModel

    FastVisionModel.for_inference(model)
