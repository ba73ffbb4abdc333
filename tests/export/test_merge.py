"""Merged weights are an ordinary model that says what base and adapter say."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from job.export.merge import merge
from job.model import Loaded
from job.model.collator import Collator
from job.model.fetch import module_name
from job.model.transformers_backend import adapted
from tests.tiny import batch, job_spec, load_tiny, perturb


@dataclass(frozen=True)
class Made:
    base: Path
    merged: Path
    loaded: Loaded


def make(base: Path, into: Path, shard: str = "5GB", **lora: Any) -> Made:
    """Adapters with something to say on a 16-bit base, saved and merged as the job does it."""
    loaded = perturb(load_tiny(base, **lora), 0.05)
    loaded.model.save_pretrained(into / "adapter")
    merge(job_spec(lora=lora, export={"max_shard_size": shard}), base, into / "adapter", into / "merged")
    return Made(base, into / "merged", loaded)


@pytest.fixture(scope="module")
def made(family: str, tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tiny(family, torch.bfloat16), tmp_path_factory.mktemp("export"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: weight for file in sorted(folder.glob("*.safetensors")) for key, weight in load_file(file).items()}


def distance(made: Made) -> float:
    """Mean difference of logits between the merged folder, read afresh, and base + adapter, as a share of their spread."""
    inputs = Collator(AutoProcessor.from_pretrained(made.merged), 2048)(batch())
    again = AutoModelForImageTextToText.from_pretrained(made.merged, dtype=torch.float32).eval()
    with torch.inference_mode():
        tuned, merged = made.loaded.model(**inputs).logits, again(**inputs).logits
    return float((tuned - merged).abs().mean() / tuned.std())


def test_the_merged_folder_says_what_base_and_adapter_say(made: Made) -> None:
    inputs = Collator(made.loaded.processor, 2048)(batch())
    with torch.inference_mode():
        tuned = made.loaded.model(**inputs).logits
        with made.loaded.model.disable_adapter():
            base = made.loaded.model(**inputs).logits
    effect = float((tuned - base).abs().mean() / tuned.std())
    assert distance(made) < 0.02 < effect / 5


def test_keys_and_shapes_are_the_bases(made: Made) -> None:
    base, merged = weights(made.base), weights(made.merged)
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in base.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in merged.items()
    }


def test_only_adapted_layers_differ_from_the_base(made: Made) -> None:
    base, merged = weights(made.base), weights(made.merged)
    changed = {
        module_name(key.removesuffix(".weight"))
        for key in base
        if not torch.equal(base[key].view(torch.int16), merged[key].view(torch.int16))
    }
    assert changed == set(adapted(made.loaded.model))


def test_the_folder_has_all_that_a_server_reads(made: Made) -> None:
    names = {file.name for file in made.merged.iterdir()}
    assert {file.name for file in made.base.iterdir()} <= names
    assert (made.merged / "generation_config.json").read_text() == (made.base / "generation_config.json").read_text()
    config = re.compile(r'"dtype": "bfloat16"')
    assert config.search((made.merged / "config.json").read_text())


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True, "lora_alpha": 32},
        {"finetune_language_layers": False},
        {"lora_dropout": 0.5},
        {"bias": "all"},
        {"bias": "lora_only"},
    ],
    ids=["rslora", "vision only", "dropout", "all biases", "biases of LoRA layers"],
)
@pytest.mark.parametrize("family", ["mllama", "qwen2_5_vl"], scope="module")
def test_every_kind_of_adapter_is_folded_in(
    family: str, tiny: Callable[..., Path], tmp_path: Path, lora: dict[str, Any]
) -> None:
    loaded = perturb(load_tiny(tiny(family, torch.bfloat16), **lora), 0.05)
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if name.endswith(".bias") and weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    loaded.model.save_pretrained(tmp_path / "adapter")
    merge(job_spec(lora=lora), loaded.folder, tmp_path / "adapter", tmp_path / "merged")
    assert distance(Made(loaded.folder, tmp_path / "merged", loaded)) < 0.02


def test_large_weights_are_written_in_shards(tiny: Callable[..., Path], tmp_path: Path) -> None:
    made = make(tiny("llava", torch.bfloat16), tmp_path, shard="200KB")
    assert len(list(made.merged.glob("model-*-of-*.safetensors"))) > 1
    assert distance(made) < 0.02
