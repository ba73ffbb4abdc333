"""The loss of a step: cross-entropy per answer token, over all micro-batches and ranks, with rows weighted where asked."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from job.model.collator import IGNORE
from job.model.image_layout import WEIGHTS
from job.model.loaded import logits_at


def token_loss(model: Any, inputs: dict[str, Any], divisor: torch.Tensor | float | None) -> torch.Tensor:
    """Σ over rows of weight × Σ over answer tokens of cross-entropy, divided by `divisor`: the whole step's from
    `count_tokens`, else this batch's.

    It is computed from the logits, for models that do not divide their own loss by the tokens of a step. With all weights 1 it
    equals the loss of those that do.
    """
    labels, weights = inputs["labels"], inputs.get(WEIGHTS)
    if divisor is None:
        divisor = count_tokens([inputs])
    wanted = labels[:, 1:] != IGNORE
    seen = {name: value for name, value in inputs.items() if name not in ("labels", WEIGHTS)}
    columns = wanted.any(dim=0).nonzero()[:, 0]
    logits = logits_at(model, seen, columns)[wanted[:, columns]].float()
    losses = cross_entropy(logits, labels[:, 1:][wanted], reduction="none")
    if weights is not None:
        losses = losses * weights[:, None].expand_as(wanted)[wanted]
    return losses.sum() / torch.as_tensor(divisor, device=losses.device).clamp(min=1e-6)


def count_tokens(batches: list[dict[str, Any]]) -> torch.Tensor:
    """Count answer tokens, each multiplied by its row's weight."""
    return torch.stack([_tokens(batch["labels"], batch.get(WEIGHTS)) for batch in batches]).sum()


def _tokens(labels: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    of_rows = (labels[:, 1:] != IGNORE).sum(dim=1)
    return (of_rows if weights is None else of_rows * weights).sum()
