"""Maps each tensor of an adapter to the base's files, exactly, or refuses it by name.

PEFT names layers as in the loaded model; `job.model.weight_map` maps these names to those of the files.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from job.errors import SpecError
from job.export.fold import Change, Lora, Whole
from job.model.weight_map import Base

WEIGHT = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])\.weight")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHER_ARITHMETIC = (
    *("fan_in_fan_out", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices", "use_qalora"),
    *("alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
    *("use_dora", "alpha_pattern", "modules_to_save"),
)
"""Settings of PEFT 0.21 that make an adapter more than scale·B·A, of one scale. The spec requests none of them."""


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read PEFT's configuration and tensors from an adapter's folder."""
    from safetensors.torch import load_file

    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def changes(base: Base, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Change]:
    """Return the adapter's changes by the files' tensor names. Raises SpecError naming the first one without a place."""
    if odd := [name for name in OTHER_ARITHMETIC if config.get(name)]:
        raise SpecError(f"export.merged: an adapter with {', '.join(odd)} cannot be merged; set merged to false")
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    found: dict[str, Change] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        if match := WEIGHT.fullmatch(name):
            parts[match["module"]][match["part"]] = tensor
        elif "lora_" in name:
            raise SpecError(f"export.merged: the adapter's {key} cannot be merged")
        else:
            name = name.replace(".base_layer.bias", ".bias")
            found[place(base, name, tensor.numel())] = Whole(tensor)
    for module, factors in parts.items():
        change = _lora(module, factors, config)
        size = change.b.shape[0] * change.a[0].numel()
        found[place(base, f"{module}.weight", size)] = change
    return found


def place(base: Base, name: str, size: int) -> str:
    """Return the files' name of the tensor that the loaded model calls `name` and that holds `size` numbers."""
    keys = [key for key, its in base.names.items() if its == name]
    if name in base.tied:
        raise SpecError(
            f"export.merged: the adapter changes {name}, which shares its weights with {base.tied[name]} in this base, so "
            "no merged model can hold it; leave it out of lora.target_modules, or set merged to false"
        )
    if len(keys) != 1:
        where = "several tensors for it" if keys else "no single tensor for it"
        raise SpecError(f"export.merged: the adapter changes {name}, and the base's files hold {where}")
    if base.slots[keys[0]].dtype not in DTYPES:
        raise SpecError(
            f"export.merged: the adapter changes {name}, which the base's files hold as {base.slots[keys[0]].dtype}"
        )
    if math.prod(base.slots[keys[0]].shape) != size:
        shape = "×".join(map(str, base.slots[keys[0]].shape))
        raise SpecError(
            f"export.merged: the adapter's change of {name} holds {size} numbers, the base's weight {shape}"
        )
    return keys[0]


def _lora(module: str, factors: dict[str, Tensor], config: Mapping[str, Any]) -> Lora:
    """Return one layer's factors with PEFT's scale: alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski, 2023)."""
    if factors.keys() != {"lora_A", "lora_B"}:
        raise SpecError(
            f"export.merged: the adapter holds {', '.join(sorted(factors))} of {module}, which is not a pair"
        )
    rank = factors["lora_A"].shape[0]
    scale = float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Lora(factors["lora_A"], factors["lora_B"], scale)
