"""Adapters land in the groups asked for and nowhere else; silent, they change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from job.errors import SpecError
from job.evaluate.generate import base_or_tuned
from job.model.base_model import base_facts
from job.model.collator import Collator
from job.model.loaded import Loaded
from job.model.lora_targets import parameters, targets
from job.model.transformers_backend import adapted, linears, tables
from tests.families import FAMILIES
from tests.tiny import batch, job_spec, load_tiny, perturb, plain_model, row

CHOICES = {
    "all": {},
    "vision only": {"finetune_language_layers": False},
    "language only": {"finetune_vision_layers": False},
    "attention only": {"finetune_mlp_modules": False},
    "mlp only": {"finetune_attention_modules": False},
}


MERGER = ("model.visual.merger.linear_fc1", "model.visual.merger.linear_fc2")
LLAVAS = ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2")
CONNECTORS = {
    "mllama": ("model.multi_modal_projector",),
    "qwen2_5_vl": ("model.visual.merger.mlp.0", "model.visual.merger.mlp.2"),
    "qwen3_vl": (*MERGER, *(name.replace("merger", "deepstack_merger_list.0") for name in MERGER)),
    "qwen3_5": MERGER,
    "gemma3": (),
    "llava": LLAVAS,
    "llava_next": LLAVAS,
}


def by_class(model: Any, family: str) -> dict[str, set[str]]:
    """Linear layers by group, told by the class that holds them instead of by name."""
    modules = dict(model.named_modules())
    tower = {id(module) for module in modules[FAMILIES[family].tower].modules()}
    found: dict[str, set[str]] = {}
    for name, module in modules.items():
        parent = type(modules[name.rpartition(".")[0]]).__name__
        part = "attention" if "Attention" in parent or "DeltaNet" in parent else "mlp" if "MLP" in parent else None
        if isinstance(module, torch.nn.Linear) and part:
            found.setdefault(f"{'vision' if id(module) in tower else 'language'}/{part}", set()).add(name)
    return found


def logits(model: Any, loaded: Loaded) -> torch.Tensor:
    inputs = Collator(loaded.processor, 2048)(batch())
    with torch.inference_mode():
        return model(**inputs).logits


@pytest.mark.parametrize("choice", CHOICES)
def test_gradients_reach_exactly_the_groups_asked_for(family: str, folder: Path, choice: str) -> None:
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    groups = by_class(plain, family)
    assert set(groups) == {f"{tower}/{part}" for tower in ("vision", "language") for part in ("attention", "mlp")}
    asked = [group for group in groups if choice == "all" or choice.split()[0] in group]
    expected = {name for group in asked for name in groups[group]}

    loaded = perturb(load_tiny(folder, **CHOICES[choice]))
    assert reached(loaded) == {name for name in expected if not name.startswith(FAMILIES[family].unread)}
    assert set(adapted(loaded.model)) == expected
    assert set(loaded.groups) == set(asked)
    assert foretold(folder, **CHOICES[choice]) == loaded.groups
    assert sum(loaded.groups.values()) == trainable(loaded)


def reached(loaded: Loaded) -> set[str]:
    """Names of the layers whose adapters get a gradient, and of all else that gets one."""
    loaded.model(**Collator(loaded.processor, 2048)(batch())).loss.backward()
    return {
        name.removeprefix("base_model.model.").rpartition(".lora_")[0] or name
        for name, weight in loaded.model.named_parameters()
        if weight.grad is not None and weight.grad.any()
    }


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("alone", [True, False], ids=["connector alone", "beside all"])
def test_the_connector_is_adapted_where_it_is_asked_for(
    family: str, folder: Path, alone: bool, recomputed: bool
) -> None:
    towers = {} if not alone else {"finetune_vision_layers": False, "finetune_language_layers": False}
    asked = {"finetune_connector": True} | towers
    if family == "gemma3":
        for refusing in (foretold, load_tiny):
            with pytest.raises(SpecError, match="nothing between vision tower and language model is a linear layer"):
                refusing(folder, **asked)
        return
    loaded = perturb(load_tiny(folder, **asked))
    if recomputed:
        loaded.model.train().gradient_checkpointing_enable({"use_reentrant": False})
    others = set() if alone else {*adapted(load_tiny(folder).model)}
    assert set(adapted(loaded.model)) == {*CONNECTORS[family], *others}
    assert foretold(folder, **asked) == loaded.groups
    assert "connector" in loaded.groups
    assert reached(loaded) == {
        name for name in {*CONNECTORS[family], *others} if not name.startswith(FAMILIES[family].unread)
    }


def foretold(folder: Path, **lora: Any) -> dict[str, int]:
    """What `check` prints, from the headers of the weight files."""
    facts = base_facts(folder)
    return parameters(4, facts.linears, targets(job_spec(lora=lora).lora, facts.linears, facts.tables))


def trainable(loaded: Loaded) -> int:
    return sum(weight.numel() for weight in loaded.model.parameters() if weight.requires_grad)


@pytest.mark.parametrize(
    "modules",
    [
        "all-linear",
        ["q_proj", "v_proj"],
        r"model\.language_model\.layers\.[12]\.mlp\.\w+",
        ["model.language_model.layers.2.self_attn.o_proj"],
    ],
    ids=["all-linear", "endings", "pattern", "one layer"],
)
def test_modules_named_by_the_user_are_adapted_and_no_other(
    tiny: Callable[..., Path], modules: str | list[str]
) -> None:
    folder = tiny("gemma3")
    loaded = load_tiny(folder, target_modules=modules)
    assert foretold(folder, target_modules=modules) == loaded.groups
    assert sum(loaded.groups.values()) == trainable(loaded)
    if isinstance(modules, list) and len(modules) == 1:
        assert adapted(loaded.model) == modules


@pytest.mark.parametrize("written", ["today", "as published"])
def test_headers_give_the_names_of_modules(family: str, folder: Path, tmp_path: Path, written: str) -> None:
    """On the hub Gemma 3 and LLaVA have one level more in their vision tower than today's modules."""
    weights = load_file(folder / "model.safetensors")
    level = "vision_tower.vision_model." if written == "as published" else "vision_tower."
    save_file(
        {key.replace("vision_tower.", level): weight for key, weight in weights.items()}, tmp_path / "w.safetensors"
    )
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model = AutoModelForImageTextToText.from_pretrained(folder)
    tied = {"lm_head"} if family == "gemma3" else set()  # no weights of its own
    assert base_facts(tmp_path).linears == {name: shape for name, shape in linears(model).items() if name not in tied}


