"""GGUF by llama.cpp's own converter, and llama.cpp run on it.

`make test-gguf` brings and builds llama.cpp; elsewhere `LLAMA_CPP` must name its sources and `LLAMA_CPP_BUILD` what cmake
made of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from job.export.gguf import CONVERTER, converter, write_gguf
from tests.conftest import ROOT, job_environment
from tests.tiny import models

SOURCES, BUILD = os.environ.get("LLAMA_CPP", ""), os.environ.get("LLAMA_CPP_BUILD", "")
pytestmark = pytest.mark.skipif(
    not (SOURCES and BUILD), reason="LLAMA_CPP and LLAMA_CPP_BUILD name no llama.cpp; make test-gguf brings it"
)
sys.path.append(str(ROOT / "examples"))

# It knows published tokenizers by what they make of a long text. These small ones are cut out of one of them.
KNOWS_THE_TOKENIZER = f"""
import runpy, sys
sys.path[:0] = ["{SOURCES}", "{SOURCES}/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
runpy.run_path("{SOURCES}/{CONVERTER}", run_name="__main__")
"""
IMAGES = 12


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The converter, in a folder that `LLAMA_CPP` can name."""
    (tmp_path / CONVERTER).write_text(KNOWS_THE_TOKENIZER)
    return tmp_path / CONVERTER


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_llama_cpps_converter_takes_every_weight_as_it_is(family: str, tmp_path: Path, program: Path) -> None:
    merged = models.make_model(family, tmp_path / "merged", dtype=torch.bfloat16)
    as_published(family, merged)
    assert converter(family).name == CONVERTER
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


def test_llama_cpp_says_of_each_image_what_the_merged_model_says(tmp_path: Path, program: Path) -> None:
    """A job from beginning to end: a base that has learned to look, an adapter that teaches it another style, GGUF.

    Word for word, without tolerance: a greedy answer of some thirty tokens, each a choice among all that it could say. The
    weights of both sides are the same bits; llama.cpp rounds activations to bfloat16 and its cache to float16, which
    moves logits by far less than a trained model keeps between its first choice and its second.

    Qwen3-VL and Gemma 3 are not run: there is no tiny one that has learned to look, and one with random weights has two
    first choices so close that rounding decides.
    """
    from radiographs import make_data
    from tiny_base import INSTRUCTION, captions

    make_data(tmp_path / "data", 80, 4, seed=0)
    make_base(tmp_path / "base")
    spec = {
        "model": {"name_or_path": str(tmp_path / "base")},
        "lora": {"r": 16, "lora_alpha": 32},
        "dataset": {"path": str(tmp_path / "data"), "group_column": "patient_id", "eval_fraction": 0.25},
        "training": {"num_train_epochs": 5, "learning_rate": 3e-3},
        "evaluation": {"max_rows": IMAGES, "explained_rows": 0},
        "export": {"gguf": True},
        "output": {"url": str(tmp_path / "output")},
    }
    environment = job_environment(tmp_path, JOB_SPEC=yaml.safe_dump(spec), LLAMA_CPP=str(tmp_path))
    subprocess.run([sys.executable, "-m", "job", "run"], env=environment, cwd=ROOT, check=True)
    output = tmp_path / "output"
    rows = [json.loads(line) for line in (tmp_path / "data" / "metadata.jsonl").read_text().splitlines()]
    held = [json.loads(line)["id"] for line in (output / "evaluation" / "after.jsonl").read_text().splitlines()]
    files = [tmp_path / "data" / rows[int(name.removeprefix("row-"))]["file_name"] for name in held]

    def said(folder: Path) -> list[str]:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        return captions(model, AutoProcessor.from_pretrained(folder), [Image.open(file) for file in files])

    before, merged = said(tmp_path / "base"), said(output / "merged")
    assert not set(before) & set(merged)
    assert len(set(merged)) > IMAGES / 2
    assert [answer(output / "gguf", file, INSTRUCTION) for file in files] == merged


def make_base(folder: Path) -> None:
    """The demo's base with a tower that llama.cpp can run, in bfloat16, which is what GGUF holds.

    Its code has constants where transformers has a configuration: 10000 as the base of the tower's rotation (the demo has
    100), at least one layer that attends to windows, of 112 pixels. And its converter's table knows the connector's second
    matrix by a number that a tower of two layers does not reach.
    """
    from tiny_base import draw_pool, learn_to_say, learn_to_see
    from tiny_model import build_model, build_processor

    rng = np.random.default_rng(1)
    processor = build_processor()
    small = build_model(processor, seed=0)
    tower: dict[str, Any] = {"depth": 3, "fullatt_block_indexes": [2]}
    tower["rope_parameters"] = {"rope_type": "axial", "rope_theta": 10000.0}
    config = small.config.to_dict()
    config["vision_config"] |= tower
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(config))
    model.generation_config = small.generation_config
    pool = draw_pool(2048, rng)
    learn_to_see(model, pool, 200, rng)
    learn_to_say(model, processor, pool, 300, rng)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def answer(gguf: Path, image: Path, question: str) -> str:
    """What llama.cpp's command line says, with the chat template that the file holds.

    It prints from a thread that it does not wait for, so on a busy machine the end is sometimes missing. Words come out in
    their order: where the newline behind the answer is, the whole answer is.
    """
    command = [f"{BUILD}/bin/llama-mtmd-cli", "--jinja", "--temp", "0", "--predict", "48", "--threads", "1"]
    command += ["--model", str(gguf / "model.gguf"), "--mmproj", str(gguf / "mmproj.gguf")]
    command += ["--image", str(image), "--prompt", question]
    for _ in range(100):
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.lstrip()
        if said.endswith("\n"):
            break
    return said.strip()
