"""What is published beside the weights says how they were measured, and what it cannot say is told."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from job.data.images import Bounds, Files, load
from job.export.merge import copy_rest
from job.export.serving import beside_weights, serving, spoilt
from job.model.token_length import TokenCounter
from job.model.transformers_backend import load_processor
from tests.tiny import job_spec, load_tiny

PICTURES = "how far pictures were shrunk (dataset.image_max_side), which its processor cannot do"
PUBLISHED = {"min_pixels": 3136, "max_pixels": 1 << 20, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}


def rewrite(name: str, **settings: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        tree = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(tree | settings))

    return change


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "another mean": (rewrite("processor_config.json", image_processor={}), "processor_config.json is not the base"),
    "another template": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        "chat_template.jinja is not the base",
    ),
    "a penalty": (rewrite("generation_config.json", repetition_penalty=1.3), "generation_config.json is not the base"),
    "another end": (rewrite("generation_config.json", eos_token_id=[0]), "generation_config.json is not the base"),
    "another shape": (rewrite("config.json", hidden_size=3), "config.json is not the base"),
    "weights too many": (lambda folder: (folder / "old.safetensors").touch(), "old.safetensors is not of the base"),
    "one too many": (lambda folder: (folder / "added.json").write_text("{}"), "added.json is not of the base"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_beside_the_weights_is_told_by_name(fault: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    spec, loaded, into, bounds = job_spec(), load_tiny(tiny("qwen3_vl")), tmp_path / "merged", Bounds(area=5e3, grid=32)
    beside_weights(into, loaded, spec, bounds)
    (into / "README.md").write_text("a card")
    (into / "model.safetensors").write_text("weights")
    assert spoilt(into, loaded, spec, bounds) is None
    assert "processor_config.json" in str(spoilt(into, loaded, spec, Bounds()))
    spoil, said = FAULTS[fault]
    spoil(into)
    assert f"merged/: {said}" in str(spoilt(into, loaded, spec, bounds))


def told(base: Path, into: Path, bounds: Bounds, source: str = "imagefolder", **dataset: Any) -> tuple[str, ...]:
    spec, loaded = job_spec(dataset={"path": "rows"} | dataset), load_tiny(base)
    beside_weights(into, loaded, spec, bounds)
    data: Any = SimpleNamespace(bounds=bounds, facts=SimpleNamespace(source=source))
    return serving(spec, loaded, data, into.parent).unwritten


FIRST = "the tokenizer's first token, which a server adds only if add_special_tokens is true"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "mllama", "llava_next"])
def test_what_a_processor_keeps_by_itself_needs_no_word(family: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    room = TokenCounter(load_processor(job_spec().model, tiny(family))).room(300)
    rest = (FIRST,) if family == "llava_next" else ()  # its template begins without it
    assert told(tiny(family), tmp_path / "out", Bounds(**room)) == rest
    assert told(tiny(family), tmp_path / "out", Bounds()) == rest


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_longest_side_and_dicom_are_told(family: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    found = told(tiny(family), tmp_path / "out", Bounds(side=40), "dicom: 3 series", system_prompt="Be brief.")
    assert found == (PICTURES, "how DICOM files became pictures", "the system prompt")


def test_the_settings_of_older_processors_are_limited_too(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """As Qwen2.5-VL is published: without a processor_config.json, and with `max_pixels` and no `size`."""
    base, into = tmp_path / "base", tmp_path / "out"
    copy_rest(tiny("qwen2_5_vl"), base)
    whole = json.loads((base / "processor_config.json").read_text())["image_processor"]
    (base / "processor_config.json").unlink()
    (base / "preprocessor_config.json").write_text(
        json.dumps({"processor_class": "Qwen2_5_VLProcessor", **whole, **PUBLISHED, "size": None})
    )
    (base / "model.safetensors").symlink_to(tiny("qwen2_5_vl") / "model.safetensors")
    assert load_processor(job_spec().model, base).image_processor.size["longest_edge"] == 1 << 20
    bounds = Bounds(area=1 << 20, row=250_000.5, grid=28)
    assert told(base, into, bounds) == ()
    assert json.loads((into / "preprocessor_config.json").read_text())["max_pixels"] == 250_000


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_a_server_that_is_given_the_whole_picture_sees_the_pixels_of_training(
    family: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    spec, loaded = job_spec(), load_tiny(tiny(family))
    bounds = Bounds(**TokenCounter(loaded.processor).room(300))
    beside_weights(tmp_path / "out", loaded, spec, bounds)
    published = load_processor(spec.model, tmp_path / "out").image_processor
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 130, 3), dtype=np.uint8))
    for size in ((1010, 770), (400, 1010)):
        file = io.BytesIO()
        noise.resize(size).save(file, "JPEG", quality=95)
        prepared, whole = load(file.getvalue(), Files(bounds=bounds), spec.dataset)[0], Image.open(file)
        assert prepared.size != whole.size
        seen, served = (published(each, return_tensors="np")["pixel_values"] for each in (prepared, whole))
        assert np.abs(seen - served).mean() < 0.01 * served.std()
