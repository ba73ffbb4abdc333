"""GGUF by llama.cpp's own converter. `make test-gguf` brings it; elsewhere `LLAMA_CPP` must name its sources."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from job.export.gguf import converter, write_gguf
from tests.tiny import models

SOURCES = os.environ.get("LLAMA_CPP", "")
pytestmark = pytest.mark.skipif(not SOURCES, reason="LLAMA_CPP names no llama.cpp sources; make test-gguf brings them")

# It knows published tokenizers by what they make of a long text. These small ones are cut out of one of them.
KNOWS_THE_TOKENIZER = f"""
import runpy, sys
sys.path[:0] = ["{SOURCES}", "{SOURCES}/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
runpy.run_path("{SOURCES}/convert_hf_to_gguf.py", run_name="__main__")
"""


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_llama_cpps_converter_takes_every_weight_as_it_is(family: str, tmp_path: Path) -> None:
    merged = models.make_model(family, tmp_path / "merged", dtype=torch.bfloat16)
    as_published(family, merged)
    program = tmp_path / converter(family).name
    program.write_text(KNOWS_THE_TOKENIZER)
    write_gguf(program, merged, tmp_path / "gguf")
    sys.path.insert(0, f"{SOURCES}/gguf-py")
    import gguf

    made = {name: gguf.GGUFReader(tmp_path / "gguf" / f"{name}.gguf").tensors for name in ("model", "mmproj")}
    found = {np.ascontiguousarray(tensor.data).tobytes() for tensors in made.values() for tensor in tensors}
    names = {tensor.name for tensor in made["mmproj"]}
    depth = AutoConfig.from_pretrained(merged).vision_config.to_dict()
    blocks = range(depth.get("depth") or depth["num_hidden_layers"])
    assert all(any(name.startswith(f"v.blk.{block}.") for name in names) for block in blocks)
    weights = {
        name: weight.view(torch.int16).numpy().tobytes()
        for name, weight in load_file(merged / "model.safetensors").items()
        if "_proj.weight" in name and "vision" not in name and "visual" not in name
    }
    assert len(weights) >= 14
    assert [name for name, weight in weights.items() if weight not in found] == []


def as_published(family: str, folder: Path) -> None:
    """Deep enough a tower for the converter's table of names, and Gemma's under the name that its checkpoints have."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config.vision_config, "depth"):
        config.vision_config.depth = 4
    if hasattr(config.vision_config, "deepstack_visual_indexes"):
        config.vision_config.deepstack_visual_indexes = [0, 1, 2]
    AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    if family == "gemma3":
        file = folder / "model.safetensors"
        tensors = load_file(file)
        save_file(
            {name.replace("vision_tower.", "vision_tower.vision_model."): tensors[name] for name in tensors}, file
        )
