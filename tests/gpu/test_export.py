"""Folding, both ways of it, and the gate where they really run: `make test-gpu`. Skipped where there is no GPU."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("there is no NVIDIA GPU here", allow_module_level=True)
BACKEND = "unsloth" if importlib.util.find_spec("unsloth") else "transformers"

from job.model.load import import_first  # isort: skip

import_first(BACKEND)  # before transformers, which it patches

from job.config.schema import JobSpec
from job.export.fold import Lora, changed
from job.export.gate import Verdict, compare, refuse
from job.export.merge import copy_rest, merge_to_folder, recipe
from job.export.quantise import write_nf4
from job.export.read_back import read_folder
from job.export.tensor_map import changes, read_adapter
from job.model.load import load_model
from job.model.loaded import Loaded, release
from job.model.oom_retry import free_cached
from job.model.transformers_backend import Offload
from job.model.weight_map import read_base
from tests.tiny import batch, job_spec, make_model, perturb

FAMILIES = ("mllama", "qwen2_5_vl", "gemma3")
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: make_model(family, tmp_path_factory.mktemp(family), dtype=torch.bfloat16, device="cuda")
        for family in FAMILIES
    }


def spec_of(**export: Any) -> JobSpec:
    return job_spec(lora={"r": 4}, evaluation={"batch_size": 2}, export=export)


def merged(loaded: Loaded, into: Path) -> Path:
    loaded.model.save_pretrained(into / "adapter")
    base = read_base(loaded.folder)
    todo = recipe(base, into / "adapter", changes(base, *read_adapter(into / "adapter")), GPU)
    merge_to_folder(todo, into / "merged")
    copy_rest(loaded.folder, into / "merged")
    return into / "merged"


def judge(loaded: Loaded, folder: Path, spec: JobSpec, offload: Offload | None = None) -> Verdict:
    """The gate as the job asks it: afterwards `loaded` is gone."""
    base = read_base(loaded.folder)
    read = partial(read_folder, spec.model, folder, base, GPU, offload=offload)
    let_go = partial(release, loaded.model)
    verdict = compare(spec, loaded, base, read, batch(), let_go=let_go, offload=offload)
    refuse(verdict, spec.export.gate)
    return verdict


def test_the_gpu_folds_as_the_cpu_does() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((512, 384), (16, 384), (512, 16)))
    change = Lora(a, b * 0.1, 2.0)
    here, there = changed(weight.bfloat16(), change), changed(weight.bfloat16().to(GPU), change).cpu()
    assert float((here != there).float().mean()) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_16_bits_is_merged_right(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    loaded = perturb(load_model(spec_of(), folders[family], GPU, BACKEND, "16bit", "nothing", None), 0.05)
    verdict = judge(loaded, merged(loaded, tmp_path), spec_of())
    assert verdict.wrong == []
    assert verdict.mean_logit_difference < 3 * verdict.rounding_logit_difference


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_4_bits_is_judged_in_16_with_a_part_outside_the_gpu(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    verdicts = []
    for room in (None, 300_000):
        loaded = perturb(load_model(spec_of(), folders[family], GPU, BACKEND, "4bit", "nothing", None), 0.05)
        folder = merged(loaded, tmp_path / str(room))
        offload = None if room is None else Offload(room, tmp_path / "offloaded")
        verdicts.append(judge(loaded, folder, spec_of(), offload))
    whole, parted = verdicts
    assert whole.wrong == parted.wrong == []
    assert parted.mean_logit_difference < 3 * parted.rounding_logit_difference
    assert parted.loss_merged == pytest.approx(whole.loss_merged, rel=0.01)
    small = write_nf4(spec_of().model, tmp_path / "None" / "merged", tmp_path / "merged_4bit", GPU)
    assert any(getattr(weight, "quant_state", None) is not None for weight in small.parameters())
    assert (tmp_path / "merged_4bit" / "config.json").exists()


def test_a_model_that_is_let_go_leaves_the_gpu_empty_whoever_still_refers_to_it(
    folders: dict[str, Path],
) -> None:
    free_cached()
    before = torch.cuda.memory_allocated()
    loaded = load_model(spec_of(), folders["mllama"], GPU, BACKEND, "4bit", "nothing", None)
    assert torch.cuda.memory_allocated() > before + 500_000
    release(loaded.model)
    assert torch.cuda.memory_allocated() < before + 100_000
