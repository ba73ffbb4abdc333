"""The families that the tests take through everything, and what each of them must show there. No torch."""

from __future__ import annotations

from typing import NamedTuple

from job.model.families import family_of

QUESTION = "Describe accurately what you see in this image."


class Expected(NamedTuple):
    """The module of the vision tower; what the template puts before an answer and behind it; a conversation of `QUESTION` with
    a picture and of the answer "No."; what of the tiny tower the model does not read; and whether the template writes an answer
    in another way once another question follows."""

    tower: str
    header: str
    end: str
    layout: str
    unread: tuple[str, ...] = ()
    rewrites: bool = False


UNREAD = ("model.vision_tower.encoder.layers.2.",)  # of three, LLaVAs look at what the second one gives
FAMILIES = {
    "mllama": Expected(
        "model.vision_model",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>{QUESTION}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nNo.<|eot_id|>",
    ),
    "qwen2_5_vl": Expected(
        "model.visual",
        "<|im_start|>assistant\n",
        "<|im_end|>",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|><|image_pad|><|vision_end|>{QUESTION}<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n",
    ),
    "qwen3_vl": Expected(
        "model.visual",
        "<|im_start|>assistant\n",
        "<|im_end|>",
        f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{QUESTION}<|im_end|>\n"
        "<|im_start|>assistant\nNo.<|im_end|>\n",
    ),
    "qwen3_5": Expected(
        "model.visual",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>",
        f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{QUESTION}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nNo.<|im_end|>\n",
        rewrites=True,
    ),
    "gemma3": Expected(
        "model.vision_tower",
        "<start_of_turn>model\n",
        "<end_of_turn>",
        f"<bos><start_of_turn>user\n<start_of_image>{QUESTION}<end_of_turn>\n<start_of_turn>model\nNo.<end_of_turn>\n",
    ),
    "llava": Expected(
        "model.vision_tower", "▁ASSISTANT:", "</s>", f"USER: <image>\n{QUESTION} ASSISTANT: No. ", UNREAD
    ),
    "llava_next": Expected(
        "model.vision_tower", "[/INST]", "</s>", f"[INST] <image>\n{QUESTION} [/INST] No.</s> ", UNREAD
    ),
}
LAID_OUT = [family for family in FAMILIES if family_of(family).layout]
"""Those whose batches can be taken apart."""
