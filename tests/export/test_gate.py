"""The gate lets a right merge through and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from job.errors import GateRefused
from job.export.gate import Verdict, compare, refuse
from job.export.merge import merge
from job.model import Loaded
from job.spec import JobSpec
from tests.tiny import batch, job_spec, load_tiny, perturb, row

SPEC = job_spec(evaluation={"batch_size": 2})
ROWS = [*batch(), row(4, "There is an effusion in the right lung."), row(5, "The lungs are clear.")]


@dataclass(frozen=True)
class Exported:
    loaded: Loaded
    merged: Path


def export(base: Path, into: Path, size: float) -> Exported:
    loaded = perturb(load_tiny(base), size)
    loaded.model.save_pretrained(into / "adapter")
    merge(SPEC, base, into / "adapter", into / "merged")
    return Exported(loaded, into / "merged")


@pytest.fixture(scope="module")
def exported(family: str, tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(tiny(family, torch.bfloat16), tmp_path_factory.mktemp("gate"), 0.05)


def mixed(exported: Exported, into: Path, of_base: Callable[[str], bool]) -> Path:
    """The merged folder, with the base's weights where `of_base` says so."""
    shutil.copytree(exported.merged, into)
    base = load_file(exported.loaded.folder / "model.safetensors")
    merged = load_file(exported.merged / "model.safetensors")
    chosen = {key: base[key] if of_base(key) else merged[key] for key in merged}
    save_file(chosen, into / "model.safetensors", metadata={"format": "pt"})
    return into


def is_vision(key: str) -> bool:
    return "vision" in key or "visual" in key


def judge(exported: Exported, folder: Path, spec: JobSpec = SPEC) -> Verdict:
    verdict = compare(spec, exported.loaded, exported.merged.parent / "adapter", folder, ROWS)
    refuse(verdict, spec.export.gate)
    return verdict


def test_a_right_merge_passes(exported: Exported) -> None:
    verdict = judge(exported, exported.merged)
    assert (verdict.rows, set(verdict.groups)) == (len(ROWS), set(exported.loaded.groups))
    assert verdict.mean_logit_difference < 0.02 < verdict.mean_effect_of_adapter
    assert Verdict(**json.loads(json.dumps(verdict.facts()))) == verdict


def test_what_was_trained_on_4_bits_is_judged_in_16(exported: Exported) -> None:
    """The base is read again: the error of 4 bits is not the merge's."""
    trained = replace(exported.loaded, precision="4bit")
    verdict = judge(replace(exported, loaded=trained), exported.merged)
    assert verdict.mean_logit_difference < 0.02 < verdict.mean_effect_of_adapter


def test_the_base_in_place_of_the_merge_is_refused(exported: Exported) -> None:
    with pytest.raises(GateRefused, match="they are nearer to the base than to base \\+ adapter"):
        judge(exported, exported.loaded.folder)


@pytest.mark.parametrize("half", ["vision", "language"])
def test_a_merge_that_forgot_one_half_is_refused(exported: Exported, tmp_path: Path, half: str) -> None:
    forgot = mixed(exported, tmp_path / "half", lambda key: is_vision(key) == (half == "vision"))
    with pytest.raises(GateRefused, match=f"the {half}/(attention|mlp) adapters are not in them"):
        judge(exported, forgot)


def test_half_a_merge_is_told_even_where_its_effect_is_small(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The vision half moves logits by a fiftieth of their spread: within both bounds, and yet it is missed."""
    small = export(tiny("qwen3_vl", torch.bfloat16), tmp_path, 0.01)
    lax = job_spec(evaluation={"batch_size": 2}, export={"gate": {"max_mean_logit_difference": 0.5}})
    judge(small, small.merged, lax)
    with pytest.raises(GateRefused) as refused:
        judge(small, mixed(small, tmp_path / "half", is_vision), lax)
    assert "mean logit difference" not in str(refused.value)
    assert "vision" in str(refused.value)


def test_one_corrupted_layer_is_refused(exported: Exported, tmp_path: Path) -> None:
    folder = mixed(exported, tmp_path / "corrupt", lambda key: False)
    weights = load_file(folder / "model.safetensors")
    key = next(key for key in weights if "layers.1." in key and key.endswith("mlp.down_proj.weight"))
    weights[key] = weights[key].roll(1, dims=0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GateRefused) as refused:
        judge(exported, folder)
    assert refused.value.exit_code == 76
    assert re.search(
        r"mean logit difference 0\.\d+ is over .*; the adapter is published, merged is not$", str(refused.value)
    )


@pytest.mark.parametrize("family", ["qwen2_5_vl"], scope="module")
def test_weights_that_are_not_numbers_are_refused(family: str, exported: Exported, tmp_path: Path) -> None:
    folder = mixed(exported, tmp_path / "nan", lambda key: False)
    weights = load_file(folder / "model.safetensors")
    key = next(key for key in weights if key.endswith("mlp.down_proj.weight"))
    weights[key][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GateRefused):
        judge(exported, folder)


def test_trained_biases_are_in_both(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny("qwen2_5_vl", torch.bfloat16)
    loaded = perturb(load_tiny(base, bias="all"), 0.05)
    loaded.model.save_pretrained(tmp_path / "adapter")
    merge(SPEC, base, tmp_path / "adapter", tmp_path / "merged")
    judge(Exported(loaded, tmp_path / "merged"), tmp_path / "merged")


@pytest.mark.parametrize("family", ["mllama"], scope="module")
def test_measuring_leaves_the_adapters_as_they_were(family: str, exported: Exported) -> None:
    before = judge(exported, exported.merged)
    assert judge(exported, exported.merged) == before
