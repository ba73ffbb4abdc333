"""The formula for operations against PyTorch's own count of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from job.model.collator import Collator
from job.model.transformers_backend import linears, load_processor
from tests.tiny import job_spec, make_model, row

from flops import Row, forward, training  # isort: skip - beside tests.tiny, which adds the folder


def seen_by(family: str, inputs: dict[str, Any]) -> tuple[int, int]:
    """Tokens of the images inside the tower, and how many of them attend to each other."""
    if "image_grid_thw" in inputs:
        return (int(inputs["image_grid_thw"].prod()),) * 2
    if family == "mllama":  # padded tiles too, each with its class token, to a multiple of eight
        tiles, side = inputs["pixel_values"].shape[2], inputs["pixel_values"].shape[-1]
        return (tiles * -(-((side // 14) ** 2 + 1) // 8) * 8,) * 2
    patches = (inputs["pixel_values"].shape[-1] // 14) ** 2
    return (patches + (family == "llava"),) * 2


def counted(model: Any, inputs: dict[str, Any], *, backward: bool) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.set_grad_enabled(backward):
        logits = model(**inputs, use_cache=False).logits
        if backward:
            logits.float().sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if "convolution" not in str(operation))


@pytest.mark.parametrize("family", ["mllama", "qwen3_vl", "gemma3", "llava"])
def test_the_formula_counts_what_a_profiler_counts(family: str, tmp_path: Path):
    from transformers import AutoModelForImageTextToText

    make_model(family, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager").requires_grad_(False)
    processor = load_processor(job_spec().model, tmp_path)
    inputs = dict(Collator(processor, 2048)([row(1)]))
    inputs.pop("labels")
    text = inputs["input_ids"].shape[1]
    seen, window = seen_by(family, inputs)
    joined = {"qwen3_vl": 4}.get(family, 1)
    mine = Row(text, text, seen, window)
    layers = linears(model)
    assert counted(model, inputs, backward=False) == pytest.approx(
        sum(forward(layers, mine, joined).values()), rel=0.05
    )
    model.get_input_embeddings().register_forward_hook(lambda *given: given[2].requires_grad_())
    inputs["pixel_values"].requires_grad_()
    whole = training(layers, mine, vision=True, joined=joined)
    assert counted(model, inputs, backward=True) == pytest.approx(
        whole, rel=0.05
    )  # a last layer that LLaVA does not use
