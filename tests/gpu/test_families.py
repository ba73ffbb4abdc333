"""Every family through Unsloth: the layers it would adapt itself, and Qwen3.5's linear attention. `make test-gpu`; without a GPU
tests/test_family_proof.py runs it."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not (torch.cuda.is_available() or os.environ.get("UNSLOTH_ALLOW_CPU")):
    pytest.skip("there is no NVIDIA GPU here", allow_module_level=True)
if importlib.util.find_spec("unsloth") is None:
    pytest.skip("unsloth is not installed: pip install vision-lora-job[gpu]", allow_module_level=True)

from job.model.load import import_first  # isort: skip

import_first("unsloth")  # before transformers, which it patches

from transformers import AutoModelForImageTextToText

from job.errors import SpecError
from job.model.collator import Collator
from job.model.load import load_model
from job.model.lora_targets import targets
from job.model.memory_model import Kept
from job.model.transformers_backend import linears, tables
from job.train.loss import token_loss
from tests.families import FAMILIES
from tests.other_families import OTHERS
from tests.tiny import job_spec, make_model, row

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
KEPT: Kept = "nothing" if DEVICE.type == "cuda" else "inputs"
"""Unsloth offloads to pinned memory, which needs a GPU."""
SWITCHES = ("finetune_vision_layers", "finetune_language_layers", "finetune_attention_modules", "finetune_mlp_modules")
NOT_OURS = {
    "qwen3_5_moe": r".*\.shared_expert_gate",  # a router, which stays as it was trained
    "gemma4": r"model\.(embed_vision\.embedding_projection|vision_tower\.patch_embedder\.input_proj)",
    "llama4": r".*\.vision_adapter\.mlp\.fc[12]",  # the connector, which has a switch of its own
}
"""What Unsloth adapts and we do not: routers, connectors, and what is in no block of a tower."""
CHOICES = [dict.fromkeys(SWITCHES, True), *(dict.fromkeys(SWITCHES, True) | {each: False} for each in SWITCHES)]


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_the_layers_are_those_that_unsloth_would_choose(family: str, tmp_path: Path) -> None:
    from unsloth_zoo.peft_utils import get_peft_regex  # type: ignore[import-not-found]

    if family in FAMILIES:
        make_model(family, tmp_path)
    else:
        OTHERS[family].make(tmp_path)
    try:
        model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    except (ImportError, ValueError, KeyError) as error:
        pytest.skip(f"transformers does not load it: {error}")
    layers = linears(model)
    for choice in CHOICES:
        try:
            ours = set(targets(job_spec(lora=choice).lora, layers, tables(model)))
        except SpecError:  # there are none of the kind
            continue
        theirs = re.compile(get_peft_regex(model, *choice.values()))
        more = {name for name in layers if theirs.fullmatch(name)} ^ ours
        assert all(re.fullmatch(NOT_OURS.get(family, "-"), name) and name not in ours for name in more), choice


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_experts_are_left_alone(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    make_model(family, folder, dtype=torch.bfloat16, device=DEVICE.type) if family in FAMILIES else OTHERS[family].make(
        folder
    )
    loaded = load_model(job_spec(lora={"r": 4}), folder, DEVICE, "unsloth", "16bit", KEPT, None)
    adapted = {name for name, each in loaded.model.named_parameters() if each.requires_grad}
    assert adapted
    assert not [name for name in adapted if ".experts" in name or ".gate." in name]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="its kernels need a GPU")
def test_linear_attention_has_unsloths_kernels_untuned_and_the_loss_of_pytorchs(tmp_path: Path) -> None:
    folder = make_model("qwen3_5", tmp_path, dtype=torch.bfloat16, device="cuda")
    gpu = torch.device("cuda", 0)

    def loss_by(backend: str) -> float:
        loaded = load_model(job_spec(lora={"r": 4}), folder, gpu, backend, "16bit", "nothing", None)
        inputs = {name: each.cuda() for name, each in Collator(loaded.processor, 2048)([row(1), row(2)]).items()}
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            return float(token_loss(loaded.model, inputs, None))

    found = loss_by("unsloth")
    kernels = [
        each for name, module in sys.modules.items() if name.startswith("fla.") for each in vars(module).values()
    ]
    tuned = [each for each in kernels if len(configurations(each)) > 1]
    assert any(configurations(each) for each in kernels)
    assert not tuned
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).cuda()
    loaded = load_model(job_spec(), folder, gpu, "transformers", "16bit", "nothing", None)
    inputs = {name: each.cuda() for name, each in Collator(loaded.processor, 2048)([row(1), row(2)]).items()}
    with torch.no_grad():
        assert found == pytest.approx(float(token_loss(plain, inputs, None)), rel=0.01)


def configurations(kernel: Any) -> list[Any]:
    while kernel is not None and not isinstance(getattr(kernel, "configs", None), list):
        kernel = getattr(kernel, "fn", None) if type(kernel).__module__.startswith(("triton.", "fla.")) else None
    return kernel.configs if kernel is not None else []
