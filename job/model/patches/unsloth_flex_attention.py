"""Reverts Unsloth's choice of flex attention where the spec asks for PyTorch's own (`sdpa`).

Why: flex attention recompiles for the lengths of each batch, and materialises all scores at once when not compiled.
Upstream: Unsloth 2026.10.9 prefers it for Gemma 3, whatever is requested (github.com/unslothai/unsloth/pull/5346).
transformers' public `set_attn_implementation` is not used: it inspects a module's source to decide whether a class may change,
and Unsloth rewrites that source.
May go: when `FastVisionModel.from_pretrained` respects `attn_implementation` for Gemma 3.
"""

from __future__ import annotations

from typing import Any


def without_flex_attention(model: Any) -> None:
    """Select PyTorch's attention in a `model` for which Unsloth chose flex attention, and in its towers."""
    if model.config.get_text_config()._attn_implementation == "flex_attention":
        model.config._attn_implementation = "sdpa"  # its towers follow
