"""Tiny models of all families, and rows to try them on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from job.config.schema import JobSpec
from job.data.conversations import conversation
from job.model.loaded import Loaded
from job.model.patches import mllama_intermediate
from job.model.transformers_backend import load
from tests.families import QUESTION

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import models
import processors
import shapes
from models import make_model

__all__ = ["QUESTION", "make_model", "models", "processors", "shapes"]

CPU = torch.device("cpu")


def job_spec(**sections: Any) -> JobSpec:
    needed = {"model": {"name_or_path": "tiny"}, "dataset": {"path": "rows"}, "output": {"url": "out"}}
    return JobSpec.model_validate(needed | sections)


def picture(number: int, width: int = 80, height: int = 60) -> Image.Image:
    """Large coloured patches, different for each number."""
    patches = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.NEAREST)


def row(
    number: int,
    answer: str = "The heart is of normal size.",
    question: str = QUESTION,
    system: str | None = None,
    shape: tuple[int, int] = (80, 60),
) -> dict[str, Any]:
    return {
        "id": f"row-{number}",
        "messages": conversation(question, answer, system),
        "images": [picture(number, *shape)],
    }


def batch() -> list[dict[str, Any]]:
    """Three rows that differ in everything: lengths, shapes of the pictures (and so numbers of tiles and tokens)."""
    return [
        row(1),
        row(2, "There is a nodule in the left upper zone, and an opacity beside it.", "What is it?", shape=(56, 112)),
        row(3, "No.", f"{QUESTION} Is there a fracture of the clavicle, or an effusion?", shape=(150, 70)),
    ]


def load_tiny(folder: Path, start: Path | None = None, **lora: Any) -> Loaded:
    return load(job_spec(lora={"r": 4} | lora), folder, CPU, start)


def plain_model(folder: Path, **named: Any) -> Any:
    """By transformers alone, but for what the card's code corrects too."""
    model = AutoModelForImageTextToText.from_pretrained(folder, **named).eval()
    mllama_intermediate.install(model)
    return model


@torch.no_grad()
def perturb(loaded: Loaded, size: float = 0.1, seed: int = 0) -> Loaded:
    """Give the adapters something to say: LoRA's B is zero at first."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in loaded.model.named_parameters():
        if "lora_B" in name:
            weight.copy_(torch.randn(weight.shape, generator=generator) * size)
    return loaded


def make_encoder(folder: Path) -> Path:
    """A BERT of two layers, whose weights are the same everywhere."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = "[PAD] [UNK] [CLS] [SEP] a the is no left right lung nodule effusion clear seen in . ,"
    (folder / "vocab.txt").write_text(words.replace(" ", "\n"))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertModel(BertConfig(vocab_size=19, max_position_embeddings=64, **size))
    with torch.no_grad():
        for number, weight in enumerate(weight for weight in model.parameters() if weight.ndim == 2):
            weight.copy_(torch.from_numpy(np.random.default_rng(number).normal(0, 0.3, weight.shape)))
    model.save_pretrained(folder)
    return folder
