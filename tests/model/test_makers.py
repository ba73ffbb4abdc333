"""The models that tests and benchmarks run on have the published shapes, tokens and layouts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from job.model.collator import render
from job.model.loaded import Loaded
from tests.families import FAMILIES
from tests.tiny import models, processors, row, shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_model_has_the_published_number_of_parameters(family: str) -> None:
    processor = processors.build_processor(family, "full", models.MLLAMA_TEXT_VOCABULARY)
    model = models.build_model(family, "full", processor, "meta", torch.bfloat16)
    assert sum(weight.numel() for weight in model.parameters()) == shapes.PARAMETERS[family]


def test_a_tiny_model_has_less_than_a_million(loaded: Loaded) -> None:
    assert sum(weight.numel() for weight in loaded.model.parameters()) < 1_000_000


def test_conversations_have_the_familys_layout(family: str, loaded: Loaded) -> None:
    assert render(loaded.processor, row(1, "No.")["messages"]) == FAMILIES[family].layout


@pytest.mark.parametrize("size", ["tiny", "full"])
def test_mllamas_image_token_lies_outside_its_text_vocabulary(size: str) -> None:
    processor = processors.build_processor("mllama", size, models.MLLAMA_TEXT_VOCABULARY if size == "full" else None)
    model = models.build_model("mllama", size, processor, "meta", torch.bfloat16)
    assert processor.image_token_id == model.config.text_config.vocab_size
    assert model.get_input_embeddings().weight.shape[0] == model.config.text_config.vocab_size + 8
    assert model.lm_head.out_features == model.config.text_config.vocab_size


def test_the_command_writes_a_checkpoint_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["models.py", "gemma3", str(tmp_path / "model"), "--size", "tiny", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", given)
    models.main()
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {"model.safetensors", "processor_config.json", "tokenizer.json", "chat_template.jinja"} <= {
        file.name for file in (tmp_path / "model").iterdir()
    }
