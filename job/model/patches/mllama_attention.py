"""Replaces Llama 3.2's vision attention with an exact equivalent that skips the work its mask throws away.

Why: upstream masks only the pairs (padding, padding) of an image's 4 × 1608 tokens, and passes the kernel a dense mask for
that, which rules out flash attention. Two calls without a mask give the same numbers: real tokens attend to all tokens,
padding tokens attend to the real ones. Padding cannot simply be dropped: real tokens do attend to it, and so does the text
before the image. An image in one tile of four has 1601 real tokens of 6432: 18 M pairs instead of 41 M.
Upstream: transformers 5.17, `_prepare_aspect_ratio_attention_mask`. The function is registered in the public
`AttentionInterface` and selected by the private `_attn_implementation`: `set_attn_implementation` inspects a module's source
to decide whether a class may change, and Unsloth rewrites that source.
May go: when transformers passes its vision attention no dense mask.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from job.errors import OutOfMemory
from job.model.families import family_of

log = logging.getLogger("job")

NAME = "padded_tiles"
DIFFERENT = 0.03
"""Relative difference that marks another function. Two bf16 kernels of one function differ by some 0.005, a mask read the
wrong way gives 0.15 or more."""


@dataclass(frozen=True)
class Tokens:
    """Rows with the same padding, and the indices of their `real` and `padding` tokens."""

    rows: torch.Tensor
    real: torch.Tensor
    padding: torch.Tensor


def llamas(model: Any) -> Any | None:
    """Return the vision tower of a bare `model` if it is Llama 3.2's, else None."""
    return model.model.vision_model if family_of(model.config.model_type).padded_tiles else None


def install(model: Any) -> bool:
    """Give the vision tower of an mllama `model` (bare, without PEFT around it) this attention. Leaves other models alone, and
    a tower whose own attention computes another function, as in another upstream version."""
    tower = llamas(model)
    if tower is None:
        return False
    if tower.config._attn_implementation == NAME:
        return True
    try:
        gap = apart(tower)
        why = f"{gap:.2g} apart"
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            "the vision tower's attention does not fit the GPU beside the weights; use a larger GPU"
        ) from error
    except Exception as error:  # third-party code that has changed
        gap, why = float("inf"), f"{type(error).__name__}: {error}"
    if not gap < DIFFERENT:
        log.warning("load: the vision tower's attention is not the one known here (%s), so it is not replaced", why)
        return False
    tower.config._attn_implementation = NAME
    for encoder in (tower.transformer, tower.global_transformer):
        encoder.register_forward_pre_hook(_without_dense_mask, with_kwargs=True)
    return True


class _Seen(Exception):
    """Carries the arguments of a tower's first attention."""


def apart(tower: Any) -> float:
    """Return the difference between this attention and that of `tower`, relative to the latter, in its first layer and for
    images of one tile and of all. Uses the tower's own mask, not compiled. Raises whatever an unknown tower raises."""
    from transformers import AttentionInterface

    def see(_module: Any, arguments: Any, named: dict[str, Any]) -> None:
        raise _Seen(arguments, named)

    AttentionInterface.register(NAME, attention)
    layer, config = tower.transformer.layers[0].self_attn, tower.config
    weight = next(tower.patch_embedding.parameters())
    tiles, side = config.max_num_tiles, config.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn((2, 1, tiles, config.num_channels, side, side), generator=generator).to(weight)
    mask = torch.ones((2, 1, tiles), dtype=torch.long, device=weight.device)
    mask[0, 0, 1:] = 0
    hook = layer.register_forward_pre_hook(see, with_kwargs=True)
    own = config._attn_implementation
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            tower(pixel_values=pixels, aspect_ratio_ids=mask[:, :, 0], aspect_ratio_mask=mask)
            return float("nan")
        except _Seen as seen:
            arguments, named = seen.args
        finally:
            hook.remove()
        theirs = layer(*arguments, **named)[0].float()
        try:
            config._attn_implementation = NAME
            ours = layer(*arguments, **named | {"attention_mask": tokens(named["attention_mask"])})[0].float()
        finally:
            config._attn_implementation = own
    return float((ours - theirs).norm() / theirs.norm())


def _without_dense_mask(_encoder: Any, arguments: Any, named: dict[str, Any]) -> Any:
    return arguments, named | {"attention_mask": tokens(named["attention_mask"])}


def tokens(mask: torch.Tensor) -> list[Tokens]:
    """Convert upstream's mask (rows, 1, tokens, tokens) to groups of rows. A padding token is one that cannot attend to
    itself: its diagonal entry is far below zero in an additive mask, and False in a boolean mask, which is True where a token
    is seen."""
    itself = mask[:, 0].diagonal(dim1=1, dim2=2)
    padding = ~itself if itself.dtype == torch.bool else itself != 0
    patterns, group = torch.unique(padding, dim=0, return_inverse=True)
    if bool((patterns[:, 0] & ~patterns.all(dim=1)).any()):  # an image, if present, begins with a token of its own
        raise RuntimeError("the vision tower's mask is of an unknown kind: an image's first token is padding")
    return [
        Tokens((group == number).nonzero()[:, 0], (~pattern).nonzero()[:, 0], pattern.nonzero()[:, 0])
        for number, pattern in enumerate(patterns)
    ]


def attention(
    _module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: list[Tokens],
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """(rows, heads, tokens, width) × 3 → (rows, tokens, heads, width), like transformers' attention functions."""
    if len(attention_mask) == 1:
        return _of_group(attention_mask[0], query, key, value, scaling).transpose(1, 2), None
    out = torch.empty_like(query)
    for group in attention_mask:
        rows = group.rows
        out = out.index_copy(0, rows, _of_group(group, query[rows], key[rows], value[rows], scaling))
    return out.transpose(1, 2), None


def _of_group(
    group: Tokens, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    if not len(group.padding):
        return scaled_dot_product_attention(query, key, value, scale=scaling)
    if not len(group.real):  # no image at all: every pair is masked, so each token gets the mean of all
        return value.mean(dim=2, keepdim=True).expand_as(query)
    real = len(group.real)
    order = torch.cat([group.real, group.padding])
    back = torch.argsort(order)
    query, key, value = (Reordered.apply(each, order, back) for each in (query, key, value))  # type: ignore[no-untyped-call]
    of_real = scaled_dot_product_attention(query[:, :, :real], key, value, scale=scaling)
    of_padding = scaled_dot_product_attention(query[:, :, real:], key[:, :, :real], value[:, :, :real], scale=scaling)
    out: torch.Tensor = Reordered.apply(torch.cat([of_real, of_padding], dim=2), back, order)  # type: ignore[no-untyped-call]
    return out


class Reordered(torch.autograd.Function):
    """Permutes tokens (third axis); the gradient takes the inverse permutation. The gradient of indexing would sort the
    indices and accumulate, as repeated indices require."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order, back)
        return tensor.index_select(2, order)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        _, back = ctx.saved_tensors
        return gradients[0].index_select(2, back), None, None
