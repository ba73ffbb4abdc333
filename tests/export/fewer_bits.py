"""Merged weights in fewer bits. Run by test_fewer_bits.py, in a process that sees bitsandbytes and llmcompressor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from job.evaluate.generate import to_device
from job.export import quantise
from job.export.gate import compare
from job.export.merge import copy_rest
from job.export.quantise import calibration_rows, write_fp8, write_int4, write_nf4
from job.export.read_back import read_folder
from job.export.stage import Exported, smaller
from job.model.collator import Collator
from job.model.loaded import Loaded
from job.model.transformers_backend import adapted, load_weights
from tests.export.test_gate import SPEC, Made, export, is_vision, judge, made, merge
from tests.export.trained import make_trained, make_wide
from tests.tiny import CPU, batch, load_tiny, models, perturb

__all__ = ["made"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def in_4_bits(tiny: Callable[..., Path]) -> Loaded:
    """Adapters beside a base that bitsandbytes holds in 4 bits, as a GPU would."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    loaded = load_tiny(tiny("qwen2_5_vl", torch.bfloat16))
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForImageTextToText.from_pretrained(
        loaded.folder, dtype=torch.bfloat16, quantization_config=nf4, device_map={"": CPU}
    )
    for module in base.modules():
        module.support_avx512bf16_for_cpu = False  # whose kernel wants widths in multiples of 32
    model = get_peft_model(base, LoraConfig(r=4, target_modules=r".*(q_proj|qkv|down_proj)")).eval()
    return perturb(replace(loaded, model=model, precision="4bit"), 0.05)


def held_weights(model: Any) -> dict[str, Callable[[], torch.Tensor]]:
    """For each weight that the model holds in 4 bits, by its name in the base: what it stands for, made when asked for."""
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            layer = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            found[f"{layer}.weight"] = partial(_dequantised, weight, state)
    return found


