"""Beside its last states, Llama 3.2's tower hands on those that enter the layers that its configuration names, as Meta's does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.mllama.modeling_mllama import MllamaVisionEncoder

from job.model.collator import Collator
from job.model.patches import mllama_attention, mllama_intermediate
from tests.tiny import batch

NAMED = [0, 2]
PICTURE = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Any:
    """One of four layers, with random weights."""
    config = AutoConfig.from_pretrained(tiny("mllama"))
    vision = config.vision_config
    vision.num_hidden_layers, vision.intermediate_layers_indices = 4, NAMED
    vision.vision_output_dim = vision.hidden_size * (len(NAMED) + 1)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.fixture(scope="module")
def pictures(tiny: Callable[..., Path]) -> dict[str, torch.Tensor]:
    inputs = Collator(AutoProcessor.from_pretrained(tiny("mllama")), 512)(batch())  # type: ignore[arg-type]
    return {name: inputs[name] for name in PICTURE}


def handed_on(model: Any, pictures: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the tower hands on beside its last states, and what enters the named layers, in the same form."""
    tower, entering = model.model.vision_model, list[torch.Tensor]()
    hooks = [
        tower.transformer.layers[number].register_forward_pre_hook(
            lambda _layer, _given, named: entering.append(named["hidden_state"]), with_kwargs=True
        )
        for number in NAMED
    ]
    with torch.no_grad():
        out = tower(**pictures).last_hidden_state
    for hook in hooks:
        hook.remove()
    rows, _, tiles, tokens, width = out.shape
    states = torch.stack(entering, dim=-1).view(rows, 1, tiles, -1, width // (len(NAMED) + 1) * len(NAMED))
    return out[..., -states.shape[-1] :], states[:, :, :, :tokens]


def test_transformers_hands_on_what_leaves_these_layers(model: Any, pictures: dict[str, torch.Tensor]) -> None:
    """Once this fails the patch may go."""
    found, right = handed_on(model, pictures)
    assert not torch.allclose(found, right, atol=1e-3)


def test_corrected_it_hands_on_what_enters_them(model: Any, pictures: dict[str, torch.Tensor]) -> None:
    corrected = copy.deepcopy(model)
    mllama_intermediate.install(corrected)
    found, right = handed_on(corrected, pictures)
    assert torch.equal(found, right)
    mllama_intermediate.install(corrected)
    assert torch.equal(handed_on(corrected, pictures)[0], right)


def test_with_our_attention_it_hands_on_the_same(model: Any, pictures: dict[str, torch.Tensor]) -> None:
    corrected, ours = copy.deepcopy(model), copy.deepcopy(model)
    mllama_intermediate.install(corrected)
    mllama_intermediate.install(ours)
    assert mllama_attention.install(ours)
    right, _ = handed_on(corrected, pictures)
    found, _ = handed_on(ours, pictures)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_a_tower_that_does_so_itself_is_left_alone(
    model: Any, pictures: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = MllamaVisionEncoder.forward

    def repaired(self: Any, hidden_states: torch.Tensor, attention_mask: Any = None) -> Any:
        out = given(self, hidden_states, attention_mask=attention_mask)
        out.hidden_states = (hidden_states, *out.hidden_states)
        return out

    monkeypatch.setattr(MllamaVisionEncoder, "forward", repaired)
    corrected = copy.deepcopy(model)
    mllama_intermediate.install(corrected)
    found, right = handed_on(corrected, pictures)
    assert torch.equal(found, right)
