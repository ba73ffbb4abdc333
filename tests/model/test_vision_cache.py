"""Features of a frozen vision tower: the same loss and gradients, made once, kept within bounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from job.model.collator import Collator, image_token
from job.model.families import family_of
from job.model.image_layout import FEATURES, cut
from job.model.vision_cache import Features, VisionCache, tower, vision_cache
from tests.families import LAID_OUT
from tests.tiny import batch, load_tiny, perturb


@pytest.fixture(params=LAID_OUT, scope="module")
def laid_out(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def language_only(laid_out: str, tiny: Callable[..., Path]) -> Any:
    return perturb(load_tiny(tiny(laid_out), finetune_vision_layers=False))


def made(loaded: Any, folder: Path, limit: int = 10**9) -> tuple[VisionCache, dict[str, torch.Tensor]]:
    frozen = vision_cache(loaded, folder, limit, "none")
    assert frozen is not None
    return frozen, Collator(loaded.processor, 512)(batch())


def loss_and_gradients(loaded: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    trained = [weight for weight in loaded.model.parameters() if weight.requires_grad]
    loss = loaded.model(**inputs, use_cache=False).loss
    return loss.detach(), list(torch.autograd.grad(loss, trained))


def test_loss_and_gradients_are_those_of_the_pixels(language_only: Any, tmp_path: Path) -> None:
    frozen, inputs = made(language_only, tmp_path)
    loss, gradients = loss_and_gradients(language_only, inputs)
    with frozen.given():
        same, their_gradients = loss_and_gradients(language_only, frozen.inputs(frozen.look(inputs, [])))
    torch.testing.assert_close(same, loss, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(their_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(loss_and_gradients(language_only, inputs)[0], loss)  # nothing of ours stays behind


def test_a_second_look_reads_the_same_bits_and_asks_no_tower(language_only: Any, tmp_path: Path) -> None:
    frozen, inputs = made(language_only, tmp_path)
    images = [row["images"] for row in batch()]
    unchanged, keys = frozen.features.recall(inputs, images)
    assert "pixel_values" in unchanged
    assert len(set(keys)) == len(images)
    first = frozen.look(inputs, keys)
    frozen.features.settle()
    again = Features(tmp_path, frozen.features.layout, frozen.features.model, 10**9)  # another process, another time
    recalled, _ = again.recall(inputs, images)
    assert "pixel_values" not in recalled
    asked = []
    hook = tower(language_only.model).register_forward_hook(lambda *_: asked.append(1))
    second = frozen.look(recalled, keys)
    hook.remove()
    assert not asked
    assert torch.equal(first[FEATURES], second[FEATURES])


def test_features_of_a_picture_do_not_depend_on_its_neighbours(language_only: Any, tmp_path: Path) -> None:
    frozen, inputs = made(language_only, tmp_path)
    together = frozen.look(inputs, [])
    token, layout = image_token(language_only.processor), frozen.features.layout
    alone = [frozen.look(cut(inputs, layout, [1, 1, 1], [n], token), [])[FEATURES] for n in range(3)]
    assert torch.equal(together[FEATURES], torch.cat(alone))


def test_no_more_is_kept_than_the_limit(language_only: Any, tmp_path: Path) -> None:
    frozen, inputs = made(language_only, tmp_path, limit=1)
    _, keys = frozen.features.recall(inputs, [row["images"] for row in batch()])
    frozen.look(inputs, keys)
    frozen.features.settle()
    assert not list(tmp_path.iterdir())


def test_a_broken_file_is_made_again(language_only: Any, tmp_path: Path) -> None:
    frozen, inputs = made(language_only, tmp_path)
    images = [row["images"] for row in batch()]
    for key in frozen.features.recall(inputs, images)[1]:
        (tmp_path / f"{key}.safetensors").write_bytes(b"half a file")
    assert "pixel_values" in frozen.features.recall(inputs, images)[0]


@pytest.mark.parametrize("family", ["mllama"])
def test_a_trained_tower_is_not_frozen(tiny: Callable[..., Path], family: str, tmp_path: Path) -> None:
    assert vision_cache(load_tiny(tiny(family)), tmp_path, 10**9, "none") is None
    assert vision_cache(load_tiny(tiny(family), finetune_vision_layers=False), tmp_path, 10**9, "all") is None
    connected = load_tiny(tiny(family), finetune_vision_layers=False, finetune_connector=True)
    assert vision_cache(connected, tmp_path, 10**9, "none") is None


def test_a_batch_cut_in_two_is_two_batches(folder: Path, loaded: Any, family: str) -> None:
    inputs, layout = Collator(loaded.processor, 512)(batch()), family_of(family).layout
    token = image_token(loaded.processor)
    with torch.no_grad():
        whole = loaded.model(**inputs).logits
        parts = [loaded.model(**cut(inputs, layout, [1, 1, 1], range(a, b), token)).logits for a, b in ((0, 2), (2, 3))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)