def _dequantised(weight: Any, state: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    whole: torch.Tensor = dequantize_4bit(weight.data, state)
    return whole


def test_a_base_held_in_4_bits_is_measured_in_16_and_let_go_before(in_4_bits: Loaded, tmp_path: Path) -> None:
    """Merged weights are right, and not what was trained: the verdict says how far apart they are."""
    made = merge(in_4_bits, tmp_path)
    weights = list(in_4_bits.model.parameters())
    sizes: list[int] = []
    verdict = judge(made, made.merged, let_go=lambda: sizes.append(sum(weight.numel() for weight in weights)))
    assert len(sizes) == 1
    assert verdict.mean_logit_difference < 0.02 < verdict.difference_from_trained


def test_merged_weights_in_4_bits_load_again(in_4_bits: Loaded, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    made = merge(in_4_bits, tmp_path)
    model = write_nf4(SPEC.model, made.merged, tmp_path / "merged_4bit", CPU)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged_4bit")
    assert AutoProcessor.from_pretrained(tmp_path / "merged_4bit").chat_template
    first, second = held_weights(model), held_weights(again)
    assert len(first) > 20
    assert all(torch.equal(first[name](), second[name]()) for name in first)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"], scope="module")
def test_merged_weights_in_fp8_touch_the_language_layers_only_and_load_again(
    family: str, made: Made, tmp_path: Path
) -> None:
    model = write_fp8(SPEC.model, made.merged, tmp_path / "fp8", CPU)
    whole, small = (load_file(folder / "model.safetensors") for folder in (made.merged, tmp_path / "fp8"))
    layers = {name for name in adapted(made.loaded.model) if not is_vision(name)}
    keys = {key for key, weight in small.items() if weight.dtype == torch.float8_e4m3fn}
    assert {made.base.names[key] for key in keys} == {f"{name}.weight" for name in layers}
    assert all(torch.equal(weight, small[key]) for key, weight in whole.items() if key not in keys)
    for key in keys:
        back = small[key].float() * small[f"{key}_scale"].float()
        assert float((back - whole[key].float()).norm() / whole[key].float().norm()) < 0.04
    assert difference(made.loaded, model) < 0.2


def difference(loaded: Loaded, model: Any) -> float:
    """Mean difference of the logits of base + adapter and of `model`, as a share of their standard deviation."""
    inputs = to_device(Collator(loaded.processor, 2048)(batch()), replace(loaded, precision="16bit"))
    inputs.pop("labels")
    with torch.inference_mode():
        right, found = loaded.model(**to_device(inputs, loaded)).logits, model(**inputs).logits.float()
    return float((right - found).abs().mean() / right.std())


@pytest.mark.parametrize("tuned", [True, False])
def test_merged_weights_in_int4_touch_the_language_layers_only_and_load_again(
    tuned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a model whose widths are multiples of the 128 columns that share a scale."""
    monkeypatch.setattr(quantise, "STEPS", 2)
    made = export(make_wide(tmp_path / "base"), tmp_path, 0.05)
    rows = calibration_rows(made.loaded, batch(), SPEC) if tuned else []
    processor = made.loaded.processor
    model = write_int4(SPEC.model, made.merged, tmp_path / "int4", CPU, processor, rows)
    assert [each.message for each in caplog.records if each.name == "job"] == []
    whole, small = (load_file(folder / "model.safetensors") for folder in (made.merged, tmp_path / "int4"))
    layers = {f"{name}.weight" for name in adapted(made.loaded.model) if not is_vision(name)}
    keys = {key for key, name in made.base.names.items() if name in layers}
    assert {f"{key}_packed" for key in keys} == {key for key, weight in small.items() if weight.dtype == torch.int32}
    assert all(torch.equal(weight, small[key]) for key, weight in whole.items() if key not in keys)
    rounded = dict(whole)
    for key in keys:
        digits = torch.stack([small[f"{key}_packed"] >> 4 * place & 15 for place in range(8)], -1).flatten(1) - 8
        back = digits.unflatten(1, (-1, 128)) * small[f"{key}_scale"].float().unsqueeze(-1)
        assert float((back.flatten(1) - whole[key].float()).norm() / whole[key].float().norm()) < 0.15
        rounded[key] = back.flatten(1).bfloat16()
    copy_rest(made.merged, tmp_path / "rounded")
    save_file(rounded, tmp_path / "rounded" / "model.safetensors", metadata={"format": "pt"})
    same = load_weights(SPEC.model, tmp_path / "rounded", CPU, "32bit")
    assert difference(replace(made.loaded, model=same), model) < 0.05  # bfloat16's own rounding of activations


def test_auto_round_comes_closer_than_rounding_to_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of layers of every kind: linear attention too, with layers that are too small to quantise."""
    text, vision = models.TEXT["qwen3_5"], models.VISION["qwen3_5"]
    wide = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "linear_value_head_dim": 32}
    monkeypatch.setitem(text, "tiny", text["tiny"] | wide)
    monkeypatch.setitem(vision, "tiny", vision["tiny"] | {"out_hidden_size": 128})
    monkeypatch.setattr(quantise, "STEPS", 20)
    made = export(models.make_model("qwen3_5", tmp_path / "base", dtype=torch.bfloat16), tmp_path, 0.01)
    rows = calibration_rows(made.loaded, batch(), SPEC)

    def lost(name: str, rows: list[dict[str, torch.Tensor]]) -> float:
        model = write_int4(SPEC.model, made.merged, tmp_path / name, CPU, made.loaded.processor, rows)
        return difference(made.loaded, model)

    assert lost("tuned", rows) < 0.2 < 0.4 < lost("nearest", [])
    assert [each.message for each in caplog.records if each.name == "job"] == []


def test_rows_do_not_calibrate_llama_whose_cross_attention_auto_round_confuses(tiny: Callable[..., Path]) -> None:
    assert calibration_rows(load_tiny(tiny("mllama")), batch(), SPEC) == []
    assert len(calibration_rows(load_tiny(tiny("qwen3_vl")), batch(), SPEC)) == 3


def test_a_model_that_auto_round_cannot_handle_is_rounded_to_the_nearest_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = export(make_wide(tmp_path / "base"), tmp_path, 0.05)
    rows = [{"input_ids": torch.zeros(1, 4)}]  # no integers
    write_int4(SPEC.model, made.merged, tmp_path / "int4", CPU, made.loaded.processor, rows)
    assert "merged_int4/ is rounded to the nearest, since auto-round failed:" in caplog.text
    write_int4(SPEC.model, made.merged, tmp_path / "plain", CPU, made.loaded.processor, [])
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("int4", "plain"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_each_format_keeps_the_gain_or_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration rows are training rows, and a bound of 1 is one that only the whole gain meets."""
    monkeypatch.setattr(quantise, "STEPS", 20)
    # its kernel for this instruction wants widths in multiples of 32
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    trained = make_trained(tmp_path, merged_4bit=True, merged_fp8=True, merged_int4=True, gate={"min_gain_kept": 1})
    made = merge(trained.loaded, tmp_path)
    read = partial(read_folder, trained.spec.model, made.merged, made.base, CPU)
    verdict = compare(trained.spec, trained.loaded, made.base, read, trained.data.evaluation)
    exported = Exported({"merged": made.merged}, gate=verdict)
    found = smaller(trained.spec, trained.loaded, exported, trained.data, trained.results, None)
    assert found.smaller.keys() == {"merged_4bit", "merged_fp8", "merged_int4"}
    for name, measured in found.smaller.items():
        assert measured.gain_kept.keys() == {"loss", "finding_accuracy"}
        assert measured.gain_kept["loss"] > 0.8, (name, measured)
        assert (name in found.folders) == (min(measured.gain_kept.values()) >= 1) == (measured.refused is None)
    assert found.smaller["merged_fp8"].gain_kept["finding_accuracy"] == 1
