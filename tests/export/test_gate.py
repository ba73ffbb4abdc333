"""The gate lets a right merge through and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from job.config.schema import JobSpec
from job.errors import GateRefused
from job.export.gate import Verdict, compare, refuse
from job.export.merge import copy_rest, merge_to_folder, merge_to_store, recipe
from job.export.read_back import Check, read_back, read_folder
from job.export.tensor_map import changes, read_adapter
from job.export.verify import from_memory, wrong_tensors
from job.model.loaded import Loaded
from job.model.transformers_backend import Offload, adapted, load, load_processor
from job.model.weight_map import Base, read_base
from job.store import open_store
from job.store.protocol import Corrupt
from tests.tiny import CPU, batch, job_spec, load_tiny, perturb, row

SPEC = job_spec(evaluation={"batch_size": 2})
ROWS = [*batch(), row(4, "There is an effusion in the right lung."), row(5, "The lungs are clear.")]


WRONG = "model.language_model.layers.0.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Made:
    loaded: Loaded
    base: Base
    adapter: Path
    merged: Path


def export(base: Path, into: Path, size: float, **lora: Any) -> Made:
    loaded = perturb(load_tiny(base, **lora), size)
    return merge(loaded, into)


def merge(loaded: Loaded, into: Path) -> Made:
    loaded.model.save_pretrained(into / "adapter")
    base = read_base(loaded.folder)
    todo = recipe(base, into / "adapter", changes(base, *read_adapter(into / "adapter")), CPU)
    merge_to_folder(todo, into / "merged")
    copy_rest(loaded.folder, into / "merged")
    return Made(loaded, base, into / "adapter", into / "merged")


@pytest.fixture(scope="module")
def made(family: str, tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    return export(tiny(family, torch.bfloat16), tmp_path_factory.mktemp("gate"), 0.05)


def altered(made: Made, into: Path, alter: Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], Any]) -> Path:
    """The merged folder, its weights (first argument) changed, with the base's (second) at hand."""
    shutil.copytree(made.merged, into)
    weights = load_file(made.merged / "model.safetensors")
    alter(weights, load_file(made.loaded.folder / "model.safetensors"))
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
    return into


def measure(made: Made, folder: Path, spec: JobSpec = SPEC, **how: Any) -> Verdict:
    return compare(spec, made.loaded, made.base, partial(read_folder, spec.model, folder, made.base, CPU), ROWS, **how)


def judge(made: Made, folder: Path, spec: JobSpec = SPEC, **how: Any) -> Verdict:
    verdict = measure(made, folder, spec, **how)
    refuse(verdict, spec.export.gate)
    return verdict


