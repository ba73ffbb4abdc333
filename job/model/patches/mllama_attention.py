"""Replaces Llama 3.2's vision attention with an exact equivalent that skips the work its mask throws away.

Why: upstream masks only the pairs (padding, padding) of an image's 4 × 1608 tokens, and passes the kernel a dense mask for
that, which rules out flash attention. Two calls without a mask give the same numbers: real tokens attend to all tokens,
padding tokens attend to the real ones. Padding cannot simply be dropped: real tokens do attend to it, and so does the text
before the image. An image in one tile of four has 1601 real tokens of 6432: 18 M pairs instead of 41 M.
The layers treat tokens alike wherever they stand, so each encoder's tokens are arranged once, the real ones first, and its
outputs are put back. Arranging them in every layer took 7 % of a training step on an H200.
Upstream: transformers 5.17, `_prepare_aspect_ratio_attention_mask`. The function is registered in the public
`AttentionInterface` and selected by the private `_attn_implementation`: `set_attn_implementation` inspects a module's source
to decide whether a class may change, and Unsloth rewrites that source.
May go: when transformers passes its vision attention no dense mask.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from job.errors import OutOfMemory
from job.model.families import family_of
from job.model.patches import mllama_cross_attention

log = logging.getLogger("job")

NAME = "padded_tiles"
DIFFERENT = 0.03
"""Relative difference that marks another function. Two bf16 kernels of one function differ by some 0.005, a mask read the
wrong way gives 0.15 or more."""


class Group(NamedTuple):
    """A number of rows, each with `real` real tokens."""

    rows: int
    real: int


@dataclass(frozen=True)
class Arranged:
    """An order in which the real tokens of each row come first, and rows with as many of them stand together: `groups`, from
    first to last. `order` are indices into the tokens of all rows, (rows × tokens), and `back` are those of the inverse; None
    if all stand so already."""

    order: torch.Tensor | None
    back: torch.Tensor | None
    groups: list[Group]

    def arrange(self, states: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, width) as upstream has them → the same, arranged."""
        return states if self.order is None else self._moved(states, self.order, self.back)

    def put_back(self, states: torch.Tensor) -> torch.Tensor:
        """The inverse of `arrange`."""
        return states if self.back is None else self._moved(states, self.back, self.order)

    @staticmethod
    def _moved(states: torch.Tensor, order: torch.Tensor, back: Any) -> torch.Tensor:
        moved: torch.Tensor = Reordered.apply(states.flatten(0, 1), order, back)  # type: ignore[no-untyped-call]
        return moved.view_as(states)


def llamas(model: Any) -> Any | None:
    """Return the vision tower of a bare `model` if it is Llama 3.2's, else None."""
    return model.model.vision_model if family_of(model.config.model_type).padded_tiles else None


def install(model: Any) -> bool:
    """Give the vision tower of an mllama `model` (bare, without PEFT around it) this attention, and its language model the
    cross-attention of mllama_cross_attention.py. Leaves other models alone, and one whose tower has an attention that computes
    another function, as in another upstream version."""
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
    for encoder, read in ((tower.transformer, tower.intermediate_layers_indices), (tower.global_transformer, ())):
        encoder.register_forward_pre_hook(_arrange, with_kwargs=True)
        encoder.register_forward_hook(functools.partial(_put_back, set(read)), with_kwargs=True)
    mllama_cross_attention.install(model)
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
            arranged = arrangement(named["attention_mask"])
            states = arranged.arrange(arguments[0])
            ours = arranged.put_back(layer(states, **named | {"attention_mask": arranged})[0]).float()
        finally:
            config._attn_implementation = own
    return float((ours - theirs).norm() / theirs.norm())


def _arrange(_encoder: Any, arguments: Any, named: dict[str, Any]) -> Any:
    arranged = arrangement(named["attention_mask"])
    return (arranged.arrange(arguments[0]), *arguments[1:]), named | {"attention_mask": arranged}


def _put_back(read: set[int], _encoder: Any, _arguments: Any, named: dict[str, Any], output: Any) -> Any:
    """Put back the last states, and those of the layers that the tower will `read`; it gets None for the others."""
    arranged: Arranged = named["attention_mask"]
    output.last_hidden_state = arranged.put_back(output.last_hidden_state)
    output.hidden_states = tuple(
        arranged.put_back(states) if number in read else None for number, states in enumerate(output.hidden_states)
    )
    return output


@mllama_cross_attention.once
def arrangement(mask: torch.Tensor) -> Arranged:
    """Read upstream's mask (rows, 1, tokens, tokens). A padding token is one that cannot attend to itself: its diagonal entry
    is far below zero in an additive mask, and False in a boolean mask, which is True where a token is seen."""
    itself = mask[:, 0].diagonal(dim1=1, dim2=2)
    padding = ~itself if itself.dtype == torch.bool else itself != 0
    rows, tokens = padding.shape
    numbers, unknown = torch.stack([tokens - padding.sum(dim=1), padding[:, 0] & ~padding.all(dim=1)]).tolist()
    if any(unknown):  # an image, if present, begins with a token of its own
        raise RuntimeError("the vision tower's mask is of an unknown kind: an image's first token is padding")
    by_number = sorted(range(rows), key=numbers.__getitem__)
    groups = [Group(len(list(same)), real) for real, same in groupby(by_number, key=numbers.__getitem__)]
    if all(group.real in (0, tokens) for group in groups) and by_number == list(range(rows)):
        return Arranged(None, None, groups)
    real_first = torch.argsort(padding.byte(), dim=1, stable=True)
    row = torch.tensor(by_number, device=mask.device)
    order = (row[:, None] * tokens + real_first[row]).flatten()
    return Arranged(order, torch.argsort(order), groups)


def attention(
    _module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Arranged,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """(rows, heads, tokens, width) × 3, arranged → (rows, tokens, heads, width), like transformers' attention functions."""
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    groups = attention_mask.groups
    if len(groups) == 1:
        return _of_group(groups[0].real, query, key, value, scaling), None
    sizes = [group.rows for group in groups]
    parts = zip(*(torch.split(each, sizes) for each in (query, key, value)), strict=True)
    said = [_of_group(group.real, q, k, v, scaling) for group, (q, k, v) in zip(groups, parts, strict=True)]
    return torch.cat(said), None


def _of_group(
    real: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """(rows, tokens, heads, width) × 3 → the same, in the memory layout of flash attention and of the projections around it."""
    tokens = query.shape[1]
    if not real:  # no image at all: every pair is masked, so each token gets the mean of all
        return value.mean(dim=1, keepdim=True).expand_as(query)
    if real == tokens:
        return _attend(query, key, value, scaling)
    of_real, of_padding = torch.split(query, [real, tokens - real], dim=1)
    return torch.cat(
        [_attend(of_real, key, value, scaling), _attend(of_padding, key[:, :real], value[:, :real], scaling)], dim=1
    )


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    return scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2)


class Reordered(torch.autograd.Function):
    """Permutes tokens (first axis); the gradient takes the inverse permutation. The gradient of indexing would sort the
    indices and accumulate, as repeated indices require."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        return tensor.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (back,) = ctx.saved_tensors
        return gradients[0].index_select(0, back), None, None
