"""Reads the adapter that a job starts from and checks that the job's own adapters can begin as the same function.

PEFT multiplies B·A by lora_alpha / r or lora_alpha / sqrt(r), and either can differ between layers. A job's adapters have the
spec's rank and scale everywhere, so a difference in scale is folded into B and a lower rank is padded with zeros in B, which
leaves the function unchanged. No torch: `check` runs this on the header of the weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.config.schema import LoraSpec
from job.errors import SpecError
from job.model.base_model import ADAPTER_FILES, module_name
from job.model.header import read_header
from job.model.lora_targets import Linear, targets

CONFIG, WEIGHTS = ADAPTER_FILES
FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
BIAS = re.compile(r"(?:base_model\.model\.)?(.+?)(?:\.base_layer)?\.bias")
UNLIKE = {
    "use_dora": "is a DoRA adapter",
    "modules_to_save": "holds whole modules beside its LoRA (modules_to_save)",
    "trainable_token_indices": "trains tokens of the embedding (trainable_token_indices)",
    "lora_bias": "has biases of its own (lora_bias)",
    "layer_replication": "repeats layers of its base (layer_replication)",
    "target_parameters": "adapts parameters that are no layer's weight (target_parameters)",
    "alora_invocation_tokens": "is an activated LoRA (alora_invocation_tokens)",
    "use_qalora": "is a QALoRA adapter",
    "use_bdlora": "is a block-diagonal LoRA",
    "arrow_config": "routes between adapters (arrow_config)",
    "kasa_config": "is a KaSA adapter, which changes the weights of its base too",
    "monteclora_config": "is a MonteCLoRA adapter",
}
"""Fields of PEFT's LoraConfig that, when set, make the adapter something other than W + scale·B·A."""
CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Values of PEFT's `init_lora_weights` that change the base first, so the adapter fits only that changed base."""
BIASES = {"none": (), "lora_only": ("lora_only",), "all": ("lora_only", "all")}
"""Kinds of bias the adapter may hold, by the job's own `lora.bias`."""


@dataclass(frozen=True)
class Factors:
    """LoRA of one layer: B·A of shape (out_features, in_features), its rank and its `scale`. `a` and `b` are keys in the file."""

    a: str
    b: str
    rank: int
    shape: Linear
    scale: float


@dataclass(frozen=True)
class InitAdapter:
    """An adapter in PEFT's format, by the layer names in its file. `biases` maps layer names to keys; `base` is the base model
    that it declares."""

    name: str
    weights: Path
    layers: Mapping[str, Factors]
    bias: str
    biases: Mapping[str, str]
    base: str


def read_init_adapter(name: str, folder: Path) -> InitAdapter:
    """Read the folder of `lora.init_adapter: name` without loading weights. Raises SpecError, naming the kind of adapter, for
    anything but plain LoRA in PEFT's format."""
    config = _config(name, folder / CONFIG)
    header, _ = read_header(folder / WEIGHTS, f"lora.init_adapter: {name}")
    shapes = {key: tuple(tensor["shape"]) for key, tensor in header.items()}
    found, biases = dict[str, dict[str, str]](), dict[str, str]()
    for key, tensor in header.items():
        if not tensor["dtype"].startswith(("F", "BF")):
            raise SpecError(_unlike(name, f"holds {tensor['dtype']} numbers instead of floating-point ones ({key})"))
        if factor := FACTOR.fullmatch(key):
            if factor[2] in found.get(factor[1], {}):
                raise SpecError(
                    f"lora.init_adapter: {WEIGHTS} of {name} holds {factor[2]} twice for {factor[1]}; save it again"
                )
            found.setdefault(factor[1], {})[factor[2]] = key
        elif bias := BIAS.fullmatch(key):
            biases[bias[1]] = key
        else:
            raise SpecError(_unlike(name, _what(key)))
    if not found:
        raise SpecError(f"lora.init_adapter: {WEIGHTS} of {name} holds no LoRA weights")
    layers = {layer: _factors(name, config, layer, keys, shapes) for layer, keys in found.items()}
    kind = str(config.get("bias", "none")) if biases else "none"
    return InitAdapter(
        name, folder / WEIGHTS, layers, kind, biases, str(config.get("base_model_name_or_path") or "unknown")
    )


def _config(name: str, file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"lora.init_adapter: {CONFIG} of {name} is not JSON") from error
    if not isinstance(config, dict):
        raise SpecError(f"lora.init_adapter: {CONFIG} of {name} is not a JSON object")
    if (kind := config.get("peft_type")) != "LORA":
        raise SpecError(_unlike(name, f"is of PEFT's type {kind}"))
    for field, what in UNLIKE.items():
        if config.get(field):
            raise SpecError(_unlike(name, what))
    begun = str(config.get("init_lora_weights")).lower()
    if begun.startswith(CHANGES_BASE):
        raise SpecError(
            f"lora.init_adapter: {name} was initialised with init_lora_weights: {begun}, which also changed its base model; "
            "save it with PEFT's path_initial_model_for_weight_conversion, which converts it to plain LoRA"
        )
    return config


def _unlike(name: str, what: str) -> str:
    return f"lora.init_adapter: {name} {what}, and a job starts from plain LoRA only; merge it into its base first"


def _what(key: str) -> str:
    if "lora_magnitude_vector" in key:
        return UNLIKE["use_dora"]
    if "lora_embedding" in key:
        return f"adapts an embedding ({key})"
    return f"holds whole weights beside its LoRA ({key})"