def test_adapters_switched_off_give_the_base(folder: Path, loaded: Loaded) -> None:
    base = logits(plain_model(folder), loaded)
    with base_or_tuned(loaded, tuned=False):
        torch.testing.assert_close(logits(loaded.model, loaded), base, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(loaded.model, loaded), base, atol=0.01)


def test_fresh_adapters_change_nothing(folder: Path, loaded: Loaded) -> None:
    with base_or_tuned(loaded, tuned=False):
        base = logits(loaded.model, loaded)
    assert torch.equal(logits(load_tiny(folder).model, loaded), base)


def test_nothing_is_in_training_mode_after_loading(tiny: Callable[..., Path]) -> None:
    """A resumed run may measure without training first, and dropout would then disturb it."""
    loaded = load_tiny(tiny("llava"), lora_dropout=0.5)
    assert not any(module.training for module in loaded.model.modules())


def test_another_picture_gives_other_logits(loaded: Loaded) -> None:
    collate = Collator(loaded.processor, 2048)
    one, other = row(1), row(1) | {"images": row(2)["images"]}
    with torch.inference_mode():
        first, second = (loaded.model(**collate([each])).logits for each in (one, other))
    assert float((first - second)[0, -3:].abs().mean()) > 0.01 * float(first.std())


def test_an_earlier_adapter_is_taken_up(folder: Path, loaded: Loaded, tmp_path: Path) -> None:
    loaded.model.save_pretrained(tmp_path)
    again = load_tiny(folder, start=tmp_path)
    assert torch.equal(logits(again.model, loaded), logits(loaded.model, loaded))


def test_an_adapter_for_other_layers_is_refused(folder: Path, loaded: Loaded, tmp_path: Path) -> None:
    loaded.model.save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=r"lora\.init_adapter: .* was made for other layers"):
        load_tiny(folder, start=tmp_path, finetune_vision_layers=False)


@pytest.fixture
def blind(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A model whose vision tower has no blocks."""
    source = tiny("qwen2_5_vl")
    config = json.loads((source / "config.json").read_text())
    config["vision_config"]["depth"] = 0
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    kept = {key: weight for key, weight in load_file(source / "model.safetensors").items() if "blocks." not in key}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_group_that_the_model_lacks_stops_the_job(blind: Path) -> None:
    sentence = "finetune_vision_layers and finetune_attention_modules are true, but this model has no such layers"
    with pytest.raises(SpecError, match=sentence):
        targets(job_spec().lora, base_facts(blind).linears)
    with pytest.raises(SpecError, match=sentence):
        load_tiny(blind)
    assert set(load_tiny(blind, finetune_vision_layers=False).groups) == {"language/attention", "language/mlp"}


def test_modules_that_match_nothing_stop_the_job(tiny: Callable[..., Path]) -> None:
    with pytest.raises(SpecError, match=r"lora\.target_modules: \['query'\] matches none"):
        load_tiny(tiny("llava"), target_modules=["query"])


def test_headers_tell_embeddings_and_convolutions(folder: Path) -> None:
    assert {*base_facts(folder).tables} == {*tables(AutoModelForImageTextToText.from_pretrained(folder))}


@pytest.mark.parametrize(
    ("known", "modules", "named"),
    [
        ("llava", ["q_proj", "embed_tokens"], "model.language_model.embed_tokens"),
        ("qwen2_5_vl", ["qkv", "proj"], "model.visual.patch_embed.proj"),
        ("qwen3_5", r".*\.linear_attn\..*", "model.language_model.layers.0.linear_attn.conv1d"),
        ("gemma3", ["q_proj", "lm_head"], "lm_head"),
    ],
)
def test_what_is_no_linear_layer_is_refused_by_headers_and_model_alike(
    tiny: Callable[..., Path], known: str, modules: str | list[str], named: str
) -> None:
    for refusing in (foretold, load_tiny):
        with pytest.raises(
            SpecError, match=rf"lora\.target_modules: .* names {named}, an embedding, a convolution or a head"
        ):
            refusing(tiny(known), target_modules=modules)


def test_the_same_seed_gives_the_same_adapters(tiny: Callable[..., Path]) -> None:
    one, other = (
        {name: weight for name, weight in load_tiny(tiny("llava")).model.named_parameters() if "lora_A" in name}
        for _ in range(2)
    )
    assert one.keys() == other.keys()
    assert any(weight.any() for weight in one.values())
    assert all(torch.equal(one[name], other[name]) for name in one)
