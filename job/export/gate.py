"""The proof that merged weights do what base + adapter do: read back from disk, compared on held-out answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from job.errors import GateRefused
from job.evaluate.generate import base_or_tuned, to_device
from job.model import Loaded
from job.model.collator import IGNORE, Collator
from job.model.lora import group_of
from job.model.transformers_backend import load_processor, load_weights
from job.spec import GateSpec, JobSpec

ROUNDING = 0.01
"""Adapters that move logits by less (a trial of few steps) cannot be told from bfloat16's rounding of the weights. Nor can
those that move them by little beside the difference itself."""


@dataclass(frozen=True)
class Verdict:
    """Differences of logits are means of |a − b|, as a share of the standard deviation of base + adapter's logits.

    `token_agreement` is the share of tokens at which merged puts first what base + adapter does, or holds within
    `max_mean_logit_difference` of it. `groups` says of each group of layers how far base + adapter moves without its
    adapters (`effect`), and how far merged is from that (`difference_without`).
    """

    rows: int
    tokens: int
    mean_logit_difference: float
    max_logit_difference: float
    token_agreement: float
    mean_difference_from_base: float
    mean_effect_of_adapter: float
    groups: dict[str, dict[str, float]]

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def compare(spec: JobSpec, loaded: Loaded, adapter: Path, merged: Path, rows: Any) -> Verdict:
    """Logits of base + adapter and of the folder `merged`, token by token over the true answers of `rows`.

    Both in the precision that was trained in; where that is 4bit, both in 16 bits, which is what merged weights are made
    from and served in.
    """
    reference = in_16_bits(spec, loaded, adapter) if loaded.precision == "4bit" else loaded
    count = min(len(rows), spec.export.gate.rows)
    chosen = [rows[index * len(rows) // count] for index in range(count)]
    size = spec.evaluation.batch_size
    batches = [chosen[start : start + size] for start in range(0, count, size)]

    def logits(model: Loaded, tuned: bool = True) -> torch.Tensor:
        return torch.cat([answer_logits(model, batch, spec, tuned=tuned) for batch in batches])

    tuned, base = logits(reference), logits(reference, tuned=False)
    without: dict[str, torch.Tensor] = {}
    for group in reference.groups:
        with silenced(reference.model, group):
            without[group] = logits(reference)
    precision = reference.precision
    del reference  # its memory is wanted for the next one
    again = replace(
        loaded,
        model=load_weights(spec.model, merged, loaded.device, precision),
        processor=load_processor(spec.model, merged),
        precision=precision,
        backend="transformers",
    )
    folded = logits(again)
    scale = float(tuned.std())

    def apart(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).abs().mean()) / scale

    groups = {
        group: {"effect": apart(tuned, silent), "difference_without": apart(folded, silent)}
        for group, silent in without.items()
    }
    lost = tuned.amax(-1) - tuned.gather(-1, folded.argmax(-1, keepdim=True)).squeeze(-1)
    return Verdict(
        rows=count,
        tokens=tuned.shape[0],
        mean_logit_difference=apart(tuned, folded),
        max_logit_difference=float((tuned - folded).abs().max()) / scale,
        token_agreement=float((lost <= spec.export.gate.max_mean_logit_difference * scale).float().mean()),
        mean_difference_from_base=apart(base, folded),
        mean_effect_of_adapter=apart(base, tuned),
        groups=groups,
    )


def in_16_bits(spec: JobSpec, loaded: Loaded, adapter: Path) -> Loaded:
    """The base read again in 16 bits, with the adapter beside it, not folded."""
    from peft import PeftModel

    base = load_weights(spec.model, loaded.folder, loaded.device, "16bit")
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    return replace(loaded, model=model, precision="16bit", backend="transformers")


@contextmanager
def silenced(model: Any, group: str) -> Iterator[None]:
    """Base + adapter without the adapters of one group."""
    from peft.tuners.lora import LoraLayer

    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and (group_of(name) or "other") == group
    ]
    kept = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update(dict.fromkeys(layer.scaling, 0.0))
        yield
    finally:
        for layer, scaling in zip(layers, kept, strict=True):
            layer.scaling.update(scaling)


def refuse(result: Verdict, spec: GateSpec) -> None:
    """Raises GateRefused, saying which bound was crossed, or which adapters merged does without."""
    visible = max(ROUNDING, result.mean_logit_difference / 3)
    reasons = []
    if not result.mean_logit_difference <= spec.max_mean_logit_difference:
        reasons.append(
            f"mean logit difference {result.mean_logit_difference:.4f} is over "
            f"export.gate.max_mean_logit_difference {spec.max_mean_logit_difference:g}"
        )
    if not result.token_agreement >= spec.min_token_agreement:
        reasons.append(
            f"token agreement {result.token_agreement:.4f} is under export.gate.min_token_agreement "
            f"{spec.min_token_agreement:g}"
        )
    reasons += [
        f"the {group} adapters are not in them (they are nearer to base + adapter without those)"
        for group, found in result.groups.items()
        if found["effect"] > visible and found["difference_without"] < result.mean_logit_difference
    ]
    if result.mean_effect_of_adapter > visible and result.mean_difference_from_base < result.mean_logit_difference:
        reasons.append("they are nearer to the base than to base + adapter")
    if reasons:
        raise GateRefused(
            f"merged weights differ from base + adapter: {'; '.join(reasons)}; the adapter is published, merged is not"
        )


@torch.inference_mode()
def answer_logits(loaded: Loaded, batch: list[dict[str, Any]], spec: JobSpec, *, tuned: bool) -> torch.Tensor:
    """Logits, float32 on the CPU, at the places that predict an answer token: shape (answer tokens, vocabulary)."""
    truncate = spec.dataset.over_length == "truncate"
    inputs = Collator(loaded.processor, spec.training.max_length, truncate=truncate)(batch)
    wanted = inputs.pop("labels")[:, 1:] != IGNORE
    with base_or_tuned(loaded, tuned):
        logits = loaded.model(**to_device(inputs, loaded)).logits[:, :-1]
    chosen: torch.Tensor = logits.float().cpu()[wanted]
    return chosen