def _factors(
    name: str, config: Mapping[str, Any], layer: str, keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> Factors:
    if len(keys) != 2:
        raise SpecError(f"lora.init_adapter: {WEIGHTS} of {name} holds only one of A and B for {layer}")
    a, b = shapes[keys["A"]], shapes[keys["B"]]
    if len(a) != 2 or len(b) != 2:
        raise SpecError(_unlike(name, f"adapts {layer}, which is not a linear layer"))
    rank = _setting(name, config, "r", "rank_pattern", layer)
    if not 0 < rank == a[0] == b[1]:
        raise SpecError(
            f"lora.init_adapter: by its {CONFIG} {name} has rank {rank:g} at {layer}, by its weights {a[0]} in A and {b[1]} in B"
        )
    alpha = _setting(name, config, "lora_alpha", "alpha_pattern", layer)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Factors(keys["A"], keys["B"], a[0], Linear(b[0], a[1]), scale)


def _setting(name: str, config: Mapping[str, Any], field: str, pattern: str, layer: str) -> float:
    """Resolve a number for this layer as PEFT does: the first pattern that matches the end of the layer's name, else the
    common value; the default is 8 for both."""
    value = config.get(field, 8)
    try:
        for ending, number in (config.get(pattern) or {}).items():
            if re.fullmatch(rf"(.*\.)?({ending})", layer):
                value = number
                break
    except (AttributeError, re.error) as error:
        raise SpecError(f"lora.init_adapter: {pattern} in {CONFIG} of {name} is not a mapping of patterns") from error
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SpecError(f"lora.init_adapter: {field} in {CONFIG} of {name} is {value!r}, which is not a number")
    return value


def fitted(adapter: InitAdapter, lora: LoraSpec, linears: Mapping[str, Linear]) -> dict[str, Factors]:
    """Return the adapter's factors by the names in `linears`, which holds all linear layers of the base or model. Accepts
    names from before transformers 4.52.

    Raises SpecError when the job's own adapters cannot begin as the same function.
    """
    found = _renamed(adapter.layers, linears)
    for name, factors in found.items():
        if name in linears and linears[name] != factors.shape:
            raise SpecError(
                f"lora.init_adapter: {adapter.name} was made for another base model ({adapter.base}): {name} has "
                f"{_size(factors.shape)} there, and {_size(linears[name])} here"
            )
    strange = [name for name in found if name not in linears]
    if strange:
        raise SpecError(
            f"lora.init_adapter: {adapter.name} was made for another base model ({adapter.base}): {len(strange)} of its "
            f"{len(found)} layers are not in this one, first {min(strange)}"
        )
    _same_layers(adapter.name, set(found), set(targets(lora, linears)))
    suited(adapter, lora)
    return found


def suited(adapter: InitAdapter, lora: LoraSpec) -> None:
    """Check that the job's rank and biases can hold the adapter's. Raises SpecError with both values."""
    highest = max(adapter.layers, key=lambda name: adapter.layers[name].rank)
    if (rank := adapter.layers[highest].rank) > lora.r:
        raise SpecError(
            f"lora.init_adapter: {adapter.name} has rank {rank} at {highest}, and lora.r is {lora.r}; set lora.r to {rank}"
        )
    if adapter.biases and adapter.bias not in BIASES[lora.bias]:
        raise SpecError(
            f"lora.init_adapter: {adapter.name} was trained with bias: {adapter.bias}, and lora.bias is {lora.bias}; "
            f"set lora.bias to {adapter.bias}"
        )


def _renamed(layers: Mapping[str, Factors], linears: Iterable[str]) -> dict[str, Factors]:
    known = set(linears)
    return {name if name in known else module_name(name): factors for name, factors in layers.items()}


def _size(shape: Linear) -> str:
    return f"{shape.out_features}×{shape.in_features}"


def _same_layers(adapter: str, found: set[str], chosen: set[str]) -> None:
    for what, names in (("has nothing for", chosen - found), ("also adapts", found - chosen)):
        if names:
            raise SpecError(
                f"lora.init_adapter: {adapter} was made for other layers: it {what} {len(names)} of them, first {min(names)}; "
                "use the finetune_ choices or target_modules that it was trained with"
            )


def rescaled(adapter: InitAdapter, lora: LoraSpec) -> str:
    """Return a remark when the adapter's scale differs from the job's, else an empty string."""
    own = lora.lora_alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)
    scales = sorted({factors.scale for factors in adapter.layers.values()})
    if all(math.isclose(scale, own) for scale in scales):
        return ""
    theirs = " to ".join(f"{scale:g}" for scale in dict.fromkeys((scales[0], scales[-1])))
    return (
        f"lora.init_adapter: the scale of {adapter.name} is {theirs}, this job's is {own:g} (lora_alpha, r, use_rslora); its "
        "weights are rescaled, so that training starts from the same function"
    )


def other_base(adapter: InitAdapter, base: str) -> str:
    """Return a remark when both name a base on the hub and the names differ (ignoring the owner, for mirrors), else an empty
    string."""
    both = [adapter.base, base]
    if not all(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) for name in both):
        return ""
    theirs, ours = (name.rpartition("/")[2].lower().removesuffix("-bnb-4bit").removesuffix("-unsloth") for name in both)
    if theirs == ours:
        return ""
    return f"lora.init_adapter: {adapter.name} was made for {adapter.base}, and this job's base is {base}: it fits in shape only"
