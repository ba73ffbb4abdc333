"""Steps of generation as a CUDA graph, on a real GPU: `make test-gpu`. Skipped, with the reason, where there is none."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.test_unsloth import GPU, folders, loaded_by_unsloth  # skips, and imports Unsloth first

import torch  # isort: skip

from job.evaluate.generate import base_or_tuned, to_device
from job.model.collator import encode, render
from job.model.decoding import CHECKED, NO_GRAPH, generate
from job.model.load import load_model, to_generation
from tests.tiny import batch, job_spec, perturb

__all__ = ["folders"]
TOKENS = 24


def inputs_of(loaded: Any) -> dict[str, torch.Tensor]:
    prompts = [render(loaded.processor, each["messages"][:-1], prompt=True) for each in batch()]
    inputs = encode(loaded.processor, prompts, [each["images"] for each in batch()], side="left")
    return to_device(inputs, loaded)


@pytest.mark.parametrize("family", ["mllama", "qwen2_5_vl", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("backend", ["unsloth", "transformers"])
def test_a_graph_says_what_the_model_says(
    folders: dict[str, Path], family: str, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    if backend == "unsloth":
        loaded = loaded_by_unsloth(folders[family])
    else:
        loaded = load_model(job_spec(lora={"r": 4}), folders[family], GPU, backend, "16bit", "nothing", None)
    perturb(loaded)
    to_generation(loaded)
    bare, inputs = loaded.model.get_base_model(), inputs_of(loaded)
    settings = {"pad_token_id": loaded.processor.tokenizer.pad_token_id, "eos_token_id": -1}
    with torch.inference_mode(), caplog.at_level(logging.WARNING, "job"):
        for tuned in (True, False):
            with base_or_tuned(loaded, tuned):
                graphed = [generate(loaded, inputs, TOKENS, **settings) for _ in range(2)]
                setattr(bare, NO_GRAPH, True)
                written = generate(loaded, inputs, TOKENS, **settings)
                delattr(bare, NO_GRAPH)
            assert torch.equal(graphed[0], graphed[1])
            same = float((graphed[0] == written).float().mean())
            assert same > 0.95, f"{same:.3f} of the tokens are equal"  # Unsloth's own way keeps another cache
    assert hasattr(bare, CHECKED)
    assert "without a CUDA graph" not in caplog.text
