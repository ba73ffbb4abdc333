"""Which layers of a vision-language model LoRA goes to, decided by us from names alone, and counted afterwards.

Upstream's own choices differ by model and backend, and asking for vision layers has been a silent no-op on some. So
the names of all linear layers are sorted into four groups here, the adapter gets exactly the groups asked for, and
the census compares what the adapter really got. No torch: `check` uses the same on the headers of weight files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from job.errors import SpecError
from job.spec import LoraSpec

GROUPS = ("vision/attention", "vision/mlp", "language/attention", "language/mlp")
VISION = frozenset({"vision_tower", "vision_model", "vision_encoder", "vision", "visual", "image_encoder", "vit"})
CONNECTOR = re.compile(r"projector|connector|merger|resampler|aligner|perceiver")
ATTENTION = frozenset({"self_attn", "attn", "attention", "cross_attn", "self_attention"})
MLP = frozenset({"mlp", "feed_forward", "ffn"})
HEAD = "lm_head"


class Linear(NamedTuple):
    """A linear layer: weight of shape (out_features, in_features)."""

    out_features: int
    in_features: int


def group_of(name: str) -> str | None:
    """The group of a layer by its dotted name; None for what LoRA leaves alone (heads, embeddings, connectors).

    Only layers inside a numbered block count: `…layers.3.self_attn.q_proj`, `…blocks.0.mlp.fc1`.
    """
    parts = name.split(".")
    if not any(part.isdigit() for part in parts) or any(CONNECTOR.search(part) for part in parts):
        return None
    tower = "vision" if VISION.intersection(parts) else "language"
    if ATTENTION.intersection(parts):
        return f"{tower}/attention"
    return f"{tower}/mlp" if MLP.intersection(parts) else None


def asked_for(spec: LoraSpec) -> list[str]:
    """The groups that the four `finetune_` choices name."""
    towers = [("vision", spec.finetune_vision_layers), ("language", spec.finetune_language_layers)]
    parts = [("attention", spec.finetune_attention_modules), ("mlp", spec.finetune_mlp_modules)]
    return [f"{tower}/{part}" for tower, take in towers for part, also in parts if take and also]


def targets(spec: LoraSpec, linears: Iterable[str]) -> list[str]:
    """Names of the layers to adapt. Raises SpecError when a group asked for does not exist in this model."""
    linears = list(linears)
    if spec.target_modules is not None:
        chosen = [name for name in linears if _matches(name, spec.target_modules)]
        if not chosen:
            raise SpecError(
                f"lora.target_modules: {spec.target_modules!r} matches none of the model's {len(linears)} linear layers"
            )
        return chosen
    chosen = []
    for group in asked_for(spec):
        members = [name for name in linears if group_of(name) == group]
        if not members:
            tower, part = group.split("/")
            switch = "attention" if part == "attention" else "mlp"
            raise SpecError(
                f"lora: finetune_{tower}_layers and finetune_{switch}_modules are true, but this model has no such "
                "layers; set one of them to false"
            )
        chosen += members
    return chosen


def _matches(name: str, wanted: str | list[str]) -> bool:
    """PEFT's rule: a text is a full regular expression, or `all-linear` but for the head; a list holds names or endings."""
    if wanted == "all-linear":
        return name.rpartition(".")[2] != HEAD
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == item or name.endswith(f".{item}") for item in wanted)


def pattern(names: Iterable[str]) -> str:
    """A regular expression that matches exactly these names, kept short by gathering their block numbers."""
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
    """LoRA parameters by group: r × (in + out) for each layer (Hu et al., 2021, section 4.1)."""
    counts: dict[str, int] = {}
    for name in chosen:
        layer, group = linears[name], group_of(name) or "other"
        counts[group] = counts.get(group, 0) + r * (layer.in_features + layer.out_features)
    return counts


def census(expected: Iterable[str], adapted: Iterable[str]) -> None:
    """Stop unless exactly the layers asked for received adapters. Raises SpecError naming the group and a layer."""
    wanted, got = set(expected), set(adapted)
    for what, names in (("received no adapter", wanted - got), ("received an adapter unasked", got - wanted)):
        if names:
            first = min(names)
            raise SpecError(
                f"lora: {len(names)} layer(s) {what}, first {first} ({group_of(first) or 'no group'}); "
                "choose other finetune_ groups or name the layers in lora.target_modules"
            )
