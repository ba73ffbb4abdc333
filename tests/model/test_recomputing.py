"""Gradient checkpointing reaches every layer of both towers, and changes no gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from job.model.collator import Collator
from job.model.load import to_training
from tests.families import FAMILIES
from tests.tiny import batch, load_tiny, perturb


def layers(model: Any) -> dict[str, torch.nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "mlp") and any(hasattr(module, each) for each in ("self_attn", "attn", "cross_attn"))
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_run_again_for_the_same_gradients(family: str, tiny: Callable[..., Path]) -> None:
    loaded = perturb(load_tiny(tiny(family)))
    to_training(loaded)
    inputs, runs = Collator(loaded.processor, 512)(batch()), Counter[str]()
    for name, layer in layers(loaded.model).items():
        layer.register_forward_pre_hook(lambda *_, name=name: runs.update([name]))

    def gradient() -> dict[str, torch.Tensor]:
        runs.clear()
        loaded.model.zero_grad()
        loaded.model(**inputs, use_cache=False).loss.backward()
        return {name: weight.grad for name, weight in loaded.model.named_parameters() if weight.grad is not None}

    kept = gradient()
    assert any("vision" in name or "visual" in name for name in runs)
    assert set(runs.values()) == {1}
    loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = gradient()
    assert runs.keys() == layers(loaded.model).keys()
    trained = {layer for layer in runs if any(name.startswith(f"{layer}.") for name in kept)}  # LLaVA uses all but one
    assert len(trained) >= len(runs) - 1
    assert {runs[layer] for layer in trained} == {2}
    assert recomputed.keys() == kept.keys()
    for name, expected in kept.items():
        torch.testing.assert_close(recomputed[name], expected)
