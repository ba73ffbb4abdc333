"""16-bit weights with the adapter folded in, as an ordinary model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from job.model.transformers_backend import load_processor, load_weights
from job.spec import JobSpec


def merge(spec: JobSpec, base: Path, adapter: Path, into: Path) -> int:
    """Write `into`: base + adapter in 16 bits, with processor and generation config. Returns its size in bytes.

    The base is read again in 16 bits, whatever it was trained in: folding into 4-bit weights would bake their error in.
    Each weight is folded in float32 and rounded once.
    """
    from peft import PeftModel

    model = load_weights(spec.model, base, torch.device("cpu"), "16bit")
    tuned = PeftModel.from_pretrained(model, str(adapter))
    for module in tuned.modules():
        fold(module)
    whole = tuned.unload()
    whole.save_pretrained(into, max_shard_size=spec.export.max_shard_size)
    load_processor(spec.model, base).save_pretrained(into)
    return sum(file.stat().st_size for file in into.rglob("*") if file.is_file())


@torch.no_grad()
def fold(module: Any) -> None:
    """W ← W + s·B·A in place (Hu et al., 2021, equation 3), for a LoRA layer; other modules are left alone."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer):
        return
    weight = module.get_base_layer().weight
    for adapter in module.active_adapters:
        if adapter in module.lora_A:
            delta = module.get_delta_weight(adapter).float()
            weight.copy_((weight.float() + delta).to(weight.dtype))
