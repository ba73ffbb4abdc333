"""Replaces `get_image_features` of one model, so that its forward takes image features in place of pixels.

Why: a frozen vision tower runs once per image (`job.model.vision_cache`), and only Llama 3.2's forward has an argument for the
tower's output (`cross_attention_states`).
Upstream: transformers 5.17. `inputs_embeds` is no alternative: it has no room for the deeper features of Qwen3-VL.
May go: when the forwards of all families take image features as an argument.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch

from job.model.patches import replaced


def features_for_pixels(inner: Any, *, whole: bool) -> AbstractContextManager[None]:
    """While the block runs, `inner`, the model below its head, takes features (tokens of all images, levels, width) as
    `pixel_values`. Its forward expects them as one tensor (`whole`), or as a sequence of tensors to join."""

    def given(pixel_values: torch.Tensor, *_: Any, **__: Any) -> Any:
        first, *deeper = pixel_values.unbind(1)
        return SimpleNamespace(pooler_output=first[None] if whole else (first,), deepstack_features=deeper)

    return replaced(inner, "get_image_features", given)


def pixels_again(inner: Any) -> AbstractContextManager[None]:
    """Inside `features_for_pixels`, `inner` takes pixels again while the block runs."""
    return replaced(inner, "get_image_features", None)
