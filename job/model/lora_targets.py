"""Chooses the layers that receive LoRA from their names, and verifies the choice afterwards.

Upstream defaults differ by model and backend, and requesting vision layers has been a silent no-op on some. So this module
sorts all linear layers into groups by name, adapts exactly the requested groups, and the census checks which layers
received adapters. No torch: `check` runs this on the headers of weight files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from job.config.schema import LoraSpec
from job.errors import SpecError

CONNECTOR = "connector"
GROUPS = ("vision/attention", "vision/mlp", "language/attention", "language/mlp", CONNECTOR)
VISION = frozenset({"vision_tower", "vision_model", "vision_encoder", "vision", "visual", "image_encoder", "vit"})
AUDIO = frozenset({"audio_tower", "audio_model", "audio_encoder"})
CONNECTORS = re.compile(r"projector|connector|merger|resampler|aligner|perceiver|embed_vision|vision_adapter")
ATTENTION = frozenset({"self_attn", "attn", "attention", "cross_attn", "self_attention", "linear_attn"})
MLP = frozenset({"mlp", "feed_forward", "ffn"})
EXPERTS, ROUTERS = "experts", frozenset({"gate", "router", "shared_expert_gate"})
"""No group has them: routed experts are fused tensors once loaded, and routers stay as they were trained."""
ALL, HEAD = "all-linear", "lm_head"
MOST_ALONE = 0.2
"""Share of a tower's weights without adapters, though asked for, above which the plan warns."""


class Linear(NamedTuple):
    """Shape of a linear layer's weight: (out_features, in_features)."""

    out_features: int
    in_features: int


def is_fused(name: str) -> bool:
    """Tell whether a layer of the weight files becomes part of a fused tensor, or of a router, and no linear layer."""
    return EXPERTS in name.split(".") or name.rpartition(".")[2] in ("gate", "router")


def group_of(name: str) -> str | None:
    """Return the group of a layer by its dotted name; None for layers without LoRA (heads, embeddings, audio towers, routed
    experts and their routers).

    In a tower, only layers inside a numbered block count: `…layers.3.self_attn.q_proj`, `…blocks.0.mlp.fc1`.
    """
    parts, tower = name.split("."), _tower(name)
    if tower is None or EXPERTS in parts or parts[-1] in ROUTERS:
        return CONNECTOR if _in_connector(parts) else None
    if ATTENTION.intersection(parts):
        return f"{tower}/attention"
    return f"{tower}/mlp" if MLP.intersection(parts) else None


def asked_for(spec: LoraSpec) -> list[str]:
    """Return the groups selected by the `finetune_` fields."""
    towers = [("vision", spec.finetune_vision_layers), ("language", spec.finetune_language_layers)]
    parts = [("attention", spec.finetune_attention_modules), ("mlp", spec.finetune_mlp_modules)]
    groups = [f"{tower}/{part}" for tower, take in towers for part, also in parts if take and also]
    return [*groups, CONNECTOR] if spec.finetune_connector else groups


def targets(spec: LoraSpec, linears: Iterable[str], tables: Iterable[str] = ()) -> list[str]:
    """Return the names of the layers to adapt. Raises SpecError when the model lacks all groups requested of a tower, has no
    linear layer in its connector, or when the spec names one of the `tables`: embeddings, convolutions, and a tied head."""
    linears = list(linears)
    if spec.target_modules is not None:
        if odd := [name for name in tables if spec.target_modules != ALL and _matches(name, spec.target_modules)]:
            raise SpecError(
                f"lora.target_modules: {spec.target_modules!r} names {odd[0]}, an embedding, a convolution or a head that shares "
                "the embedding's weights, and adapters are for linear layers; name those alone"
            )
        chosen = [name for name in linears if _matches(name, spec.target_modules)]
        if not chosen:
            raise SpecError(
                f"lora.target_modules: {spec.target_modules!r} matches none of the model's {len(linears)} linear layers"
            )
        return chosen
    members = {group: [name for name in linears if group_of(name) == group] for group in asked_for(spec)}
    for group in members:
        tower, _, part = group.partition("/")
        if not any(names for other, names in members.items() if other.startswith(tower)):
            if group == CONNECTOR:
                raise SpecError(
                    "lora: finetune_connector is true, but nothing between vision tower and language model is a linear layer (in "
                    "Gemma 3 it is a bare weight); set it to false"
                )
            switch = "attention" if part == "attention" else "mlp"
            raise SpecError(
                f"lora: finetune_{tower}_layers and finetune_{switch}_modules are true, but this model has no such "
                "layers; set one of them to false"
            )
    return [name for names in members.values() for name in names]


