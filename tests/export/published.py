"""Small random models with what published checkpoints have and llama.cpp counts on, in their layout."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Gemma3Processor

from tests.tiny import models

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
QWEN3_ROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
ALL = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
SLIDING, FULL = "sliding_attention", "full_attention"
# Where transformers has a configuration, llama.cpp's code or its converter's table of names often has a constant.
CONSTANTS: dict[str, dict[str, dict[str, Any]]] = {
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": ROPE, "initializer_range": 0.08},
        "vision_config": {"depth": 4, "window_size": 112, "fullatt_block_indexes": [3]},
    },
    "qwen3_vl": {
        "text_config": {
            "num_hidden_layers": 4,
            "head_dim": 128,
            "rope_parameters": QWEN3_ROPE,
            "initializer_range": 0.05,
        },
        "vision_config": {"depth": 4, "deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 2304},
    },
    "gemma3": {
        "text_config": {
            "num_hidden_layers": 7,
            "layer_types": [*[SLIDING] * 5, FULL, SLIDING],
            "sliding_window": 32,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "rope_parameters": {SLIDING: LOCAL, FULL: ALL},
        },
        "vision_config": {"image_size": 224},
    },
}
# Each changed alone makes another model: a comparison that is worth something tells it apart.
CHANGES: dict[str, list[tuple[str, str, Any]]] = {
    "qwen2_5_vl": [
        ("text_config", "rope_parameters", ROPE | {"rope_theta": 100.0}),
        ("text_config", "rope_parameters", ROPE | {"mrope_section": [8, 0, 0]}),
        ("vision_config", "fullatt_block_indexes", [0, 1, 2, 3]),
    ],
    "qwen3_vl": [
        ("text_config", "rope_parameters", QWEN3_ROPE | {"rope_theta": 1e4}),
        ("text_config", "rope_parameters", QWEN3_ROPE | {"mrope_section": [64, 0, 0]}),
        ("vision_config", "deepstack_visual_indexes", [0, 2, 3]),
        ("vision_config", "rope_parameters", {"rope_type": "axial", "rope_theta": 100.0}),
    ],
    "gemma3": [
        ("text_config", "layer_types", [SLIDING, FULL] * 3 + [SLIDING]),
        ("text_config", "sliding_window", 33),
        ("text_config", "rope_parameters", {SLIDING: ALL, FULL: ALL}),
        ("text_config", "rope_parameters", {SLIDING: LOCAL, FULL: LOCAL}),
        ("text_config", "query_pre_attn_scalar", 64),
    ],
}


def make_published(family: str, folder: Path) -> Path:
    models.make_model(family, folder)
    config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    for part, constants in CONSTANTS[family].items():
        for name, value in constants.items():
            setattr(getattr(config, part), name, value)
    images = processor.image_processor
    if family == "gemma3":
        images.size, config.mm_tokens_per_image = {"height": 224, "width": 224}, 16  # four patches a side to a token
        processor = Gemma3Processor(images, processor.tokenizer, processor.chat_template, image_seq_length=16)
        write_sentencepiece(processor.tokenizer, folder / "tokenizer.model")
    else:
        token = (images.patch_size * images.merge_size) ** 2
        images.size = {"shortest_edge": 8 * token, "longest_edge": 4096 * token}  # llama.cpp's own limits
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    if family == "gemma3":
        model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(0, 0.1)  # it starts at zero
    model.to(torch.bfloat16).save_pretrained(folder)
    if family == "gemma3":
        file = folder / "model.safetensors"
        tensors = load_file(file)
        save_file(
            {name.replace("vision_tower.", "vision_tower.vision_model."): tensors[name] for name in tensors}, file
        )
    return folder


def write_sentencepiece(tokenizer: Any, file: Path) -> None:
    """`tokenizer.model` as Gemma is published with, which transformers no longer writes: sentencepiece_model.proto by hand."""
    vocabulary, special = tokenizer.get_vocab(), set(tokenizer.all_special_tokens)
    normal, unknown, control, byte = 1, 2, 3, 6
    pieces = b""
    for piece, number in sorted(vocabulary.items(), key=lambda item: item[1]):
        kind = unknown if piece == "<unk>" else control if piece in special else byte if piece[:3] == "<0x" else normal
        score = b"\x15" + struct.pack("<f", -number)
        pieces += _field(1, _field(1, piece.encode()) + score + _number(3, kind))
    trained = _number(3, 2) + _number(35, 1)  # BPE, bytes for what has no piece
    for place, name in ((40, "<unk>"), (41, "<bos>"), (42, "<eos>"), (43, "<pad>")):
        trained += _number(place, vocabulary[name])
    normalised = _field(1, b"identity") + _number(3, 0) + _number(4, 0) + _number(5, 1)  # only spaces become ▁
    file.write_bytes(pieces + _field(2, trained) + _field(3, normalised))


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


def _number(place: int, value: int) -> bytes:
    return _varint(place << 3) + _varint(value)


def _field(place: int, content: bytes) -> bytes:
    return _varint(place << 3 | 2) + _varint(len(content)) + content
