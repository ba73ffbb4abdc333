"""Merged weights in fewer bits. Run by test_fewer_bits.py, in a process that sees bitsandbytes and llmcompressor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from job.errors import GateRefused
from job.evaluate.generate import to_device
from job.export.places import read_base
from job.export.quantised import held_weights, write_fp8, write_nf4
from job.model import Loaded
from job.model.collator import Collator
from job.model.transformers_backend import adapted
from tests.export.test_gate import SPEC, Made, is_vision, judge, made, merge
from tests.tiny import CPU, batch, job_spec, load_tiny, perturb

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


def test_a_base_held_in_4_bits_is_folded_onto_both_ways_and_measured(in_4_bits: Loaded, tmp_path: Path) -> None:
    """Onto its files it is right but not what was trained; onto what the 4 bits stand for it is both."""
    original = judge(merge(in_4_bits, tmp_path / "original"), tmp_path / "original" / "merged")
    keys = {name: key for key, name in read_base(in_4_bits.folder).names.items()}
    held = {keys[name]: weight for name, weight in held_weights(in_4_bits.model).items()}
    assert len(held) > 20
    made = merge(in_4_bits, tmp_path / "dequantised", held)
    spec = job_spec(evaluation={"batch_size": 2}, export={"fold_onto": "dequantised"})
    dequantised = judge(made, made.merged, spec)
    assert dequantised.difference_from_trained < 0.05 < original.difference_from_trained
    assert abs(dequantised.loss_merged - dequantised.loss_adapter) < 0.02
    with pytest.raises(GateRefused, match="weights are not base"):
        judge(made, made.merged)


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
    inputs = to_device(Collator(made.loaded.processor, 2048)(batch()), replace(made.loaded, precision="16bit"))
    inputs.pop("labels")
    with torch.inference_mode():
        right, found = made.loaded.model(**to_device(inputs, made.loaded)).logits, model(**inputs).logits.float()
    assert float((right - found).abs().mean() / right.std()) < 0.2
