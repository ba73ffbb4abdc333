"""Weights of rows: two rows of weight one are one row of weight two, and a row of weight nought is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from job.model.collator import Collator
from job.model.families import family_of
from job.model.image_layout import WEIGHTS
from job.model.loaded import Loaded
from job.train.loss import count_tokens, token_loss
from tests.tiny import load_tiny, perturb, row


@pytest.fixture(scope="module")
def small(tiny: Callable[..., Path]) -> Loaded:
    return perturb(load_tiny(tiny("qwen2_5_vl")))


def batch_of(loaded: Loaded, rows: list[dict[str, Any]], weights: list[float]) -> dict[str, torch.Tensor]:
    return Collator(loaded.processor, 2048)(rows) | {WEIGHTS: torch.tensor(weights)}


ROWS = [row(1), row(2, "There is a nodule in the left upper zone."), row(3, "No.")]


def gradients(loaded: Loaded, loss: torch.Tensor) -> torch.Tensor:
    trained = [weight for weight in loaded.model.parameters() if weight.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained, allow_unused=True) if g is not None])


def test_all_of_weight_one_is_the_loss_of_the_model(small: Loaded):
    batch = batch_of(small, ROWS, [1.0, 1.0, 1.0])
    own = small.model(**{name: each for name, each in batch.items() if name != WEIGHTS}).loss
    torch.testing.assert_close(token_loss(small.model, dict(batch), None), own)


def test_a_weight_of_two_is_the_row_twice_and_of_nought_is_no_row(small: Loaded):
    weighted = token_loss(small.model, batch_of(small, ROWS, [2.0, 0.0, 1.0]), None)
    repeated = Collator(small.processor, 2048)([ROWS[0], ROWS[0], ROWS[2]])
    plain = small.model(**repeated).loss
    torch.testing.assert_close(weighted, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(small, weighted), gradients(small, plain), rtol=1e-3, atol=1e-6)


def test_parts_of_a_step_share_its_divisor(small: Loaded):
    parts = [batch_of(small, ROWS[:1], [0.5]), batch_of(small, ROWS[1:], [3.0, 1.0])]
    divisor = count_tokens(parts)
    summed = sum(token_loss(small.model, part, divisor) for part in parts)
    torch.testing.assert_close(summed, token_loss(small.model, batch_of(small, ROWS, [0.5, 3.0, 1.0]), None))


def test_a_step_of_no_weight_moves_nothing(small: Loaded):
    loss = token_loss(small.model, batch_of(small, ROWS, [0.0, 0.0, 0.0]), None)
    assert float(loss.detach()) == 0.0
    assert not gradients(small, loss).any()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_of_every_size_add_up_to_the_loss_of_the_whole(family: str, loaded: Loaded, size: int):
    """With the loss that the trainer takes for the family, from rows whose answers differ in length."""
    said = [
        "No.",
        "There is a nodule in the left upper zone.",
        "It is large.",
        "A fracture.",
        "Nothing.",
        "The heart is small.",
    ]
    rows = [row(number, answer) for number, answer in enumerate(said)]
    collate = Collator(loaded.processor, 2048)
    parts = [collate(rows[start : start + size]) for start in range(0, len(rows), size)]
    tokens = count_tokens(parts)

    def loss_of(part: dict[str, Any]) -> torch.Tensor:
        if family_of(family).loss_divides:
            return loaded.model(**part, num_items_in_batch=tokens).loss
        return token_loss(loaded.model, part, tokens)

    with torch.inference_mode():
        whole = token_loss(loaded.model, collate(rows), None)
        torch.testing.assert_close(sum(map(loss_of, parts)), whole, rtol=1e-4, atol=1e-5)