def test_a_right_merge_passes_and_differs_by_no_more_than_rounding(made: Made) -> None:
    before = {name: weight.clone() for name, weight in made.loaded.model.named_parameters()}
    verdict = judge(made, made.merged)
    assert (verdict.rows, verdict.wrong) == (len(ROWS), [])
    assert sum(group["adapted"] for group in verdict.weights.values()) == len(adapted(made.loaded.model))
    assert set(verdict.weights) == set(made.loaded.groups)
    assert verdict.mean_logit_difference < 0.02 < verdict.mean_effect_of_adapter
    assert (verdict.warning, verdict.effect_kept) == (None, pytest.approx(1, abs=0.02))
    assert 0.7 < verdict.mean_logit_difference / verdict.rounding_logit_difference < 1.2
    assert abs(verdict.loss_merged - verdict.loss_adapter) < 0.01 < abs(verdict.loss_base - verdict.loss_adapter) + 0.01
    assert Verdict(**json.loads(json.dumps(asdict(verdict)))) == verdict
    for name, weight in made.loaded.model.named_parameters():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_adapter_that_rounding_eats_is_told_and_float32_keeps_it(
    dtype: torch.dtype, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """An effect of 0.0003 of the logits' spread, of which bfloat16 keeps a twentieth."""
    small = export(tiny("qwen3_vl", dtype), tmp_path, 0.00002)
    verdict = judge(small, small.merged)
    assert 0.0002 < verdict.mean_effect_of_adapter < 0.0005
    if dtype == torch.float32:
        assert (verdict.warning, verdict.effect_kept) == (None, pytest.approx(1, abs=0.05))
    else:
        assert verdict.effect_kept is not None
        assert verdict.effect_kept < 0.2
        assert f"keep {verdict.effect_kept:.0%} of its effect. Serve adapter/ with the base model" in str(
            verdict.warning
        )


def test_of_a_few_tokens_one_may_differ_but_not_two(made: Made) -> None:
    """Sixteen answers of yes or no have 32 tokens, of which one is over three in a hundred."""
    verdict = replace(measure(made, made.merged), tokens=32, rounding_token_agreement=1.0)
    refuse(replace(verdict, token_agreement=31 / 32), SPEC.export.gate)
    with pytest.raises(GateRefused, match=r"token agreement 0\.9375 is under 0\.9688, the least"):
        refuse(replace(verdict, token_agreement=30 / 32), SPEC.export.gate)


def is_vision(key: str) -> bool:
    return "vision" in key or "visual" in key


def test_the_gate_sees_the_processor_that_is_published(tiny: Callable[..., Path], tmp_path: Path) -> None:
    made = export(tiny("qwen2_5_vl", torch.bfloat16), tmp_path, 0.05)
    judge(made, made.merged, processor=load_processor(SPEC.model, made.merged))
    file = made.merged / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"]["image_mean"] = [0.9, 0.1, 0.5]
    file.write_text(json.dumps(settings))
    with pytest.raises(GateRefused):
        judge(made, made.merged, processor=load_processor(SPEC.model, made.merged))


@pytest.mark.parametrize("half", ["vision", "language"])
def test_a_merge_that_forgot_one_half_is_refused_however_small_it_is(
    half: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Adapters of a thousandth: both bounds are far."""
    small = export(tiny("qwen3_vl", torch.bfloat16), tmp_path, 0.0005)

    def forget(weights: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
        weights.update({key: base[key] for key in base if is_vision(key) == (half == "vision")})

    judge(small, small.merged)
    verdict = measure(small, altered(small, tmp_path / "half", forget))
    assert verdict.mean_logit_difference < 0.02
    with pytest.raises(
        GateRefused, match=rf"\d+ of \d+ weights are not base \+ adapter, first \S+ \({half}/"
    ) as refused:
        refuse(verdict, SPEC.export.gate)
    assert refused.value.exit_code == 76
    assert str(refused.value).endswith("the adapter is published, the merged model is not")


@pytest.mark.parametrize("family", ["mllama", "gemma3"], scope="module")
def test_the_base_in_place_of_the_merge_is_refused(family: str, made: Made) -> None:
    with pytest.raises(
        GateRefused, match=r"mean logit difference .*; they are closer to the base model than to base \+ adapter"
    ):
        judge(made, made.loaded.folder)


@pytest.mark.parametrize("family", ["llava"], scope="module")
@pytest.mark.parametrize("damage", ["a rolled row", "not a number", "an unadapted weight", "a missing scale"])
def test_one_wrong_weight_is_named(family: str, made: Made, tmp_path: Path, damage: str) -> None:
    plain = damage == "an unadapted weight"
    name = "layers.1.input_layernorm.weight" if plain else "layers.1.mlp.down_proj.weight"

    def alter(weights: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
        key = next(key for key in weights if key.endswith(name) and "language" in key)
        if damage == "a rolled row":
            weights[key] = weights[key].roll(1, dims=0)
        elif damage == "not a number":
            weights[key][0] = torch.nan
        elif plain:
            weights[key] *= 1.1
        else:
            weights[key] = ((weights[key].float() + base[key].float()) / 2).bfloat16()

    with pytest.raises(
        GateRefused, match=rf"1 of \d+ weights are not base \+ adapter, first model\.language_model\.{name}"
    ):
        judge(made, altered(made, tmp_path / "altered", alter))


def embedding(key: str) -> bool:
    return "embed_tokens" in key


def adapted_weight(key: str) -> bool:
    return key.endswith("layers.0.mlp.down_proj.weight") and not is_vision(key)


def zero_a_row(weight: torch.Tensor) -> None:
    weight[-1] = 0


def flip_one_number(weight: torch.Tensor) -> None:
    weight.view(-1)[7] *= -1


def double_one_in_200(weight: torch.Tensor) -> None:
    weight.view(-1)[::200] *= 2


def swap_rows(weight: torch.Tensor) -> None:
    weight[:2] = weight[:2].flip(0)


@pytest.mark.parametrize("family", ["qwen3_vl"], scope="module")
@pytest.mark.parametrize("where", [embedding, adapted_weight])
@pytest.mark.parametrize("damage", [zero_a_row, flip_one_number, double_one_in_200, swap_rows])
def test_a_few_wrong_numbers_of_any_tensor_are_refused(
    family: str, made: Made, tmp_path: Path, where: Any, damage: Any
) -> None:
    keys: list[str] = []

    def alter(weights: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
        keys.append(next(filter(where, weights)))
        before = weights[keys[0]].clone()
        damage(weights[keys[0]])
        assert not torch.equal(before, weights[keys[0]])

    verdict = measure(made, altered(made, tmp_path / "altered", alter))
    assert verdict.wrong == [made.base.names[keys[0]]]
    with pytest.raises(GateRefused, match=r"1 of \d+ weights are not base \+ adapter"):
        refuse(verdict, SPEC.export.gate)


@pytest.mark.parametrize("family", ["llava"], scope="module")
@pytest.mark.parametrize("damage", ["swapped", "cut off", "longer", "another header"])
def test_a_file_whose_parts_are_elsewhere_is_refused(family: str, made: Made, tmp_path: Path, damage: str) -> None:
    file = tmp_path / "model.safetensors"
    content = bytearray((made.merged / file.name).read_bytes())
    one, other = (
        slot
        for key, slot in made.base.slots.items()
        if key.endswith(("layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight")) and not is_vision(key)
    )
    if damage == "swapped":
        halves = content[one.start : one.end], content[other.start : other.end]
        content[other.start : other.end], content[one.start : one.end] = halves
    elif damage == "another header":
        content[:] = content.replace(b"gate_proj", b"gAte_proj", 1)
    file.write_bytes(content[:-1] if damage == "cut off" else content + b" " * (damage == "longer"))
    wrong = wrong_tensors(from_memory(made.base, made.loaded.model, CPU), file.name, file)
    assert len(wrong) == (2 if damage == "swapped" else 1)
    assert damage == "swapped" or wrong == [file.name]


@pytest.mark.parametrize("family", ["llava"], scope="module")
def test_a_sum_that_another_device_rounds_otherwise_is_no_fault(family: str, made: Made, tmp_path: Path) -> None:
    right = from_memory(made.base, made.loaded.model, CPU)
    key = next(key for key in right.changes if adapted_weight(key))

    def found(every: int) -> list[str]:
        def next_to(weights: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
            weights[key].view(torch.int16).view(-1)[::every] += 1

        folder = altered(made, tmp_path / str(every), next_to)
        return wrong_tensors(right, "model.safetensors", folder / "model.safetensors")

    assert found(150) == []
    assert found(50) == [made.base.names[key]]


@pytest.mark.parametrize("family", ["qwen2_5_vl"], scope="module")
def test_a_model_that_says_something_else_with_the_right_weights_is_refused(
    family: str, made: Made, tmp_path: Path
) -> None:
    shutil.copytree(made.merged, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.1
    (tmp_path / "merged" / "config.json").write_text(json.dumps(config))
    with pytest.raises(GateRefused, match="base \\+ adapter: mean logit difference"):
        judge(made, tmp_path / "merged")


@pytest.mark.parametrize("family", ["llava"], scope="module")
def test_what_rounding_alone_does_to_a_model_is_no_fault(family: str, made: Made) -> None:
    """Bounds that no merge of this model can keep, since rounding its weights crosses them."""
    gate = {"max_mean_logit_difference": 1e-4, "min_token_agreement": 1.0}
    judge(made, made.merged, job_spec(evaluation={"batch_size": 2}, export={"gate": gate}))
    strict = job_spec(evaluation={"batch_size": 2}, export={"gate": gate | {"rounding_allowance": 0.1}})
    with pytest.raises(GateRefused, match="over 0.1 times what rounding alone causes"):
        judge(made, made.merged, strict)


def test_trained_biases_are_in_both(tiny: Callable[..., Path], tmp_path: Path) -> None:
    made = export(tiny("qwen2_5_vl", torch.bfloat16), tmp_path, 0.05, bias="all")
    with torch.no_grad():
        for name, weight in made.loaded.model.named_parameters():
            if name.endswith("bias"):
                weight.add_(0.2)
    shutil.rmtree(made.merged)
    made = merge(made.loaded, tmp_path)
    assert judge(made, made.merged).wrong == []


def test_a_model_of_which_a_part_waits_outside_gets_the_same_verdict(
    family: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """As for a base that was held in 4 bits on a card too small for 16: it and the merged model come part by part."""
    base = tiny(family, torch.bfloat16)
    loaded = perturb(replace(load(job_spec(lora={"r": 4}), base, CPU, None, "16bit"), precision="4bit"), 0.05)
    made = merge(loaded, tmp_path)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    offload = Offload(size // 2, tmp_path / "offloaded")
    parts = []

    def read(precision: str, check: Check) -> Any:
        model = read_folder(SPEC.model, made.merged, made.base, CPU, precision, check, offload)
        parts.append({weight.device.type for weight in model.parameters()})
        norms = [module for name, module in model.named_modules() if "norm" in name.rpartition(".")[2]]
        parts.append({weight.device.type for norm in norms for weight in norm.parameters()})
        return model

    parted = compare(SPEC, loaded, made.base, read, ROWS, offload=offload)
    assert parts == [{"cpu", "meta"}, {"cpu"}]
    assert parted == measure(made, made.merged)
    assert parted.wrong == []
    assert parted.mean_logit_difference < 2 * parted.rounding_logit_difference


def test_a_base_of_32_bits_that_was_trained_in_16_is_merged_in_32(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The adapter is large, so that sums are small beside the base's weights, whose rounding then is most of the difference."""
    base = tiny("qwen3_vl", torch.float32)
    made = merge(perturb(load(job_spec(lora={"r": 4}), base, CPU, None, "16bit"), 0.2), tmp_path)
    assert measure(made, made.merged).wrong == []
    wrong = altered(made, tmp_path / "other", lambda weights, own: weights.update({WRONG: own[WRONG]}))
    assert measure(made, wrong).wrong == [WRONG]


@pytest.mark.parametrize("family", ["llava"], scope="module")
def test_biases_trained_beside_a_base_in_4_bits_are_in_both(
    family: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    loaded = load(job_spec(lora={"r": 4, "bias": "all"}), tiny(family, torch.bfloat16), CPU, None, "16bit")
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if name.endswith("bias"):
                weight.add_(0.2)
    made = merge(replace(loaded, precision="4bit"), tmp_path)
    assert judge(made, made.merged).wrong == []


@pytest.mark.parametrize("family", ["mllama"], scope="module")
def test_weights_are_read_back_from_the_store_that_they_were_sent_to(family: str, made: Made, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    todo = recipe(made.base, made.adapter, changes(made.base, *read_adapter(made.adapter)), CPU)
    sent = merge_to_store(todo, store, "merged")
    copy_rest(made.base.folder, tmp_path / "rest")
    read = partial(read_back, SPEC.model, tmp_path / "rest", made.base, store, "merged", sent, CPU)
    assert compare(SPEC, made.loaded, made.base, read, ROWS) == judge(made, made.merged)
    assert not list(tmp_path.glob("**/part*"))
    path = tmp_path / "store" / "merged" / made.base.files[0]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(Corrupt):
        read("32bit", lambda file, path: None)
