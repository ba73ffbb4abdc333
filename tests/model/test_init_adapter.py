"""A job that starts from an adapter begins as what that adapter is, or says why it cannot."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from job.errors import SpecError
from job.evaluate.generate import answer_losses
from job.model.base_model import base_facts, fetch_adapter
from job.model.init_adapter import fitted, other_base, read_init_adapter, rescaled
from job.model.loaded import Loaded
from job.model.lora_targets import pattern, targets
from job.model.transformers_backend import adapted, linears
from tests.tiny import batch, job_spec, load_tiny

LAST = r"model\.language_model\.layers\.[1-9]\.self_attn\.q_proj"


def made(base: Path, into: Path, **lora: Any) -> Path:
    """An adapter that PEFT itself made and saved, with something to say in A, B and biases."""
    model: Any = AutoModelForImageTextToText.from_pretrained(base)
    chosen = pattern(targets(job_spec().lora, linears(model)))
    model = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 16, "target_modules": chosen} | lora)))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                size = 0.1 if "lora_B" in name else 0.02
                weight += size * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(into)
    return into


def losses(model: Any, like: Loaded) -> list[float]:
    """Of three rows, nats, as `answer_losses` rounds them: to six digits behind the point."""
    held = Loaded(model.eval(), like.processor, like.folder, "transformers", "32bit", like.device, {})
    with torch.inference_mode():
        return [loss for loss, _ in answer_losses(held, batch(), 2048)]


def published(base: Path, adapter: Path) -> Any:
    """What PEFT makes of the files: whoever published them measured this."""
    return PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), str(adapter))


SHAPES: dict[str, dict[str, Any]] = {
    "another alpha": {"lora_alpha": 24},
    "rank-stabilised": {"use_rslora": True},
    "a rank of its own, lower": {"r": 3, "lora_alpha": 7},
    "patterns of rank and alpha": {
        "rank_pattern": {"k_proj": 2, LAST: 1},
        "alpha_pattern": {"v_proj": 40, "gate_proj": 3},
    },
    "all biases": {"bias": "all"},
    "biases of its layers": {"bias": "lora_only", "lora_alpha": 2},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_loss_is_the_one_that_the_adapter_had(tiny: Callable[..., Path], tmp_path: Path, shape: str) -> None:
    base = tiny("qwen2_5_vl")
    adapter = made(base, tmp_path, **SHAPES[shape])
    ours = load_tiny(base, start=adapter, lora_alpha=5, bias=SHAPES[shape].get("bias", "none"))
    right = losses(published(base, adapter), ours)
    assert losses(ours.model, ours) == pytest.approx(right, abs=1e-5)
    plain = losses(AutoModelForImageTextToText.from_pretrained(base), ours)
    assert min(abs(with_it - without) for with_it, without in zip(right, plain, strict=True)) > 1e-3
    scales = {float(ours.model.get_base_model().get_submodule(name).scaling["default"]) for name in adapted(ours.model)}
    assert scales == {5 / 4}


def test_a_scale_that_differs_by_a_power_of_two_changes_no_bit(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny("llava")
    adapter = made(base, tmp_path, lora_alpha=32)
    ours = load_tiny(base, start=adapter, lora_alpha=1)
    assert losses(ours.model, ours) == losses(published(base, adapter), ours)


def test_a_job_that_stabilises_ranks_keeps_what_a_plain_adapter_says(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny("llava")
    adapter = made(base, tmp_path)
    ours = load_tiny(base, start=adapter, r=16, lora_alpha=6, use_rslora=True)
    assert losses(ours.model, ours) == pytest.approx(losses(published(base, adapter), ours), abs=1e-5)
    found = read_init_adapter("first", adapter)
    told = rescaled(found, job_spec(lora={"r": 16, "lora_alpha": 6, "use_rslora": True}).lora)
    assert "the scale of first is 4, this job's is 1.5 (" in told
    assert not rescaled(found, job_spec(lora={"r": 4, "lora_alpha": 16}).lora)


OLD = {
    "mllama": (("model.language_model.", "language_model.model."), ("model.vision_model.", "vision_model.")),
    "qwen2_5_vl": (("model.language_model.", "model."), ("model.visual.", "visual.")),
    "gemma3": (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
    ),
}


@pytest.mark.parametrize("family", OLD)
def test_names_of_an_older_transformers_are_taken(tiny: Callable[..., Path], tmp_path: Path, family: str) -> None:
    base = tiny(family)
    adapter = made(base, tmp_path)
    new = load_file(adapter / "adapter_model.safetensors")
    start = load_tiny(base, start=adapter)
    old = dict[str, torch.Tensor]()
    for key, weight in new.items():
        name = key.removeprefix("base_model.model.")
        for today, before in OLD[family]:
            name = before + name.removeprefix(today) if name.startswith(today) else name
        old[f"base_model.model.{name}"] = weight
    assert old.keys() != new.keys()
    save_file(old, adapter / "adapter_model.safetensors")
    again = load_tiny(base, start=adapter)
    assert losses(again.model, again) == losses(start.model, start)


def changed(folder: Path, **config: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def with_weights(folder: Path, **weights: torch.Tensor) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | weights, file)
    return folder


def with_header(folder: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


def size_of(folder: Path) -> int:
    return (folder / "adapter_model.safetensors").stat().st_size


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "DoRA": (
        lambda adapter: changed(adapter, use_dora=True),
        "is a DoRA adapter, and a job starts from plain LoRA only",
    ),
    "DoRA by its weights": (
        lambda adapter: with_weights(adapter, **{"base_model.model.x.lora_magnitude_vector.weight": torch.ones(2)}),
        "is a DoRA adapter",
    ),
    "IA3": (lambda adapter: changed(adapter, peft_type="IA3"), "is of PEFT's type IA3"),
    "whole modules": (lambda adapter: changed(adapter, modules_to_save=["lm_head"]), "holds whole modules"),
    "whole modules by the weights": (
        lambda adapter: with_weights(adapter, **{"base_model.model.lm_head.weight": torch.ones(2, 2)}),
        r"holds whole weights beside its LoRA \(base_model\.model\.lm_head\.weight\)",
    ),
    "an embedding": (
        lambda adapter: with_weights(adapter, **{"base_model.model.embed_tokens.lora_embedding_A": torch.ones(2, 2)}),
        "adapts an embedding",
    ),
    "PiSSA": (lambda adapter: changed(adapter, init_lora_weights="pissa_niter_4"), "also changed its base model"),
    "a rank that is not its weights'": (
        lambda adapter: changed(adapter, r=8),
        "has rank 8 at .* by its weights 4 in A",
    ),
    "alpha in words": (
        lambda adapter: changed(adapter, lora_alpha="16"),
        "lora_alpha in .* is '16', which is not a number",
    ),
    "not JSON": (lambda adapter: (adapter / "adapter_config.json").write_text("{"), "is not JSON"),
    "not safetensors": (
        lambda adapter: (adapter / "adapter_model.safetensors").write_text("PK"),
        "is not a safetensors",
    ),
    "a header that is a list": (lambda adapter: with_header(adapter, []), "is not a safetensors"),
    "a tensor without a shape": (lambda adapter: with_header(adapter, {"a": {"dtype": "F32"}}), "is not a safetensors"),
    "cut short": (
        lambda adapter: os.truncate(adapter / "adapter_model.safetensors", size_of(adapter) - 1),
        "is not a safetensors file, or not all of it .*; fetch or save it again",
    ),
    "whole numbers": (
        lambda adapter: with_weights(
            adapter, **{"base_model.model.x.lora_A.weight": torch.ones(4, 8, dtype=torch.int8)}
        ),
        r"holds I8 numbers instead of floating-point ones \(base_model\.model\.x\.lora_A\.weight\)",
    ),
    "one layer under two names": (
        lambda adapter: with_weights(
            adapter, **{f"base_model.model.x.lora_A{each}.weight": torch.ones(4, 8) for each in ("", ".default")}
        ),
        "holds A twice for x",
    ),
}


@pytest.fixture(scope="module")
def first(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tiny("llava"), tmp_path_factory.mktemp("first"))


@pytest.fixture
def adapter(first: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    for file in first.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_plain_lora_is_refused_by_its_true_reason(adapter: Path, what: str) -> None:
    damage, reason = REFUSED[what]
    damage(adapter)
    with pytest.raises(SpecError, match=f"^lora.init_adapter: .*{reason}") as error:
        read_init_adapter("s3://lab/first", adapter)
    assert "s3://lab/first" in str(error.value)


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"r": 2}, r"has rank 4 at .*, and lora\.r is 2; set lora\.r to 4"),
        (
            {"finetune_vision_layers": False},
            r"was made for other layers: it also adapts \d+ of them, first model.vision",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_both_values(
    tiny: Callable[..., Path], adapter: Path, lora: dict[str, Any], reason: str
) -> None:
    refused(adapter, tiny("llava"), reason, **lora)


def refused(adapter: Path, base: Path, reason: str, **lora: Any) -> None:
    """By the headers of the base's files, as at `check`, and by the loaded model."""
    with pytest.raises(SpecError, match=reason):
        fitted(read_init_adapter("first", adapter), job_spec(lora={"r": 4} | lora).lora, base_facts(base).linears)
    with pytest.raises(SpecError, match=reason):
        load_tiny(base, start=adapter, **lora)


