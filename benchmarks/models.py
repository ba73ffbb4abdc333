"""Models of a real architecture with random weights, made without a download.

    python benchmarks/models.py FAMILY FOLDER [--size tiny|served|full] [--device cpu|cuda] [--dtype bfloat16|float32]

`full` has the published model's shape, every layer of it; `tiny` has the same architecture under a million parameters,
for tests. Both are saved with a processor as ordinary checkpoint folders. On an H100 a full one takes about half a
minute, nearly all of it writing the file.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from processors import build_processor
from safetensors import safe_open
from safetensors.torch import save_file
from shapes import FAMILIES, OTHERS, TEXT, VISION
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, GenerationConfig

MLLAMA_TEXT_VOCABULARY = 128_256
ENDS = {
    "mllama": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
    "qwen2_5_vl": ["<|im_end|>", "<|endoftext|>"],
    "qwen3_vl": ["<|im_end|>", "<|endoftext|>"],
    "qwen3_5": ["<|im_end|>", "<|endoftext|>"],
    "gemma3": ["<eos>", "<end_of_turn>"],
    "llava": ["</s>"],
    "llava_next": ["</s>"],
}
SAMPLING: dict[str, dict[str, Any]] = {  # as the published generation configs have it
    "mllama": {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    "qwen2_5_vl": {"do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05},
    "qwen3_vl": {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
    "qwen3_5": {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
    "gemma3": {"do_sample": True, "top_p": 0.95, "top_k": 64},
    "llava": {},
    "llava_next": {},
}
GATE = 0.3


def make_model(
    family: str,
    folder: Path,
    size: str = "tiny",
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write model and processor of `family` into `folder`, and return it. Seed and device decide the weights."""
    processor = build_processor(family, size, MLLAMA_TEXT_VOCABULARY if size == "full" else None)
    torch.manual_seed(seed)
    model = build_model(family, size, processor, device, dtype)
    model.save_pretrained(folder, max_shard_size="5GB")
    processor.save_pretrained(folder)
    if size == "served" and family in ("gemma3", "llava"):
        _as_published(folder / "model.safetensors")
    return folder


def _as_published(file: Path) -> None:
    """Name the tower's weights as published checkpoints do, and as vLLM reads them; transformers 5 saves shorter names."""
    with safe_open(file, "pt") as stream:
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 - it is no mapping
    short, long = "vision_tower.", "vision_tower.vision_model."
    save_file({key.replace(short, long): tensor for key, tensor in tensors.items()}, file, {"format": "pt"})


def build_model(family: str, size: str, processor: Any, device: str, dtype: torch.dtype) -> Any:
    """The model on `device` (`meta` makes shapes without weights), in eval mode.

    transformers' own initialisation, run on the device itself: normal weights, norms at one, biases at zero, and the
    rotary buffers, which no checkpoint holds, as its code computes them.
    """
    config = configuration(family, size, processor)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    for name, weight in model.named_parameters():  # these start at 0, which would shut the image out
        last = name.rpartition(".")[2]
        if family == "mllama" and "gate" in last:
            weight.data.fill_(GATE)
        elif last == "mm_input_projection_weight":
            weight.data.normal_(0, config.vision_config.hidden_size**-0.5)
    model.generation_config = GenerationConfig(
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.convert_tokens_to_ids(ENDS[family]),
        pad_token_id=processor.tokenizer.pad_token_id,
        **SAMPLING[family],
    )
    return model.eval()


def configuration(family: str, size: str, processor: Any) -> Any:
    """The family's config, with the token ids of this processor."""
    tokenizer = processor.tokenizer
    text, vision = dict(TEXT[family][size]), dict(VISION[family][size])
    outside = 1 if family == "mllama" else 0  # its image token is not in the text vocabulary
    text.setdefault("vocab_size", len(tokenizer) - outside)
    text["eos_token_id"] = tokenizer.convert_tokens_to_ids(ENDS[family][-1])
    text |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if family == "gemma3":
        tokens = {f"{name}_token_index": getattr(tokenizer, f"{name}_token_id") for name in ("boi", "eoi", "image")}
        tokens["mm_tokens_per_image"] = processor.image_seq_length
    elif family in ("mllama", "llava", "llava_next"):
        tokens = {"image_token_index": processor.image_token_id}
        if family == "llava_next":
            tokens["image_grid_pinpoints"] = processor.image_processor.image_grid_pinpoints
        if family != "mllama":
            tokens["image_seq_length"] = (vision["image_size"] // vision["patch_size"]) ** 2
    else:
        names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
        tokens = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}
    return CONFIG_MAPPING[family](text_config=text, vision_config=vision, **tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=(*FAMILIES, *OTHERS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=("tiny", "served", "full"), default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    given = parser.parse_args()
    began = time.monotonic()
    if given.family in OTHERS:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        from tests.other_families import OTHERS as MAKERS

        given.folder.mkdir(parents=True, exist_ok=True)
        MAKERS[given.family].make(given.folder, full=given.size == "full")
    else:
        make_model(given.family, given.folder, given.size, given.seed, given.device, getattr(torch, given.dtype))
    written = sum(file.stat().st_size for file in given.folder.glob("*.safetensors"))
    print(f"{given.folder}: {given.family}, {given.size}, {written / 1e9:.3f} GB in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
