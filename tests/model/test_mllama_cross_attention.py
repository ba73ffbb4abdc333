"""Llama 3.2's cross-attention without a mask gives upstream's numbers and gradients, and leaves other masks to upstream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mllama.modeling_mllama import _prepare_cross_attention_mask

from job.model.collator import Collator
from job.model.loaded import Loaded
from job.model.patches.mllama_cross_attention import NAME, Sight, attention, sights
from tests.tiny import batch, load_tiny, perturb

KEYS = 5
"""Of one tile."""


@pytest.fixture(scope="module")
def loaded(tiny: Callable[..., Path]) -> Loaded:
    loaded = perturb(load_tiny(tiny("mllama")))
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if name.endswith(("attn_gate", "mlp_gate")):  # zero at first: nothing of an image would be seen
                weight.fill_(0.7)
    return loaded


def layers(loaded: Loaded) -> list[Any]:
    return [module for name, module in loaded.model.named_modules() if name.endswith(".cross_attn")]


def masks(loaded: Loaded, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Those that the cross-attention layers are given."""
    found = list[torch.Tensor]()
    hooks = [
        layer.register_forward_pre_hook(
            lambda _layer, _given, named: found.append(named["attention_mask"]), with_kwargs=True
        )
        for layer in layers(loaded)
    ]
    with torch.no_grad():
        loaded.model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def seen(loaded: Loaded, inputs: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of all tokens but padding, and gradients of the adapters, by the attention `name`."""
    for layer in layers(loaded):
        layer.config._attn_implementation = name
    logits = loaded.model(**inputs).logits[inputs["attention_mask"].bool()]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    trained = [weight for weight in loaded.model.parameters() if weight.requires_grad]
    return logits.detach(), list(torch.autograd.grad((logits * weights).mean(), trained))


def inputs_of(loaded: Loaded, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    inputs = Collator(loaded.processor, 512)(rows)  # type: ignore[arg-type]
    return {
        name: each
        for name, each in inputs.items()
        if name not in ("rows", "pictures", "picture_keys", "labels", "weights")
    }


def test_logits_and_gradients_are_those_with_the_mask(loaded: Loaded) -> None:
    inputs = inputs_of(loaded, batch())
    assert all(layer.config._attn_implementation == NAME for layer in layers(loaded))
    assert loaded.model.get_base_model().config.text_config._attn_implementation == "sdpa"
    found = sights(masks(loaded, inputs)[0])
    assert found is not None
    assert len(found) > 1, "the rows should differ"
    theirs, their_gradients = seen(loaded, inputs, "sdpa")
    ours, gradients = seen(loaded, inputs, NAME)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert any(float(each.abs().max()) > 1e-6 for each in gradients)
    for mine, yours in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-3, atol=1e-6)


def test_under_autocast_the_type_is_that_with_the_mask(loaded: Loaded) -> None:
    """The norm of queries, in 32 bits, gives queries of 32 bits, which the kernel is given in 16."""
    layer, tokens = layers(loaded)[0], [[0, 0], [1, 0], [1, 0]]
    mask = mask_of(tokens, [[1, 1]] * 3)
    query, key = torch.randn(2, layer.num_heads, 3, 8), torch.randn(2, layer.num_key_value_heads, 2 * KEYS, 8)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = ALL_ATTENTION_FUNCTIONS["sdpa"](layer, query, key, key, mask)[0]
        ours = attention(layer, query, key, key, mask)[0]
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_answers_are_those_with_the_mask(loaded: Loaded) -> None:
    """Prompts are padded on the left there."""
    rows = [{**row, "messages": row["messages"][:-1]} for row in batch()]
    texts = [loaded.processor.apply_chat_template(row["messages"], add_generation_prompt=True) for row in rows]
    loaded.processor.tokenizer.padding_side = "left"
    given = loaded.processor(
        images=[row["images"] for row in rows], text=texts, padding=True, return_tensors="pt", add_special_tokens=False
    )
    answers = []
    for name in ("sdpa", NAME):
        for layer in layers(loaded):
            layer.config._attn_implementation = name
        answers.append(loaded.model.generate(**given, max_new_tokens=12, do_sample=False))
    assert torch.equal(*answers)


def mask_of(*rows: list[list[int]], bools: bool = False) -> torch.Tensor:
    """Upstream's mask, of rows of tokens of the tiles that each sees (1) or does not (0)."""
    given = torch.tensor(rows)[:, :, None, :]
    mask, _ = _prepare_cross_attention_mask(given, KEYS, torch.float32)  # type: ignore[arg-type]
    return mask == 0 if bools else mask


@pytest.mark.parametrize("bools", [False, True])
def test_what_each_token_sees_is_read_from_the_mask(bools: bool) -> None:
    nothing, first, all_ = [0, 0], [1, 0], [1, 1]
    before = [nothing, nothing, first, first, first]
    padded = [nothing, nothing, first, first, nothing]
    at_once, whole, no_image = [first] * 5, [nothing, *[all_] * 4], [nothing] * 5
    found = sights(mask_of(before, padded, at_once, whole, no_image, bools=bools))
    assert found == [Sight([2], 0, KEYS), Sight([0, 1], 2, KEYS), Sight([3, 4], 5, 2 * KEYS)]


@pytest.mark.parametrize(
    "row",
    [
        [[1, 0], [1, 0], [0, 1], [0, 1], [0, 1]],
        [[1, 0], [1, 0], [1, 1], [1, 0], [1, 0]],
        [[0, 1], [0, 1], [0, 1], [0, 1], [0, 1]],
    ],
    ids=["another image", "one more image", "not the first tile"],
)
def test_rows_of_another_kind_are_left_to_upstream(row: list[list[int]]) -> None:
    assert sights(mask_of(row)) is None
