"""Processors made from nothing: each family's own classes, special tokens and layout, over a small learnt vocabulary.

Each family keeps its kind of tokenizer, since that is where the traps are: byte-level BPE for Llama 3 and Qwen, BPE over
`▁` with byte fallback for Gemma and Llama 2 (which LLaVA has). Any text can be spelled.
"""

import json
from pathlib import Path
from typing import Any

from shapes import PIXELS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GemmaTokenizer,
    LlamaTokenizer,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    MllamaImageProcessor,
    MllamaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

TEXTS = [
    "You are an expert radiographer. Describe accurately what you see in this image.",
    "system\n\nuser\n\nassistant\n\nmodel\n\nUSER: ASSISTANT: You are a helpful assistant.",
    "The heart is of normal size and the lungs are clear. There is no pleural effusion or pneumothorax.",
    "Frontal radiograph of the chest. There is a nodule in the left upper zone. No other abnormality is seen.",
    "Coronal CT image of the chest. There is an opacity in the right lower lobe, with a small effusion beside it.",
    "Lateral view of the knee. The joint space is narrowed, and there are osteophytes along the medial margin.",
    "There is a displaced fracture of the middle third of the clavicle. The shoulder joint is in place.",
    "Axial T2 weighted MRI of the brain shows a mass with oedema around it and a shift of the midline.",
    "Ultrasound of the liver: its echo texture is coarse, its edge is uneven, and there is fluid around it.",
]
LEARNT = 900  # tokens at most, of which 256 spell bytes
LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
Learnt = tuple[dict[str, int], list[tuple[str, str]]]


def build_processor(family: str, size: str, text_vocabulary: int | None) -> Any:
    """The processor of `family`. `text_vocabulary` is mllama's, whose image token comes right after it; None fits tightly."""
    if family == "mllama":
        tokenizer = _llama3(text_vocabulary)
    elif family == "gemma3":
        tokenizer = _gemma(newlines=4 if size == "served" else 1)
    elif family in ("llava", "llava_next"):
        tokenizer = _llama2()
    else:
        tokenizer = _qwen(*(("<think>", "</think>") if family == "qwen3_5" else ()))
    template = (Path(__file__).parent / "templates" / f"{family}.jinja").read_text()
    pixels = PIXELS[family][size]
    tokenizer.model_max_length = 1 << 17
    if family == "mllama":
        images: Any = MllamaImageProcessor(size=pixels, max_image_tiles=4)
        return MllamaProcessor(images, tokenizer, chat_template=template)
    if family == "gemma3":
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        images = Gemma3ImageProcessor(size=pixels, **half)
        return Gemma3Processor(images, tokenizer, template, image_seq_length=256 if size == "full" else 4)
    if family in ("llava", "llava_next"):
        side = pixels["height"]
        kinds: Any = (CLIPImageProcessor, LlavaProcessor)
        more: Any = {}
        if family == "llava_next":
            kinds = (LlavaNextImageProcessor, LlavaNextProcessor)
            shapes = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
            more = {"image_grid_pinpoints": [[side * high, side * wide] for high, wide in shapes]}
        images = kinds[0](size={"shortest_edge": side}, crop_size=pixels, **more)
        return kinds[1](
            images,
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            chat_template=template,
            num_additional_image_tokens=1,
        )
    shape: dict[str, Any] = {"patch_size": 14 if family == "qwen2_5_vl" else 16, "merge_size": 2, "size": pixels}
    if family == "qwen2_5_vl":
        videos: Any = Qwen2VLVideoProcessor(**shape)
        return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**shape), tokenizer, videos, chat_template=template)
    shape |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    videos = Qwen3VLVideoProcessor(**shape)
    return Qwen3VLProcessor(Qwen2VLImageProcessor(**shape), tokenizer, videos, chat_template=template)


def _learn(normalizer: Any, pre_tokenizer: Any, alphabet: list[str]) -> Learnt:
    """BPE of the texts: vocabulary and merges."""
    letters = Tokenizer(models.BPE())
    if normalizer is not None:
        letters.normalizer = normalizer
    letters.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=LEARNT, initial_alphabet=alphabet, show_progress=False)
    letters.train_from_iterator(TEXTS * 20, trainer)
    model = json.loads(letters.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _qwen(*more: str) -> Any:
    words = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    vocabulary, merges = _learn(None, words, pre_tokenizers.ByteLevel.alphabet())
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        extra_special_tokens=[*QWEN_SPECIALS, *more],
    )


def _llama3(text_vocabulary: int | None) -> Any:
    """Llama 3's byte-level BPE. The image token lies just outside the text vocabulary, as in the published model."""
    split = pre_tokenizers.Split(Regex(LLAMA_WORDS), behavior="isolated", invert=False)
    words = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    vocabulary, merges = _learn(None, words, pre_tokenizers.ByteLevel.alphabet())
    for token in LLAMA_SPECIALS:
        vocabulary[token] = len(vocabulary)
    while len(vocabulary) < (text_vocabulary or 0):
        vocabulary[f"<|unused_{len(vocabulary)}|>"] = len(vocabulary)
    vocabulary["<|image|>"] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer, backend.decoder = words, decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in (*LLAMA_SPECIALS, "<|image|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        add_bos_token=True,
    )


def _with_byte_fallback(specials: list[str]) -> Learnt:
    """BPE over `▁`, the named tokens first and then the 256 bytes."""
    words = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split("\n", "isolated")]
    )
    learnt, merges = _learn(normalizers.Replace(" ", "▁"), words, [])
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt]
    return {token: number for number, token in enumerate(tokens)}, merges


def _gemma(newlines: int) -> Any:
    """`newlines`: the longest run of them that is one token. The published vocabulary has longer ones; vLLM needs four."""
    vocabulary, merges = _with_byte_fallback(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    for run in range(2, newlines + 1):
        vocabulary["\n" * run] = len(vocabulary)
        merges += [("\n" * part, "\n" * (run - part)) for part in range(1, run)]
    return GemmaTokenizer(
        vocab=vocabulary,
        merges=merges,
        add_bos_token=True,
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        model_specific_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )


def _llama2() -> Any:
    vocabulary, merges = _with_byte_fallback(["<unk>", "<s>", "</s>"])
    return LlamaTokenizer(
        vocab=vocabulary,
        merges=merges,
        add_bos_token=True,
        pad_token="<pad>",
        model_specific_special_tokens={"image_token": "<image>"},
    )
