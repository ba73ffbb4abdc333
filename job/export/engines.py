"""The commands that serve a published folder. No torch: `job serve` prints them anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from job.model.base_model import ADAPTER_FILES, json_object
from job.model.families import Server
from job.model.header import read_header
from job.model.lora_targets import group_of

MODEL = "tuned"
"""The name that requests give the model."""
MODULE = ("-m", "vllm.entrypoints.cli.main")
"""The command `vllm` as an argument of Python."""
DTYPES = {"32bit": "float32", "16bit": "bfloat16", "4bit": "bfloat16"}
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank (vllm/config/lora.py, 0.32)."""
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Files with an image processor's settings: its own, and since transformers 5 those of the whole processor."""


class Served(NamedTuple):
    """What a server loads: the `folder` of merged weights or, with a `base`, of an adapter; the precision it was measured in;
    and the tokens of the longest conversation."""

    folder: Path
    precision: str
    length: int
    base: str | None = None
    revision: str | None = None


def vllm(served: Served, program: tuple[str, ...] = ("vllm",)) -> list[str]:
    """Return the command for vLLM. It reads generation settings, template and tokenizer of the published folder; an image
    processor's limit reaches it as an option where only an adapter was published, since it reads that of the base."""
    folder = str(served.folder)
    shared = ["--dtype", DTYPES[served.precision], "--max-model-len", str(_length(served))]
    if served.base is None:
        return [*program, "serve", folder, "--served-model-name", MODEL, *shared]
    template = served.folder / "chat_template.jinja"
    return [
        *program,
        "serve",
        served.base,
        *(["--revision", served.revision] if served.revision else []),
        *["--tokenizer", folder, "--generation-config", folder],
        *(["--chat-template", str(template)] if template.is_file() else []),
        *_limits(served.folder),
        *["--enable-lora", "--lora-modules", f"{MODEL}={folder}", *_lora(served.folder)],
        *shared,
    ]


def sglang(served: Served) -> list[str]:
    """Return the command for SGLang, for merged weights."""
    shared = ["--dtype", DTYPES[served.precision], "--context-length", str(_length(served))]
    program = ["python", "-m", "sglang.launch_server", "--model-path", str(served.folder), "--served-model-name", MODEL]
    return [*program, "--enable-multimodal", *shared]  # without it Gemma 3 takes no images


def llama_cpp(folder: Path) -> list[str]:
    """Return the command for llama.cpp, for a folder of GGUF files."""
    return ["llama-server", "-m", f"{folder}/model.gguf", "--mmproj", f"{folder}/mmproj.gguf", "--temp", "0"]


def _length(served: Served) -> int:
    """Return the tokens of the longest conversation, at most those that the model has positions for."""
    config = Path(served.base or served.folder) / "config.json"
    tree = json_object(config) if config.is_file() else {}
    most = (tree.get("text_config") or tree).get("max_position_embeddings")
    return min(served.length, most or served.length)


def serves(server: Server, adapter: Path) -> bool:
    """Whether a server serves this adapter whole."""
    return server.lora == "tower" or (server.lora == "language" and not adapts_tower(adapter))


def adapts_tower(adapter: Path) -> bool:
    """Whether an adapter reaches beyond the language model."""
    layers = read_header(adapter / ADAPTER_FILES[1], "OUTPUT")[0]
    return not all((group_of(layer.partition(".lora_")[0]) or "").startswith("language") for layer in layers)


def _lora(folder: Path) -> list[str]:
    config = json_object(folder / ADAPTER_FILES[0])
    most = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    rank = next((rank for rank in RANKS if rank >= most), most)
    tower = ["--enable-tower-connector-lora"] if adapts_tower(folder) else []
    return ["--max-lora-rank", str(rank), *tower]


def _limits(folder: Path) -> list[str]:
    """Return the option with the smallest and largest area of a picture, for Qwen's image processor."""
    for file in filter(Path.is_file, (folder / name for name in PROCESSORS)):
        tree = json_object(file)
        images = tree.get("image_processor", tree)
        if str(images.get("image_processor_type")).startswith("Qwen2VL"):
            size = images.get("size") or {}
            low, high = size.get("shortest_edge"), size.get("longest_edge")
            found = {"min_pixels": low or images.get("min_pixels"), "max_pixels": high or images.get("max_pixels")}
            return ["--mm-processor-kwargs", json.dumps(found)]
    return []
