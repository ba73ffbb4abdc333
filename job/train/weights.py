"""Rows that count more or less than others: their loss is multiplied, and so is their share of what it is divided by."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from job.model.collator import IGNORE

WEIGHTS = "row_weights"
"""Key under which a batch carries them, shape (rows,); absent where the spec has no column for them."""


def weighted_loss(model: Any, inputs: dict[str, torch.Tensor], divisor: torch.Tensor | int | None) -> torch.Tensor:
    """Σ over rows of weight × Σ over answer tokens of cross-entropy, divided by `divisor`: that of the whole step from
    `sum_of_weights`, else this batch's. With all weights 1 it is the model's own loss.
    """
    weights, labels = inputs.pop(WEIGHTS), inputs.pop("labels")
    if divisor is None:
        divisor = sum_of_weights([{WEIGHTS: weights, "labels": labels}])
    wanted = labels[:, 1:] != IGNORE
    logits = model(**inputs).logits[:, :-1][wanted].float()
    losses = cross_entropy(logits, labels[:, 1:][wanted], reduction="none")
    of_tokens = weights[:, None].expand_as(wanted)[wanted]
    return (losses * of_tokens).sum() / torch.as_tensor(divisor, device=losses.device).clamp(min=1e-6)


def sum_of_weights(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Answer tokens, each as often as the weight of its row says."""
    return torch.stack(
        [(batch[WEIGHTS] * (batch["labels"][:, 1:] != IGNORE).sum(dim=1)).sum() for batch in batches]
    ).sum()
