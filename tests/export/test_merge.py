"""Merged weights are the base's files with the adapter folded in, and nothing else is different."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from job.errors import SpecError, Unavailable
from job.export.fold import Lora, changed, dither
from job.export.merge import Recipe, copy_rest, merge_to_folder, merge_to_store, recipe
from job.export.stage import check_mergeable
from job.export.tensor_map import changes, read_adapter
from job.model.base_model import base_facts, module_name
from job.model.collator import Collator
from job.model.loaded import Loaded
from job.model.transformers_backend import adapted
from job.model.weight_map import Base, read_base
from job.store import open_store
from tests.conftest import ROOT
from tests.export import stalling
from tests.tiny import CPU, batch, job_spec, load_tiny, perturb, plain_model


@dataclass(frozen=True)
class Made:
    base: Base
    adapter: Path
    merged: Path
    loaded: Loaded


def sharded(base: Path, into: Path, rename: Callable[[str], str] = lambda key: key) -> Path:
    """The same base in three weight files, its tensors under other names."""
    copy_rest(base, into)
    weights = {rename(key): weight for key, weight in load_file(base / "model.safetensors").items()}
    keys, files = sorted(weights), {}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        part = {key: weights[key] for key in keys[number::3]}
        save_file(part, into / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    (into / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return into


def recipe_of(folder: Path, adapter: Path) -> Recipe:
    base = read_base(folder)
    return recipe(base, adapter, changes(base, *read_adapter(adapter)), CPU)


def merge(folder: Path, adapter: Path, into: Path) -> Base:
    todo = recipe_of(folder, adapter)
    merge_to_folder(todo, into)
    copy_rest(folder, into)
    return todo.base


@pytest.fixture(scope="module")
def made(family: str, tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A 16-bit base in shards, adapters with something to say, and what they make together."""
    into = tmp_path_factory.mktemp("export")
    loaded = perturb(load_tiny(sharded(tiny(family, torch.bfloat16), into / "base")), 0.05)
    loaded.model.save_pretrained(into / "adapter")
    base = merge(into / "base", into / "adapter", into / "merged")
    return Made(base, into / "adapter", into / "merged", loaded)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: weight for file in sorted(folder.glob("*.safetensors")) for key, weight in load_file(file).items()}


def distance(tuned: Any, merged: Path) -> float:
    """Mean difference of logits between the merged folder, read afresh, and base + adapter, as a share of their spread."""
    inputs = Collator(AutoProcessor.from_pretrained(merged), 2048)(batch())
    again = plain_model(merged, dtype=torch.float32)
    with torch.inference_mode():
        right, found = tuned(**inputs).logits, again(**inputs).logits
    return float((right - found).abs().mean() / right.std())


def test_the_merged_folder_says_what_base_and_adapter_say(made: Made) -> None:
    assert distance(made.loaded.model, made.merged) < 0.02


def test_files_headers_and_everything_beside_them_are_the_bases(made: Made) -> None:
    there = {file.name for file in made.base.folder.iterdir()}
    assert {file.name for file in made.merged.iterdir()} == there
    assert len(made.base.files) == 3
    for name in there:
        ours, theirs = (folder / name for folder in (made.merged, made.base.folder))
        if name in made.base.files:
            begin = min(slot.start for slot in made.base.slots.values() if slot.file == name)
            assert ours.stat().st_size == theirs.stat().st_size
            assert ours.read_bytes()[:begin] == theirs.read_bytes()[:begin]
        else:
            assert ours.read_bytes() == theirs.read_bytes()


