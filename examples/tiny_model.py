"""The demo's model before any training: a very small Qwen2.5-VL with a tokenizer, an image processor and a chat template.

It is the real architecture with every width turned down: a million weights, and sixteen image tokens an image.
"""

import json

import numpy as np
import torch
from radiographs import SIZE, TERMS, Case, draw_cases, house_caption, radiologist_caption
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

INSTRUCTION = "You are an expert radiographer. Describe accurately what you see in this image."
PATCH, MERGE = 14, 2  # pixels a side of a patch; patches a side of an image token
GRID = SIZE // PATCH  # patches a side of an image
IMAGE_TOKENS = (GRID // MERGE) ** 2

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
SPECIAL_TOKENS = (
    END_OF_TEXT,
    "<|im_start|>",
    END_OF_TURN,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type in ('image', 'image_url') -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'video' -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- else -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def report_request(case: Case) -> str:
    """Asks for a report by its medical terms, without an image: how the base meets the radiologist's words."""
    return f"Write a report: {case.modality}, {TERMS[case.finding]}, {case.side} {case.place} zone."


def build_processor() -> Qwen2_5_VLProcessor:
    """A byte-level tokenizer that has both styles' words whole and can spell anything else, with the image half."""
    rng = np.random.default_rng(0)
    cases = draw_cases(500, rng)
    texts = [caption(case) for case in cases for caption in (house_caption, radiologist_caption, report_request)]
    texts += [f"system\nuser\nassistant\n{INSTRUCTION}"] * 100

    letters = Tokenizer(models.BPE())
    letters.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=alphabet, show_progress=False)
    letters.train_from_iterator(texts, trainer)
    learnt = json.loads(letters.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(pair) for pair in learnt["merges"]],
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        unk_token=None,
        model_max_length=1024,
        extra_special_tokens=list(SPECIAL_TOKENS),
    )
    pixels = {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE}
    shape = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2, "size": pixels}
    shape |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # the three channels stay equal; see() counts on it
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**shape),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**shape),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: Qwen2_5_VLProcessor, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained model of under a million parameters."""
    torch.manual_seed(seed)
    tokens = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    width, heads = 128, 4
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": width,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": tokens[END_OF_TURN],
            "pad_token_id": tokens[END_OF_TEXT],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "out_hidden_size": width,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "window_size": SIZE,
            "fullatt_block_indexes": [0, 1],
            "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
        },
        image_token_id=tokens["<|image_pad|>"],
        video_token_id=tokens["<|video_pad|>"],
        vision_start_token_id=tokens["<|vision_start|>"],
        vision_end_token_id=tokens["<|vision_end|>"],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokens[END_OF_TURN],
        pad_token_id=tokens[END_OF_TEXT],
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokens[END_OF_TURN], tokens[END_OF_TEXT]], pad_token_id=tokens[END_OF_TEXT], max_new_tokens=64
    )
    return model
