"""Replaces transformers' `sdpa` attention for generation steps in which heads share keys and values.

Why: with a mask, transformers repeats keys and values for each head, since no fused kernel takes both a mask and fewer key
heads. Llama 3.2 Vision keeps 6,404 keys per image; repeated four times, they are most of the bytes that a step moves.
Upstream: transformers 5.17, `use_gqa_in_sdpa` (github.com/huggingface/transformers/pull/39412). The table of attention
functions is public, but replacing its entry `sdpa` is not a supported use.
May go: when `use_gqa_in_sdpa` accepts one token with a mask, and torch has a fused kernel for it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextmanager
def grouped_heads() -> Iterator[None]:
    """While the block runs, heads that share keys and values read them together when there is one query token.

    With one token per row, the heads of a group can take the place of tokens, which the mask treats alike.
    """
    given = ALL_ATTENTION_FUNCTIONS["sdpa"]

    @functools.wraps(given)
    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **named: Any
    ) -> tuple[torch.Tensor, None]:
        rows, heads, tokens, width = query.shape
        groups = key.shape[1]
        plain = tokens > 1 or attention_mask is None or groups == heads or attention_mask.shape[1] != 1
        if plain or torch.is_grad_enabled() or named.get("position_bias") is not None:
            made: tuple[torch.Tensor, None] = given(module, query, key, value, attention_mask, **named)
            return made
        together = query.view(rows, groups, heads // groups, width)
        said = scaled_dot_product_attention(
            together, key, value, attention_mask.expand(-1, -1, heads // groups, -1), scale=named.get("scaling")
        )
        return said.reshape(rows, 1, heads, value.shape[-1]), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = given
