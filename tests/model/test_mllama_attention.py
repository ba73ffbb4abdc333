"""Our attention for Llama 3.2's vision tower gives upstream's numbers and upstream's gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.mllama import modeling_mllama

from job.model.collator import Collator
from job.model.patches import mllama_attention, mllama_intermediate
from job.model.vision_cache import tower
from tests.tiny import batch, load_tiny, perturb


@pytest.fixture(params=["added", "bools"])
def mask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Upstream's mask is added to the scores. Unsloth compiles one of bools from its source, True where a token is seen."""
    if request.param == "bools":

        def of_bools(*given: Any, **named: Any) -> torch.Tensor:
            mask = added(*given, **named)
            return mask != torch.finfo(mask.dtype).min

        monkeypatch.setattr(modeling_mllama, "_prepare_aspect_ratio_attention_mask", of_bools)
    return str(request.param)


@pytest.fixture(scope="module")
def seen(tiny: Callable[..., Path]) -> Callable[[dict[str, torch.Tensor]], Any]:
    """`seen(inputs)` = features and gradients by upstream's attention, then by ours."""
    loaded = perturb(load_tiny(tiny("mllama"), finetune_language_layers=False))
    vision = tower(loaded.model)
    trained = [weight for weight in vision.parameters() if weight.requires_grad]

    def run(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        out = vision(**{name: inputs[name] for name in PICTURE}).last_hidden_state
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        return out.detach(), list(torch.autograd.grad((out * weights).mean(), trained))

    def both(inputs: dict[str, torch.Tensor]) -> Any:
        assert vision.config._attn_implementation == mllama_attention.NAME
        ours = run(inputs)
        vision.config._attn_implementation = "sdpa"
        for encoder in (vision.transformer, vision.global_transformer):
            encoder._forward_pre_hooks.clear()
            encoder._forward_hooks.clear()
        mllama_intermediate.install(loaded.model.get_base_model())
        theirs = run(inputs)
        mllama_attention.install(loaded.model.get_base_model())
        return theirs, ours

    both.processor = loaded.processor  # type: ignore[attr-defined]
    return both


added = modeling_mllama._prepare_aspect_ratio_attention_mask
PICTURE = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


@pytest.mark.usefixtures("mask")
def test_features_and_gradients_are_those_of_the_masked_attention(seen: Any) -> None:
    (theirs, their_gradients), (ours, gradients) = seen(Collator(seen.processor, 512)(batch()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for mine, yours in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-3, atol=1e-5)


def test_a_place_without_a_picture_has_the_same_features(mask: str, seen: Any) -> None:
    inputs = Collator(seen.processor, 512)(batch())
    inputs["aspect_ratio_mask"][1] = 0
    (theirs, _), (ours, _) = seen(inputs)
    if mask == "bools":  # upstream's kernel has nothing to see there, and says nought or NaN
        theirs, ours = theirs[[0, 2]], ours[[0, 2]]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_padding_is_told_from_the_mask(mask: str) -> None:
    prepare = modeling_mllama._prepare_aspect_ratio_attention_mask
    patterns = prepare(torch.tensor([[1, 0], [1, 1], [1, 0]]), num_patches=3, target_length=4, dtype=torch.float32)
    assert (patterns.dtype == torch.bool) == (mask == "bools")
    arranged = mllama_attention.arrangement(patterns)
    assert arranged.groups == [(2, 3), (1, 6)]
    tokens = torch.arange(24).view(3, 8, 1)
    first, third, second = (row.tolist() for row in arranged.arrange(tokens)[..., 0])
    assert first == [0, 1, 2, 3, 4, 5, 6, 7]
    assert third == [16, 17, 18, 19, 20, 21, 22, 23]
    assert second == [8, 9, 10, 12, 13, 14, 11, 15]
    assert torch.equal(arranged.put_back(arranged.arrange(tokens)), tokens)


def test_tokens_without_padding_stay_where_they_are(mask: str) -> None:
    prepare = modeling_mllama._prepare_aspect_ratio_attention_mask
    full = prepare(torch.ones(2, 2), num_patches=4, target_length=4, dtype=torch.float32)
    tokens = torch.randn(2, 8, 3)
    assert mllama_attention.arrangement(full).arrange(tokens) is tokens


def test_a_mask_that_means_something_else_is_refused(mask: str) -> None:
    prepare = modeling_mllama._prepare_aspect_ratio_attention_mask
    patterns = prepare(torch.tensor([[1, 0], [1, 1]]), num_patches=3, target_length=4, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="mask is of an unknown kind"):
        mllama_attention.arrangement(~patterns if mask == "bools" else turned(patterns))


def bare(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder)


@pytest.mark.usefixtures("mask")
def test_it_is_taken_where_it_is_upstreams(tiny: Callable[..., Path]) -> None:
    model = bare(tiny("mllama"))
    assert mllama_attention.apart(model.model.vision_model) < 1e-5
    assert mllama_attention.install(model)
    assert model.model.vision_model.config._attn_implementation == mllama_attention.NAME


def no_padding_is_seen(mask: torch.Tensor) -> torch.Tensor:
    """Another function: padding is hidden from real tokens too. Its diagonal is that of upstream's mask."""
    return mask + mask.diagonal(dim1=2, dim2=3)[:, :, None, :]


def turned(mask: torch.Tensor) -> torch.Tensor:
    return torch.finfo(mask.dtype).min - mask


def of_another_shape(mask: torch.Tensor) -> torch.Tensor:
    return mask[:, 0]


def none(_mask: torch.Tensor) -> None:
    return None


@pytest.mark.parametrize("other", [no_padding_is_seen, turned, of_another_shape, none])
def test_another_attention_is_left_as_it_is(
    other: Callable[[torch.Tensor], Any],
    tiny: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(
        modeling_mllama, "_prepare_aspect_ratio_attention_mask", lambda *given, **named: other(added(*given, **named))
    )
    model = bare(tiny("mllama"))
    with caplog.at_level("WARNING", logger="job"):
        assert not mllama_attention.install(model)
    assert "so it is not replaced" in caplog.text
    vision = model.model.vision_model
    assert vision.config._attn_implementation == "sdpa"
    assert not any(encoder._forward_pre_hooks for encoder in (vision.transformer, vision.global_transformer))
