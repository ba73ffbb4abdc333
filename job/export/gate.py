"""The proof that merged weights do what base + adapter do: read back from disk, compared on held-out answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from job.errors import GateRefused
from job.evaluate.generate import base_or_tuned, to_device
from job.model import Loaded
from job.model.collator import IGNORE, Collator
from job.model.transformers_backend import load_processor, load_weights
from job.spec import GateSpec, JobSpec

ROUNDING = 0.01
"""An adapter that moves logits by less (a trial of few steps) cannot be told from bfloat16's rounding of the weights."""


@dataclass(frozen=True)
class Verdict:
    """Differences of logits are means of |a − b|, as a share of the standard deviation of base + adapter's logits."""

    rows: int
    tokens: int
    mean_logit_difference: float
    max_logit_difference: float
    token_agreement: float
    mean_difference_from_base: float
    mean_effect_of_adapter: float

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def compare(spec: JobSpec, loaded: Loaded, merged: Path, rows: Any) -> Verdict:
    """Logits of base + adapter and of the folder `merged`, token by token over the true answers of `rows`."""
    count = min(len(rows), spec.export.gate.rows)
    chosen = [rows[index * len(rows) // count] for index in range(count)]
    size = spec.evaluation.batch_size
    batches = [chosen[start : start + size] for start in range(0, count, size)]
    tuned = [answer_logits(loaded, batch, spec, tuned=True) for batch in batches]
    base = [answer_logits(loaded, batch, spec, tuned=False) for batch in batches]
    again = replace(
        loaded,
        model=load_weights(spec.model, merged, loaded.device, loaded.precision),
        processor=load_processor(spec.model, merged),
    )
    folded = [answer_logits(again, batch, spec, tuned=True) for batch in batches]
    return verdict(torch.cat(tuned), torch.cat(folded), torch.cat(base), count)


def verdict(tuned: torch.Tensor, merged: torch.Tensor, base: torch.Tensor, rows: int) -> Verdict:
    """Measure three sets of logits of shape (answer tokens, vocabulary)."""
    scale = float(tuned.std())
    difference = (tuned - merged).abs()
    return Verdict(
        rows=rows,
        tokens=tuned.shape[0],
        mean_logit_difference=float(difference.mean()) / scale,
        max_logit_difference=float(difference.max()) / scale,
        token_agreement=float((tuned.argmax(-1) == merged.argmax(-1)).float().mean()),
        mean_difference_from_base=float((base - merged).abs().mean()) / scale,
        mean_effect_of_adapter=float((base - tuned).abs().mean()) / scale,
    )


def refuse(result: Verdict, spec: GateSpec) -> None:
    """Raises GateRefused, saying which bound was crossed."""
    if not result.mean_logit_difference <= spec.max_mean_logit_difference:
        raise GateRefused(
            f"merged weights differ from base + adapter: mean logit difference {result.mean_logit_difference:.4f} is over "
            f"export.gate.max_mean_logit_difference {spec.max_mean_logit_difference:g}; the adapter is published, merged is not"
        )
    if not result.token_agreement >= spec.min_token_agreement:
        raise GateRefused(
            f"merged weights differ from base + adapter: token agreement {result.token_agreement:.4f} is under "
            f"export.gate.min_token_agreement {spec.min_token_agreement:g}; the adapter is published, merged is not"
        )
    told_apart = result.mean_effect_of_adapter > ROUNDING
    if told_apart and result.mean_difference_from_base < result.mean_logit_difference:
        raise GateRefused(
            "merged weights are nearer to the base than to base + adapter: the adapter is not in them; the adapter is "
            "published, merged is not"
        )


@torch.inference_mode()
def answer_logits(loaded: Loaded, batch: list[dict[str, Any]], spec: JobSpec, *, tuned: bool) -> torch.Tensor:
    """Logits, float32 on the CPU, at the places that predict an answer token: shape (answer tokens, vocabulary)."""
    inputs = Collator(loaded.processor, spec.training.max_length)(batch)
    wanted = inputs.pop("labels")[:, 1:] != IGNORE
    with base_or_tuned(loaded, tuned):
        logits = loaded.model(**to_device(inputs, loaded)).logits[:, :-1]
    chosen: torch.Tensor = logits.float().cpu()[wanted]
    return chosen