def left_alone(matrices: Mapping[str, int], chosen: Iterable[str]) -> dict[str, int]:
    """Sum the weights without adapters by kind: a group, `experts`, `routers`, `audio`, `lm_head`, or `other`.
    `matrices` maps the names of all modules with a matrix to the size of their weight."""
    adapted, found = set(chosen), Counter[str]()
    for name, size in matrices.items():
        if name not in adapted:
            found[_kind(name)] += size
    return dict(found.most_common())


def _kind(name: str) -> str:
    parts = name.split(".")
    if EXPERTS in parts:
        return "experts"
    if AUDIO.intersection(parts):
        return "audio"
    if group := group_of(name):
        return group
    return "routers" if parts[-1] in ROUTERS else HEAD if parts[-1] == HEAD else "other"


def unreached(spec: LoraSpec, matrices: Mapping[str, int], chosen: Iterable[str]) -> dict[str, float]:
    """Return for each tower to be adapted the share of its weights that no group reaches, if over `MOST_ALONE`."""
    asked, adapted = asked_for(spec), set(chosen)
    found = dict[str, float]()
    for tower in ("vision", "language") if spec.target_modules is None else ():
        inside = {name: size for name, size in matrices.items() if _tower(name) == tower}
        alone = sum(size for name, size in inside.items() if name not in adapted and group_of(name) is None)
        if {f"{tower}/attention", f"{tower}/mlp"} <= {*asked} and alone > MOST_ALONE * sum(inside.values()):
            found[tower] = alone / sum(inside.values())
    return found


def _tower(name: str) -> str | None:
    """Return the tower whose numbered blocks hold a module."""
    parts = name.split(".")
    if AUDIO.intersection(parts) or _in_connector(parts) or not any(part.isdigit() for part in parts):
        return None
    return "vision" if VISION.intersection(parts) else "language"


def _in_connector(parts: list[str]) -> bool:
    return not AUDIO.intersection(parts) and any(CONNECTORS.search(part) for part in parts)


def _matches(name: str, wanted: str | list[str]) -> bool:
    """Apply PEFT's rule: a string is a full regular expression, or `all-linear` for all but the head; a list holds names or
    suffixes."""
    if wanted == ALL:
        return name.rpartition(".")[2] != HEAD
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == item or name.endswith(f".{item}") for item in wanted)


def pattern(names: Iterable[str]) -> str:
    """Build a regular expression that matches exactly these names, grouping block numbers to keep it short."""
    blocks: dict[tuple[str, str], list[str]] = {}
    for name in sorted(names):
        before, number, after = (
            re.split(r"\.(\d+)\.", name, maxsplit=1) if re.search(r"\.\d+\.", name) else (name, "", "")
        )
        blocks.setdefault((before, after), []).append(number)
    return "|".join(
        rf"(?:{re.escape(before)}\.(?:{'|'.join(numbers)})\.{re.escape(after)})"
        if after
        else f"(?:{re.escape(before)})"
        for (before, after), numbers in blocks.items()
    )


def parameters(r: int, linears: Mapping[str, Linear], chosen: Iterable[str]) -> dict[str, int]:
    """Count LoRA parameters by group: r × (in + out) per layer (Hu et al., 2021, section 4.1)."""
    counts: dict[str, int] = {}
    for name in chosen:
        layer, group = linears[name], group_of(name) or "other"
        counts[group] = counts.get(group, 0) + r * (layer.in_features + layer.out_features)
    return counts


def census(expected: Iterable[str], adapted: Iterable[str]) -> None:
    """Check that exactly the requested layers received adapters. Raises SpecError naming a layer and its group."""
    wanted, got = set(expected), set(adapted)
    for what, names in (("received no adapter", wanted - got), ("received an unexpected adapter", got - wanted)):
        if names:
            first = min(names)
            raise SpecError(
                f"lora: {len(names)} layer(s) {what}, first {first} ({group_of(first) or 'no group'}); "
                "choose other finetune_ groups or name the layers in lora.target_modules"
            )
