"""Checks that a folder holds a complete text encoder for BERTScore, from its small files and weight headers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from job.errors import SpecError
from job.model.base_model import weight_files
from job.model.header import read_header

RENAMED = {"gamma": "weight", "beta": "bias"}
"""Names of norm weights in BERT's first checkpoints."""


def refuse_unless_encoder(folder: Path, field: str) -> None:
    """Raises SpecError, naming `field`. Without transformers, only checks that the weight files are complete."""
    files = weight_files(folder, field)
    if not files:
        raise SpecError(
            f"{field}: {folder} holds no .safetensors weights; save the encoder as .safetensors, or name another"
        )
    shapes = {name: tensor["shape"] for file in files for name, tensor in read_header(file, field)[0].items()}
    if importlib.util.find_spec("transformers") is None:
        return
    try:
        problem = _problem(folder, shapes)
    except MemoryError:
        raise
    except Exception as error:  # the libraries raise many types when these files make no model
        problem = " ".join(str(error).split())[:300]
    if problem:
        raise SpecError(f"{field}: {folder} is not a usable encoder ({problem}); name another one")


def _problem(folder: Path, shapes: dict[str, list[int]]) -> str:
    """Return why the encoder cannot score texts; empty if it can."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    if config.is_encoder_decoder:
        return "it has a decoder"
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    if model.main_input_name != "input_ids":
        return "it does not read texts"
    missing = [
        name for name, weight in model.named_parameters() if _lacks(shapes, model.base_model_prefix, name, weight)
    ]
    if missing:
        return f"{len(missing)} weights are missing or of another shape, {missing[0]} among them"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = len(tokenizer)
    if pieces <= len(tokenizer.all_special_ids):  # the library makes such a tokenizer from no files
        return "its tokenizer knows no words"
    if pieces > config.vocab_size:
        return f"its tokenizer has {pieces} pieces, and its weights are for {config.vocab_size}"
    return "" if config.max_position_embeddings > 2 else "it reads no text of more than two pieces"


def _lacks(shapes: dict[str, list[int]], prefix: str, name: str, weight: Any) -> bool:
    """Whether the files lack a weight under all its names. Scores need no pooler, which some checkpoints leave out."""
    if name.startswith("pooler."):
        return False
    head, _, last = name.rpartition(".")
    old = [f"{head}.{then}" for then, now in RENAMED.items() if now == last]
    found = [shapes[each] for one in (name, *old) for each in (one, f"{prefix}.{one}") if each in shapes]
    return list(weight.shape) not in found
