from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import pytest
import yaml

from job.data.images import Bounds
from job.report import model_card
from job.report.licences import LICENCES, UNKNOWN, licence_of
from tests.evaluate.conftest import contents_of


def front_matter(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    return dict(yaml.safe_load(text.split("---\n")[1]))


def code_of(text: str) -> str:
    return text.split("python\n", 1)[1].split("\n```", 1)[0]


@pytest.fixture
def facts() -> dict[str, Any]:
    def entry(value: float) -> dict[str, Any]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 9}

    return {
        "name": "chest-captions",
        "metrics": {
            "before": {"rougeL": entry(0.2)},
            "after": {"rougeL": entry(0.7)},
            "change": {"rougeL": {**entry(0.5), "p": 0.001}},
            "groups": {
                "sex": {
                    "F": {
                        "rows": 9,
                        "too_few": True,
                        "before": {"rougeL": entry(0.2)},
                        "after": {"rougeL": entry(0.7)},
                        "change": {"rougeL": entry(0.5)},
                    }
                }
            },
            "settings": {"confidence": 0.95, "rows": 9},
        },
        "after": [{"id": "patient-7", "reference": "a secret", "generated": "a secret"}],
        "lineage": {"base_revision": "0123abc"},
        "data": {"rows": 90},
        "privacy": {"report_images": False},
        "base": {"name_or_path": "meta-llama/Llama-3.2-11B-Vision-Instruct", "model_type": "mllama"},
        "instruction": 'Say "what" you see.',
    }


def test_the_front_matter_is_what_the_hub_reads(facts: dict[str, Any]) -> None:
    adapter, merged = (
        front_matter(model_card.render(contents_of(facts))),
        front_matter(model_card.render(contents_of(facts), kind="merged")),
    )
    assert adapter["library_name"] == "peft"
    assert adapter["base_model"] == merged["base_model"] == "meta-llama/Llama-3.2-11B-Vision-Instruct"
    assert (adapter["base_model_relation"], merged["base_model_relation"]) == ("adapter", "finetune")
    assert merged["library_name"] == "transformers"
    assert adapter["license"] == "llama3.2"


def test_a_folder_is_not_named_as_a_model_of_the_hub(facts: dict[str, Any]) -> None:
    assert "base_model" not in front_matter(
        model_card.render(contents_of({**facts, "base": {"name_or_path": "/bundle/models/base"}}))
    )


@pytest.mark.parametrize(
    "said",
    [
        "## Intended use",
        "Not for",
        "## Data",
        "| ROUGE\\-L | 0.200 | 0.700 | +0.500 | +0.400 to +0.600 | 9 |",
        "Rare conditions",
        "Not a medical device",
        "need a qualified reader",
        "## Privacy",
        "Built with Llama",
        "European Union",
        "## How to load",
        "Too few held\\-out samples to judge: Sex F",
    ],
)
def test_a_card_says(facts: dict[str, Any], said: str) -> None:
    assert said.replace("\\-", "-") in model_card.render(contents_of(facts))


@pytest.mark.parametrize("kind", model_card.KINDS)
def test_a_card_of_compressed_tensors_says_that_loading_needs_them(facts: dict[str, Any], kind: str) -> None:
    assert ("pip install compressed-tensors" in model_card.render(contents_of(facts), kind)) == (
        kind in ("merged_fp8", "merged_int4")
    )


def test_no_caption_and_no_id_is_in_a_card(facts: dict[str, Any]) -> None:
    for kind in ("adapter", "merged"):
        text = model_card.render(contents_of(facts), kind=kind)  # type: ignore[arg-type]
        assert "secret" not in text
        assert "patient-7" not in text


@pytest.mark.parametrize("instruction", ["Say what you see.", "three ``` quotes \" ' \\ and\nlines", "'''"])
def test_the_code_to_load_is_python_whatever_the_instruction(facts: dict[str, Any], instruction: str) -> None:
    for kind in ("adapter", "merged"):
        text = model_card.render(contents_of({**facts, "instruction": instruction}), kind=kind)  # type: ignore[arg-type]
        code = re.search(r"^(`{3,})python\n(.*?)\n\1$", text, re.MULTILINE | re.DOTALL)
        assert code is not None
        compile(code[2], "card", "exec")


def test_an_empty_run_still_has_a_card() -> None:
    text = model_card.render(contents_of({}))
    assert "Nothing was measured" in text
    assert front_matter(text)["license_name"] == "see-base-model"


def test_names_cannot_break_out_of_the_card(facts: dict[str, Any]) -> None:
    text = model_card.render(contents_of({**facts, "name": "x\n---\n<script>", "data": {"a|b": "<img src=x>\n# no"}}))
    assert "<script>" not in text
    assert "<img" not in text
    assert front_matter(text)["library_name"] == "peft"


@pytest.mark.parametrize(
    ("base", "licence"),
    [
        ("meta-llama/Llama-3.2-11B-Vision-Instruct", "llama3.2"),
        ("unsloth/Llama-3.2-90B-Vision-bnb-4bit", "llama3.2"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "apache-2.0"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "qwen-research"),
        ("Qwen/Qwen2.5-VL-72B-Instruct", "qwen"),
        ("Qwen/Qwen2-VL-2B-Instruct", "apache-2.0"),
        ("Qwen/Qwen3-VL-8B-Instruct", "apache-2.0"),
        ("google/gemma-3-4b-it", "gemma"),
        ("google/gemma-4-e4b-it", "apache-2.0"),
        ("google/medgemma-4b-it", "health-ai-developer-foundations"),
        ("/models/base", UNKNOWN),
        ("", UNKNOWN),
    ],
)
def test_the_licence_follows_from_the_name_of_the_base(base: str, licence: str) -> None:
    assert licence_of(base) == (licence, LICENCES[licence])


def test_an_architecture_alone_does_not_claim_a_licence() -> None:
    licence = licence_of("/models/base", "mllama")
    assert licence.name == "see-base-model"
    assert "If its weights come from Meta" in licence.text


@pytest.mark.parametrize(
    "bounds",
    [
        Bounds(side=512),
        Bounds(area=1e5, row=5e4),
        Bounds(area=4e5, row=123_456.7, grid=28),
        Bounds(area=9e4, grid=32),
        Bounds(short=336),
    ],
)
def test_the_code_shrinks_as_training_did(bounds: Bounds) -> None:
    code = code_of(model_card.render(replace(contents_of({}), bounds=bounds._asdict())))
    names: dict[str, Any] = {}
    exec(re.search(r"^def shrunk.*?\n\n\n", code, re.MULTILINE | re.DOTALL)[0], names)  # type: ignore[index]
    sizes = random.Random(0)
    for _ in range(500):
        width, height = sizes.randint(4, 3000), sizes.randint(20, 800)
        assert tuple(names["shrunk"](width, height)) == bounds.size(width, height, 1)


def test_what_is_never_shrunk_is_opened_and_no_more() -> None:
    assert "shrunk" not in model_card.render(replace(contents_of({}), bounds=Bounds()._asdict()))
