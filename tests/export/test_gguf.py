"""GGUF by llama.cpp's own converter, and llama.cpp run on it.

`make test-gguf` brings and builds llama.cpp; elsewhere `LLAMA_CPP` must name its sources, inside those of llama-cpp-python,
and `LLAMA_CPP_BUILD` what cmake made of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
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

from job.errors import SpecError
from job.evaluate.records import Comparison
from job.evaluate.stage import Results
from job.export.gate import compare
from job.export.gguf import CONVERTER, rehearse, write_gguf
from job.export.gguf_numbers import strange_numbers
from job.export.read_back import read_folder
from job.export.stage import Exported, smaller
from tests.conftest import ROOT, job_environment
from tests.export.llama_cpp import MARKER, logits
from tests.export.published import CHANGES, make_published
from tests.export.test_gate import export
from tests.tiny import CPU, QUESTION, batch, job_spec, picture

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
    (tmp_path / "gguf-py").symlink_to(Path(SOURCES) / "gguf-py")
    return tmp_path / CONVERTER


NEAR, FAR = 0.01, 0.02  # shares of the spread of the logits; rounding alone makes 0.004 to 0.005
SHAPES = {  # as they are, and made smaller
    "qwen2_5_vl": [(224, 140), (255, 170)],
    "qwen3_vl": [(192, 128), (300, 200)],
    "gemma3": [(224, 224), (300, 300)],
}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_llama_cpp_computes_what_the_merged_model_computes(family: str, tmp_path: Path, program: Path) -> None:
    """The same tokens, and for each token of an answer nearly the same logits.

    The models are random, so their choices can be a hair apart: logits are compared, not words. That the comparison is
    sharp is shown by what it tells apart: the base from the merged model, one picture from another, and each constant.
    """
    base, merged = make_published(family, tmp_path / "base"), tmp_path / "merged"
    shutil.copytree(base, merged)
    tensors = load_file(merged / "model.safetensors")
    for name in (name for name in tensors if tensors[name].ndim == 2 and "proj" in name):
        tensors[name] += torch.randn_like(tensors[name]) * tensors[name].std() * 0.1
    save_file(tensors, merged / "model.safetensors")
    write_gguf(program, merged, tmp_path / "gguf")
    assert strange_numbers(program, merged, tmp_path / "gguf") == 0
    processor = AutoProcessor.from_pretrained(merged)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    answer = processor.tokenizer("There is a nodule in the left upper zone.", add_special_tokens=False).input_ids

    def computed(folder: Path, image: Image.Image, config: Any = None) -> tuple[list[int], np.ndarray]:
        inputs = processor(text=[prompt], images=[image], add_special_tokens=False, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        after = torch.tensor([answer[:-1]])
        for name, more in (("input_ids", after), ("attention_mask", after > -1), ("token_type_ids", after * 0)):
            for key in {name, f"mm_{name}"} & set(inputs):
                inputs[key] = torch.cat([inputs[key], more.to(inputs[key].dtype)], dim=1)
        model = AutoModelForImageTextToText.from_pretrained(folder, config=config, dtype=torch.float32)
        with torch.inference_mode():
            found = model(**inputs).logits[0, length - 1 :].numpy()
        tokens = inputs["input_ids"][0, :length]
        return tokens.where(tokens != model.config.image_token_id, -1).tolist(), found

    def served(image: Image.Image) -> tuple[list[int], np.ndarray]:
        marked = prompt.replace("<start_of_image>", f"\n\n{MARKER}\n\n")  # the lines that transformers adds by itself
        marked = marked.replace("<|vision_start|><|image_pad|><|vision_end|>", MARKER)
        return logits(tmp_path / "gguf", marked, image, answer)

    def distance(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.sqrt(np.square(one - other[:, : one.shape[1]]).mean()) / one.std())

    pictures = [picture(number, *shape) for number, shape in enumerate(SHAPES[family])]
    for image in pictures:
        (tokens, wanted), (read, found) = computed(merged, image), served(image)
        assert tokens == read
        assert distance(wanted, found) < NEAR
        assert distance(computed(base, image)[1], found) > FAR
    assert distance(computed(merged, picture(7, *SHAPES[family][-1]))[1], found) > FAR
    for part, name, value in CHANGES[family]:
        other = AutoConfig.from_pretrained(merged)
        setattr(getattr(other, part), name, value)
        assert distance(computed(merged, image, other)[1], found) > FAR, (name, value)
    # It keeps proportions and fills with black what transformers stretches; docs/merging.md says so.
    narrow = picture(3, 100, 150)
    assert distance(computed(merged, narrow)[1], served(narrow)[1]) > FAR


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_files_with_numbers_that_the_merged_weights_do_not_have_are_seen(
    family: str, tmp_path: Path, program: Path
) -> None:
    """A matrix is another's, or one of its rows is not zero as in the merged weights. Gemma's files have a matrix in float16."""
    base = make_published(family, tmp_path / "base")
    write_gguf(program, base, tmp_path / "gguf")
    assert strange_numbers(program, base, tmp_path / "gguf") == 0
    tensors = load_file(base / "model.safetensors")
    key = next(key for key in tensors if key.endswith("layers.0.mlp.up_proj.weight"))
    before = tensors[key].clone()
    shutil.copytree(base, tmp_path / "merged")
    for damage, least in ((lambda: before * 1.01, 1000), (lambda: torch.cat([before[:1] * 0, before[1:]]), 20)):
        tensors[key] = damage()
        save_file(tensors, tmp_path / "merged" / "model.safetensors")
        found = strange_numbers(program, tmp_path / "merged", tmp_path / "gguf")
        assert found > least
    assert found <= before.shape[1]


ANOTHER = "import sys\nsys.argv[1] = sys.argv[1].replace('merged', 'base')\n"


@pytest.mark.parametrize("other", ["", ANOTHER])
def test_a_job_publishes_only_files_that_are_of_its_merged_weights(
    other: str, tmp_path: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A converter that takes the base instead of the merged weights is seen."""
    program.write_text(other + program.read_text())
    monkeypatch.setenv("LLAMA_CPP", str(program.parent))
    made = export(make_published("qwen2_5_vl", tmp_path / "base"), tmp_path, 0.05)
    spec, rows = job_spec(evaluation={"batch_size": 2}, export={"gguf": True}), batch()
    read = partial(read_folder, spec.model, made.merged, made.base, CPU)
    verdict = compare(spec, made.loaded, made.base, read, rows)
    exported, data = Exported({"merged": made.merged}, gate=verdict), SimpleNamespace(evaluation=rows, train=rows)
    found = smaller(spec, made.loaded, exported, data, Results([], [], Comparison(), []), None)
    assert ("gguf" in found.folders) == (not other)
    if other:
        assert "of its numbers are not those of merged/" in str(found.smaller["gguf"].refused)
    else:
        assert found.smaller["gguf"].loss == pytest.approx(verdict.loss_merged, rel=0.01)
        assert "No share of the adapter's gain can be formed for gguf/" in str(found.smaller["gguf"].note)


def test_a_base_that_the_converter_does_not_know_is_refused_before_training(tmp_path: Path) -> None:
    """transformers 5 saves a Gemma without the tokenizer that Gemma is published with."""
    base = make_published("gemma3", tmp_path)
    (base / "tokenizer.model").unlink()
    with pytest.raises(SpecError, match="cannot make model.gguf of .* pre-tokenizer was not recognized"):
        rehearse(Path(SOURCES) / CONVERTER, base)


def test_llama_cpp_says_of_each_image_what_the_merged_model_says(tmp_path: Path, program: Path) -> None:
    """A job from beginning to end: a base that has learned to look, an adapter that teaches it another style, GGUF.

    Word for word, without tolerance: a greedy answer of some thirty tokens, each a choice among all that it could say. The
    weights of both sides are the same bits; llama.cpp rounds activations to bfloat16 and its cache to float16, which
    moves logits by far less than a trained model keeps between its first choice and its second.
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