def test_an_adapter_for_another_base_is_refused(tiny: Callable[..., Path], adapter: Path) -> None:
    changed(adapter, base_model_name_or_path="lab/llava-tiny")
    refused(adapter, tiny("gemma3"), r"was made for another base model \(lab/llava-tiny\)")
    layer = next(
        key for key in load_file(adapter / "adapter_model.safetensors") if key.endswith("q_proj.lora_A.weight")
    )
    with_weights(adapter, **{layer: torch.ones(4, 48)})
    name = re.escape(layer.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
    refused(adapter, tiny("llava"), rf"was made for another base .*: {name} has \d+×48 there, and \d+×\d+ here")


def test_biases_that_the_job_would_not_train_are_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny("qwen2_5_vl")
    adapter = made(base, tmp_path, bias="all")
    refused(adapter, base, r"was trained with bias: all, and lora\.bias is none; set lora\.bias to all")
    refused(adapter, base, r"was trained with bias: all, and lora\.bias is lora_only", bias="lora_only")


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("adapter_model.safetensors", "holds no adapter_model.safetensors, and adapter_model.bin is not opened"),
        ("adapter_config.json", "holds no adapter_config.json, so it is not an adapter"),
        ("", "is not a folder here; name an adapter's folder or an s3:// prefix"),
    ],
)
def test_a_folder_without_an_adapter_says_what_it_lacks(
    adapter: Path, tmp_path: Path, missing: str, reason: str
) -> None:
    (adapter / "adapter_model.bin").write_bytes(b"")
    (adapter / missing).unlink() if missing else shutil.rmtree(adapter)
    with pytest.raises(SpecError, match=re.escape(f"{adapter} {reason}")):
        fetch_adapter(str(adapter), tmp_path / "scratch")


def test_a_base_of_another_name_is_told(adapter: Path) -> None:
    changed(adapter, base_model_name_or_path="meta-llama/Llama-3.2-11B-Vision")
    found = read_init_adapter("first", adapter)
    assert "was made for meta-llama/Llama-3.2-11B-Vision, and this job's base is lab/x" in other_base(found, "lab/x")
    assert not other_base(found, "unsloth/Llama-3.2-11B-Vision-unsloth-bnb-4bit")
    assert not other_base(found, "/models/mine")


def test_an_adapter_whose_training_was_lost_is_no_start(tiny: Callable[..., Path], adapter: Path) -> None:
    key = next(key for key in load_file(adapter / "adapter_model.safetensors") if key.endswith("q_proj.lora_B.weight"))
    weight = load_file(adapter / "adapter_model.safetensors")[key]
    weight[0, 0] = float("nan")
    with_weights(adapter, **{key: weight})
    name = re.escape(key.removeprefix("base_model.model.").removesuffix(".lora_B.weight"))
    with pytest.raises(SpecError, match=rf"not finite \(nan or inf\) at {name}"):
        load_tiny(tiny("llava"), start=adapter)
