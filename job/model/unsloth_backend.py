"""The boundary on Unsloth. The only module that imports it, and before transformers, which it patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import unsloth  # noqa: F401 - first, see above

import torch  # isort: skip

from job.errors import OutOfMemory, SpecError
from job.model import Loaded, tiles
from job.model.compiling import keep_flex_attention_compiled
from job.model.lora import census, parameters, targets
from job.model.memory import Kept, last_cure
from job.model.transformers_backend import adapted, first_line, linears, load_adapter, load_processor, lora_settings
from job.spec import JobSpec

OFFLOADED = 512
"""Asked for a `max_seq_length` under this, Unsloth leaves the layers' inputs on the card whatever it was told."""


RECOMPUTING: dict[Kept, bool | str] = {"all": False, "inputs": True, "nothing": "unsloth"}


def load(spec: JobSpec, folder: Path, device: torch.device, start: Path | None, precision: str, kept: Kept) -> Loaded:
    """As `transformers_backend.load`, on Unsloth's kernels and its gradient checkpointing."""
    from unsloth import FastVisionModel

    recomputing = RECOMPUTING[kept]
    try:
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
        raise SpecError(
            f"model.name_or_path: {folder} is not a model that Unsloth loads: {first_line(error)}"
        ) from error
    keep_flex_attention_compiled()
    if spec.model.attn_implementation == "sdpa":
        tiles.install(model)
    chosen = targets(spec.lora, linears(model))
    counts = parameters(spec.lora.r, linears(model), chosen)
    model = FastVisionModel.get_peft_model(
        model,
        **lora_settings(spec.lora, chosen),
        random_state=spec.training.seed,
        use_gradient_checkpointing=recomputing,
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
