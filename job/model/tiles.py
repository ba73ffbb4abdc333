"""Llama 3.2's vision attention without the work that its mask throws away. Exact, several times less of it.

Upstream masks only the pairs (padding, padding) of an image's 4 × 1608 tokens, and hands the kernel a dense mask for
that, which rules flash attention out. The same numbers come from two calls without any mask: real tokens look at all
tokens, padding tokens look at the real ones. Padding cannot simply be left out: real tokens do look at it, and so
does the text before the image. An image in one tile of four has 1601 real tokens of 6432: 18 M pairs instead of 41 M.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from job.errors import OutOfMemory

log = logging.getLogger("job")

NAME = "padded_tiles"
DIFFERENT = 0.03
"""Of two kernels of one function in bf16, some 0.005; of a mask read the wrong way, 0.15 and more."""


@dataclass(frozen=True)
class Tokens:
    """Rows that have the same padding, and which of their tokens are `real` and which are `padding` (indices)."""

    rows: torch.Tensor
    real: torch.Tensor
    padding: torch.Tensor


def llamas(model: Any) -> Any | None:
    """The vision tower of a bare `model` if it is Llama 3.2's."""
    tower = getattr(getattr(model, "model", model), "vision_model", None)
    return tower if getattr(getattr(tower, "config", None), "model_type", "") == "mllama_vision_model" else None


def install(model: Any) -> bool:
    """Give the vision tower of an mllama `model` (bare, without PEFT around it) this attention; others are left alone, and
    so is one whose own attention turns out to be another function, as another version of upstream's may be."""
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
            "one attention of the vision tower does not fit the GPU beside the weights; take a larger GPU"
        ) from error
    except Exception as error:  # of code that is not ours, and not what it was
        gap, why = float("inf"), f"{type(error).__name__}: {error}"
    if not gap < DIFFERENT:
        log.warning("load: the vision tower's attention is not the one known here (%s), and is left as it is", why)
        return False
    tower.config._attn_implementation = NAME
    for encoder in (tower.transformer, tower.global_transformer):
        encoder.register_forward_pre_hook(_without_dense_mask, with_kwargs=True)
    return True


class _Seen(Exception):
    """What the first attention of a tower was given."""


def apart(tower: Any) -> float:
    """How far this attention is from that of `tower`, in its first layer and for pictures of one tile and of all, as a
    share of the latter. The mask is the one that the tower makes, not compiled. Raises whatever an unknown tower does."""
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
    """Upstream's mask (rows, 1, tokens, tokens) as groups of rows. A padding token is one that may not see itself: its place
    on the diagonal is far below zero in a mask that is added to the scores, and False in a mask of bools, True where a
    token is seen."""
    itself = mask[:, 0].diagonal(dim1=1, dim2=2)
    padding = ~itself if itself.dtype == torch.bool else itself != 0
    patterns, group = torch.unique(padding, dim=0, return_inverse=True)
    if bool((patterns[:, 0] & ~patterns.all(dim=1)).any()):  # a picture begins with a token of its own, if it is there
        raise RuntimeError("the vision tower's mask is not of a kind that is known: a picture's first token is padding")
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
    """(rows, heads, tokens, width) × 3 → (rows, tokens, heads, width), as transformers' attention functions do."""
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
    if not len(group.real):  # no picture at all: every pair is masked, so each token sees the mean of all
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
    """Tokens (third axis) in another order; the gradient takes the way back. The gradient of indexing would sort the
    indices and add up, as it must where one stands twice."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order, back)
        return tensor.index_select(2, order)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        _, back = ctx.saved_tensors
        return gradients[0].index_select(2, back), None, None