def test_adapted_weights_are_the_rounded_sum_of_float64_and_no_other_differs(made: Made) -> None:
    base, merged = weights(made.base.folder), weights(made.merged)
    layers = {name: made.loaded.model.get_submodule(f"base_model.model.{name}") for name in adapted(made.loaded.model)}
    seen = set()
    for key, before in base.items():
        layer = layers.get(module_name(key.removesuffix(".weight")))
        if layer is None:
            assert torch.equal(before.view(torch.int16), merged[key].view(torch.int16)), key
            continue
        seen.add(key)
        a, b = (factor["default"].weight.detach().double() for factor in (layer.lora_A, layer.lora_B))
        right = (before.double() + layer.scaling["default"] * (b @ a)).to(torch.bfloat16)
        assert float((right != merged[key]).float().mean()) < 1e-3, key
    assert len(seen) == len(layers) == len(changes(made.base, *read_adapter(made.adapter)))


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("gemma3", "vision_tower.", "vision_tower.vision_model."),
        ("llava", "vision_tower.", "vision_tower.vision_model."),
        ("qwen2_5_vl", "model.", "model.language_model."),
        ("mllama", "language_model.model.", "model.language_model."),
    ],
)
def test_a_base_whose_files_name_its_tensors_otherwise_is_merged_the_same(
    family: str, old: str, new: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """As publishers and versions of transformers have named them."""

    def rename(key: str) -> str:
        return new + key.removeprefix(old) if key.startswith(old) else key

    base = tiny(family, torch.bfloat16)
    perturb(load_tiny(base), 0.05).model.save_pretrained(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    merge(sharded(base, tmp_path / "base", rename), tmp_path / "adapter", tmp_path / "renamed")
    right, found = weights(tmp_path / "merged"), weights(tmp_path / "renamed")
    assert {rename(key) for key in right} == set(found) != set(right)
    assert all(torch.equal(weight, found[rename(key)]) for key, weight in right.items())


def test_a_second_copy_of_the_weights_is_not_published_as_merged(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Some publishers add one for a server of theirs, which would then serve the base."""
    base = sharded(tiny("llava", torch.bfloat16), tmp_path / "base")
    facts, files = base_facts(base), read_base(base).files
    save_file({"layers.0.wq": torch.zeros(4, 4)}, base / "consolidated.safetensors")
    assert (base_facts(base), read_base(base).files) == (facts, files)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(SpecError, match="gone.safetensors does not exist"):
        read_base(base)


KINDS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"target_modules": r".*(q_proj|qkv)", "use_rslora": True, "lora_alpha": 32},
    "all biases": {"target_modules": ["qkv"], "bias": "all"},
    "biases of LoRA layers": {"target_modules": ["qkv", "v_proj"], "bias": "lora_only"},
    "a convolution": {"target_modules": ["patch_embed.proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_folded_in(kind: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """In float32, where nothing hides a small error."""
    base = tiny("qwen2_5_vl", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForImageTextToText.from_pretrained(base), LoraConfig(r=4, **KINDS[kind])).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in (weight for weight in model.parameters() if weight.requires_grad):
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
        model.save_pretrained(tmp_path / "adapter")
    inputs = Collator(AutoProcessor.from_pretrained(base), 2048)(batch())
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with model.disable_adapter():
            untuned = model(**inputs).logits
    with torch.inference_mode():
        tuned = model(**inputs).logits
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    effect = float((tuned - untuned).abs().mean() / tuned.std())
    assert distance(model, tmp_path / "merged") < 1e-5
    assert effect > 0.01 or "biases" in kind  # which stay when adapters are silenced


PLAIN = {"lora_alpha": 8, "alpha_pattern": {}, "use_dora": False, "modules_to_save": None}
LAYER = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
PAIR = {f"{LAYER}.lora_A.weight": torch.zeros(4, 64), f"{LAYER}.lora_B.weight": torch.zeros(64, 4)}
HEAD = {
    "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64),
    "base_model.model.lm_head.lora_B.weight": torch.zeros(662, 4),
}
EMBEDDING = "base_model.model.model.language_model.embed_tokens.lora_embedding_A"


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        (HEAD, {}, "lm_head.weight, which shares its weights with model.language_model.embed_tokens.weight"),
        ({"base_model.model.lm_head.weight": torch.zeros(662, 64)}, {}, "lm_head.weight, which shares its weights"),
        (
            {key.replace("layers.0", "layers.7"): pair for key, pair in PAIR.items()},
            {},
            "layers.7.self_attn.q_proj.weight, and",
        ),
        ({f"{LAYER}.lora_A.weight": torch.zeros(4, 64)}, {}, "the adapter holds lora_A of .*layers.0.self_attn.q_proj"),
        (
            PAIR | {f"{LAYER}.lora_A.weight": torch.zeros(4, 65)},
            {},
            r"q_proj.weight holds 4160 numbers, the base's weight 64×64",
        ),
        (PAIR | {f"{LAYER}.lora_B.bias": torch.zeros(64)}, {}, "q_proj.lora_B.bias cannot be merged"),
        (
            PAIR,
            {"target_parameters": ["experts.gate_up_proj"]},
            "an adapter with target_parameters cannot be merged",
        ),
        (PAIR, {"use_dora": True}, "an adapter with use_dora cannot be merged"),
        (PAIR, {"alpha_pattern": {"q_proj": 4}}, "an adapter with alpha_pattern cannot be merged"),
        (PAIR, {"modules_to_save": ["lm_head"]}, "an adapter with modules_to_save cannot be merged"),
        ({EMBEDDING: torch.zeros(4, 662)}, {}, "embed_tokens.lora_embedding_A cannot be merged"),
    ],
    ids=[
        *(
            "tied head",
            "tied whole head",
            "no such layer",
            "half a pair",
            "another shape",
            "LoRA's own bias",
            "experts",
        ),
        *("DoRA", "scales by layer", "whole modules", "embedding"),
    ],
)
def test_what_has_no_place_in_the_base_is_refused_by_name(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], says: str, tiny: Callable[..., Path]
) -> None:
    with pytest.raises(SpecError, match=says):
        changes(read_base(tiny("gemma3", torch.bfloat16)), PLAIN | config, tensors)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 24),
    scale=st.floats(-8, 8),
    size=st.sampled_from([1e-4, 1e-2, 1.0, 30.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 2**20),
)
def test_folding_is_float64s_sum_rounded_once_up_or_down(
    rows: int, columns: int, rank: int, scale: float, size: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weight, a, b = numbers(rows, columns).to(dtype), numbers(rank, columns), numbers(rows, rank) * size
    exact = weight.double() + scale * (b.double() @ a.double())
    terms = weight.double().abs() + abs(scale) * (b.double().abs() @ a.double().abs())  # bounds float32's own error
    found = changed(weight, Lora(a, b, scale))
    assert found.dtype == dtype
    step = torch.finfo(dtype).eps / (2 if dtype == torch.float32 else 1)
    slack = terms * (rank + columns + 8) * 2.0**-24 + exact.abs() * step + 2.0**-24
    assert bool(((found.double() - exact).abs() <= slack * 1.001).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("share", "kept"), [(0.0005, 0.5), (0.001, 0.7), (0.1, 0.99)])
def test_what_is_learned_survives_rounding_though_it_is_less_than_half_a_step(
    dtype: torch.dtype, share: float, kept: float
) -> None:
    """`share`: size of the adapter over that of the weight. Rounding to the nearest keeps 0.26 and 0.54 of the first two."""
    share *= torch.finfo(dtype).eps / torch.finfo(torch.bfloat16).eps
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(1024, 1024, generator=generator) * 0.02).to(dtype)
    a, b = torch.randn(16, 1024, generator=generator), torch.randn(1024, 16, generator=generator)
    scale = float(share * weight.float().norm() / (b @ a).norm())
    asked = a.T @ torch.randn(16, 32, generator=generator)
    right = scale * (b @ a) @ asked
    found = (changed(weight, Lora(a, b, scale)).float() - weight.float()) @ asked
    assert float((found - right).norm() / right.norm()) < 1 - kept


def test_rounding_by_chance_has_the_right_mean_and_knows_only_the_place() -> None:
    exact = torch.full((512, 300), 1.0) + torch.linspace(0, 2**-7, 300)  # from one number of bfloat16 to the next
    found = dither(exact, 0, torch.bfloat16)
    assert set(found.unique().tolist()) == {1.0, 1.0078125}
    assert float((found.float().mean(dim=0) - exact[0]).abs().max()) < 5 * 2**-7 / 2 / 512**0.5
    assert torch.equal(dither(exact[100:], 100, torch.bfloat16), found[100:])
    assert torch.equal(dither(found.float(), 0, torch.bfloat16), found)


def noted(out: Path) -> str:
    """What a merge straight to a store says that it finished."""
    notes = out / "logs" / "merging.json"
    return notes.read_text() if notes.exists() else ""


@pytest.mark.parametrize("way", ["folder", "store"])
def test_a_merge_killed_half_way_goes_on_with_the_next_file(
    way: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """SIGKILL comes while the second of three files is being written; straight to a store the third is sent beside it."""
    folder = sharded(tiny("llava", torch.bfloat16), tmp_path / "base")
    first, second, third = sorted(file.name for file in folder.glob("*.safetensors"))
    made, left = ([first], [second, third]) if way == "folder" else ([first, third], [second])
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    command = [sys.executable, "-m", "tests.export.stalling", str(folder), str(killed), way]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stalled\n"
        while way == "store" and not all(name in noted(killed) for name in made):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert sorted(file.name for file in (killed / "merged").glob("*.safetensors")) == made
    todo = stalling.recipe(folder, 0)
    assert stalling.merge(todo, killed, way) == left
    assert stalling.merge(todo, undisturbed, way) == [first, second, third]
    for name in (first, second, third):
        assert (killed / "merged" / name).read_bytes() == (undisturbed / "merged" / name).read_bytes()


@pytest.mark.parametrize("broken", ["base", "disk"])
def test_a_merge_that_fails_names_the_file_and_leaves_no_thread(
    broken: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = sharded(tiny("llava", torch.bfloat16), tmp_path / "base")
    todo = stalling.recipe(folder, 0)
    file = todo.base.files[1]
    if broken == "base":
        os.truncate(folder / file, (folder / file).stat().st_size - 1)
        says = f"failed at {folder / file}: it ends before the tensors"
    else:
        (tmp_path / f"{file}.part").symlink_to("/dev/full")
        says = f"The disk that holds {tmp_path / file}.part is full"
    with pytest.raises(Unavailable, match=says) as refused:
        merge_to_folder(todo, tmp_path / "merged")
    assert refused.value.exit_code == 69
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("merge")]


def test_what_another_adapter_made_is_not_taken_for_this_ones(made: Made, tmp_path: Path) -> None:
    todo = recipe_of(made.base.folder, made.adapter)
    shutil.copytree(made.merged, tmp_path / "merged")
    (tmp_path / "merged.identity").write_text(todo.identity)
    assert merge_to_folder(todo, tmp_path / "merged") == []
    assert merge_to_folder(replace(todo, identity="another"), tmp_path / "merged") == list(made.base.files)


@pytest.mark.parametrize("family", ["qwen3_vl"], scope="module")
def test_files_sent_straight_to_a_bucket_are_the_same(family: str, made: Made, bucket: str) -> None:
    store = open_store(f"s3://{bucket}/run")
    store.part_size = 64 * 2**10  # type: ignore[attr-defined]
    todo = recipe_of(made.base.folder, made.adapter)
    sent = merge_to_store(todo, store, "merged")
    assert list(sent) == list(made.base.files)
    for file in made.base.files:
        assert store.read(f"merged/{file}") == (made.merged / file).read_bytes()
    assert merge_to_store(todo, store, "merged") == sent


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_adapter_on_a_head_that_shares_its_weights_is_refused_before_it_is_trained(
    tiny: Callable[..., Path],
) -> None:
    base = tiny("gemma3", torch.bfloat16)
    check_mergeable(job_spec(), load_tiny(base))
    with pytest.raises(SpecError, match="names lm_head, .* or a head that shares the embedding's weights"):
        load_tiny(base, target_modules=["lm_head", "q_proj"])
