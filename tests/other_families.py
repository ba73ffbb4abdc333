"""Families beside those of tests/families.py: each a tiny random model in its published shape, taken through one contract
(test_contract.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, GenerationConfig, Qwen2Tokenizer

from tests.tiny import models, processors, shapes


class Other(NamedTuple):
    """How to make one, and the sentence that refuses it, if it cannot work."""

    make: Callable[..., Any]
    refused: str = ""


TEXT = shapes.TINY_TEXT
VISION = shapes.TINY_VISION | {"num_hidden_layers": 2, "num_attention_heads": 4}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def save(folder: Path, config: Any, processor: Any, *ends: str, full: bool = False) -> Path:
    """Write model and processor: a tiny one in 32 bits, a full one in 16, made on the GPU where there is one."""
    torch.manual_seed(0)
    with torch.device("cuda" if full and torch.cuda.is_available() else "cpu"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16 if full else torch.float32)
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(list(ends)),
        pad_token_id=tokenizer.pad_token_id,
    )
    assert full or sum(weight.numel() for weight in model.parameters()) < 1e6
    model.save_pretrained(folder, max_shard_size="5GB")
    processor.save_pretrained(folder)
    return folder


def with_unread(folder: Path, pattern: str, put: str) -> Path:
    """Copy weights under names that no model reads, as published files hold some."""
    weights = load_file(folder / "model.safetensors")
    weights |= {re.sub(pattern, put, name): weight.clone() for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def chatml(image: str, end: str = "<|im_end|>\\n") -> str:
    return turns("<|im_start|>{role}\\n", image, end)


def turns(header: str, image: str, end: str, first: str = "", assistant: str = "assistant") -> str:
    """A template that puts `header`, with its {role}, before each turn and `end` behind it."""
    before, named, after = header.partition("{role}")
    role = f"('{assistant}' if message.role == 'assistant' else message.role)" if named else "''"
    assistant = assistant if named else ""
    return (
        f"{{{{- '{first}' -}}}}{{%- for message in messages -%}}{{{{- '{before}' + {role} + '{after}' -}}}}"
        "{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}"
        f"{{{{- '{image}' if part.type == 'image' else part.text -}}}}"
        f"{{%- endfor -%}}{{%- endif -%}}{{{{- '{end}' -}}}}{{%- endfor -%}}"
        f"{{%- if add_generation_prompt -%}}{{{{- '{before}{assistant}{after}' -}}}}{{%- endif -%}}"
    )


def qwen(*more: str, eos: str = "<|im_end|>", pad: str = "<|endoftext|>", **named: str) -> Any:
    """Qwen's byte-level BPE with other special tokens; `named` are those that the tokenizer names itself."""
    words = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    vocabulary, merges = processors._learn(None, words, pre_tokenizers.ByteLevel.alphabet())
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        eos_token=eos,
        pad_token=pad,
        unk_token=None,
        extra_special_tokens=[*dict.fromkeys(("<|endoftext|>", "<|im_start|>", "<|im_end|>", *more))],
        model_specific_special_tokens=named,
        model_max_length=1 << 17,
    )


def text_config(
    tokenizer: Any, model_type: str | None = None, shape: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """`shape` takes the place of `TEXT` and, where it has one, of the tokenizer's vocabulary."""
    known = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    known |= {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    return known | (shape or TEXT) | ({"model_type": model_type} if model_type else {}) | more


def internvl(folder: Path, full: bool = False) -> Path:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    images = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = qwen(**images, video_token="<video>")
    side, tokens = (448, 256) if full else (56, 4)
    size = {"height": side, "width": side}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=12 if full else 4),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=tokens,
        chat_template=chatml("<IMG_CONTEXT>\\n"),
    )
    config = CONFIG_MAPPING["internvl"](
        text_config=text_config(tokenizer, "qwen2", shapes.INTERNVL if full else None),
        vision_config={
            **({} if full else VISION),
            "image_size": [side, side],
            "patch_size": [14, 14],
        },  # lists, as published
        image_token_id=processor.image_token_id,
        image_seq_length=tokens,
        tie_word_embeddings=not full,
    )
    return save(folder, config, processor, "<|im_end|>", full=full)


def mistral3(folder: Path) -> Path:
    from transformers import PixtralImageProcessor, PixtralProcessor

    tokenizer = qwen("[INST]", "[/INST]", "[IMG_BREAK]", "[IMG_END]", eos="</s>", pad="<pad>", image_token="[IMG]")
    images = PixtralImageProcessor(size={"longest_edge": 84}, patch_size={"height": 14, "width": 14})
    template = (
        "{%- for message in messages -%}{%- if message.role == 'assistant' -%}"
        "{{- (message.content if message.content is string else message.content[0].text) + '</s>' -}}{%- else -%}"
        "{{- '[INST]' -}}{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
        "{%- for part in message.content -%}{{- '[IMG]' if part.type == 'image' else part.text -}}{%- endfor -%}"
        "{%- endif -%}{{- '[/INST]' -}}"
        "{%- endif -%}{%- endfor -%}"
    )
    processor = PixtralProcessor(images, tokenizer, patch_size=14, spatial_merge_size=2, chat_template=template)
    config = CONFIG_MAPPING["mistral3"](
        text_config=text_config(tokenizer, "mistral", head_dim=16),
        vision_config=VISION | {"model_type": "pixtral", "head_dim": 12, "image_size": 84, "patch_size": 14},
        image_token_index=processor.image_token_id,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return save(folder, config, processor, "</s>")


def qwen_moe(family: str, dense: str, **experts: Any) -> Callable[..., Path]:
    def make(folder: Path, full: bool = False) -> Path:
        size = "full" if full else "tiny"
        processor = processors.build_processor(dense, size, None)
        like = models.configuration(dense, size, processor).to_dict()
        sections = {name: {**like[name]} for name in ("text_config", "vision_config")}
        for section in sections.values():
            section.pop("model_type")
        few = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        sections["text_config"] |= (shapes.QWEN3_VL_MOE if full else few) | experts
        sections["vision_config"]["out_hidden_size"] = sections["text_config"]["hidden_size"]
        tokens = {name: value for name, value in like.items() if name.endswith("_token_id")}
        save(folder, CONFIG_MAPPING[family](**sections, **tokens), processor, *models.ENDS[dense], full=full)
        # Qwen3.5's files hold a layer that predicts a second token.
        return with_unread(folder, r"^model\.language_model(?=\.layers\.3)", "mtp") if dense == "qwen3_5" else folder

    return make


def llava_onevision(folder: Path) -> Path:
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    tokenizer = qwen("<image>", "<video>")
    size = {"height": 56, "width": 56}
    grids = [[56 * high, 56 * wide] for high in (1, 2) for wide in (1, 2)]
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grids, **HALF),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>\\n"),
    )
    config = CONFIG_MAPPING["llava_onevision"](
        text_config=text_config(tokenizer, "qwen2"),
        vision_config=VISION | {"image_size": 56, "patch_size": 14, "vision_use_head": False},
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=grids,
    )
    return save(folder, config, processor, "<|im_end|>")


def paligemma(folder: Path) -> Path:
    from transformers import PaliGemmaProcessor, SiglipImageProcessor

    tokenizer = gemma(())
    images = SiglipImageProcessor(size={"height": 56, "width": 56}, **HALF)
    images.image_seq_length = 16
    # published ones have no template; people give them one
    processor = PaliGemmaProcessor(images, tokenizer, chat_template=turns("", "<image>", "\\n"))
    config = CONFIG_MAPPING["paligemma"](
        text_config=text_config(tokenizer, "gemma", head_dim=16),
        vision_config=VISION | {"image_size": 56, "patch_size": 14, "vision_use_head": False},
        image_token_index=processor.image_token_id,
        projection_dim=TEXT["hidden_size"],
        hidden_size=TEXT["hidden_size"],
    )
    return save(folder, config, processor, "<eos>")


def idefics3(folder: Path) -> Path:
    from transformers import Idefics3ImageProcessor, Idefics3Processor

    return idefics(folder, "idefics3", Idefics3ImageProcessor, Idefics3Processor)


def smolvlm(folder: Path) -> Path:
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    size = {"longest_edge": 56}
    videos = SmolVLMVideoProcessor(size=size, max_image_size=size)
    return idefics(folder, "smolvlm", SmolVLMImageProcessor, SmolVLMProcessor, videos)


def idefics(folder: Path, family: str, images: Any, kind: Any, *videos: Any) -> Path:
    grid = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    specials = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *grid)
    tokenizer = qwen(*specials, eos="<end_of_utterance>")
    image_processor = images(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}, **HALF)
    # User:<image>…<end_of_utterance>\nAssistant: …, capitalised as published
    template = turns("{role}: ", "<image>", "<end_of_utterance>\\n", "<|im_start|>", "Assistant").replace(
        "else message.role)", "else message.role | capitalize)"
    )
    processor = kind(image_processor, tokenizer, *videos, image_seq_len=4, chat_template=template)
    config = CONFIG_MAPPING[family](
        text_config=text_config(tokenizer, "llama"),
        vision_config=VISION | {"image_size": 56, "patch_size": 14},
        image_token_id=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )
    return save(folder, config, processor, "<end_of_utterance>")


def glm4v(folder: Path) -> Path:
    from transformers import Glm4vImageProcessor, Glm4vProcessor, Glm4vVideoProcessor

    names = {"image_start": "begin_of_image", "image_end": "end_of_image", "image": "image"}
    names |= {"video_start": "begin_of_video", "video_end": "end_of_video", "video": "video"}
    roles = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>")
    tokenizer = qwen(*(f"<|{name}|>" for name in names.values()), *roles, eos="<|endoftext|>")
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 84 * 84}
    processor = Glm4vProcessor(
        Glm4vImageProcessor(size=pixels),
        tokenizer,
        Glm4vVideoProcessor(size=pixels),
        chat_template=turns("<|{role}|>\\n", "<|begin_of_image|><|image|><|end_of_image|>", "", "[gMASK]<sop>"),
    )
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    vision = {"hidden_size": 48, "depth": 2, "num_heads": 4, "intermediate_size": 80, "image_size": 56}
    config = CONFIG_MAPPING["glm4v"](
        text_config=text_config(tokenizer, rope_parameters=rope),
        vision_config=vision | {"out_hidden_size": TEXT["hidden_size"], "initializer_range": shapes.SPREAD},
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()},
    )
    return save(folder, config, processor, "<|endoftext|>", "<|user|>")


def gemma4(folder: Path, full: bool = False) -> Path:
    from transformers import Gemma4AudioFeatureExtractor, Gemma4ImageProcessor, Gemma4Processor, Gemma4VideoProcessor

    tokenizer = gemma(
        ("<|turn>", "<turn|>", "<|video|>"),
        boi_token="<|image>",
        eoi_token="<image|>",
        image_token="<|image|>",
        boa_token="<|audio>",
        eoa_token="<audio|>",
        audio_token="<|audio|>",
    )
    processor = Gemma4Processor(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessor(max_soft_tokens=280 if full else 70),
        tokenizer,
        Gemma4VideoProcessor(),
        chat_template=turns("<|turn>{role}\\n", "<|image|>", "<turn|>\\n", "<bos>", "model"),
    )
    like: dict[str, Any] = {"head_dim": 16, "global_head_dim": 32, "sliding_window": 64, "num_hidden_layers": 4}
    like |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 1}
    like |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": len(tokenizer)}
    sounds: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sounds |= {"output_proj_dims": 32, "subsampling_conv_channels": [4, 4]}
    text = text_config(tokenizer, **like, initializer_range=0.03)
    config = CONFIG_MAPPING["gemma4"](
        text_config=text_config(tokenizer, None, shapes.GEMMA4) if full else text,
        vision_config={}
        if full
        else VISION | {"num_key_value_heads": 4, "head_dim": 12, "position_embedding_size": 128},
        audio_config=None if full else sounds,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        image_token_id=tokenizer.image_token_id,
        video_token_id=processor.video_token_id,
        boa_token_id=tokenizer.boa_token_id,
        eoa_token_index=tokenizer.eoa_token_id,
        audio_token_id=tokenizer.audio_token_id,
    )
    save(folder, config, processor, "<eos>", "<turn|>", full=full)
    if full:
        return folder
    # Published files hold keys and values of layers that share another's, too.
    return with_unread(folder, r"language_model\.layers\.1(?=\.self_attn\.(k|v)_)", "language_model.layers.3")


def gemma3n(folder: Path) -> Path:
    """As far as it can be made without timm, which holds its vision tower: the text model's weights."""
    from transformers import AutoModelForCausalLM, Gemma3nAudioFeatureExtractor, Gemma3nProcessor, SiglipImageProcessor

    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    sounds = {"boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>", "audio_token": "<audio_soft_token>"}
    tokenizer = gemma(("<start_of_turn>", "<end_of_turn>"), **marks, **sounds)
    processor = Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(),
        SiglipImageProcessor(size={"height": 56, "width": 56}),
        tokenizer,
        image_seq_length=4,
        chat_template=turns("<start_of_turn>{role}\\n", "<image_soft_token>", "<end_of_turn>\\n", "<bos>", "model"),
    )
    like = {"head_dim": 16, "num_kv_shared_layers": 1, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    text = text_config(
        tokenizer, **like, vocab_size_per_layer_input=len(tokenizer), activation_sparsity_pattern=[0.0] * 3
    )
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma3n_text"](**text)).save_pretrained(folder)
    processor.save_pretrained(folder)
    config = {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"], "text_config": text}
    config["vision_config"] = {"model_type": "gemma3n_vision", "architecture": "mobilenetv5_300m_enc"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def gemma(extra: tuple[str, ...], **named: str) -> Any:
    from transformers import GemmaTokenizer

    vocabulary, merges = processors._with_byte_fallback(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    return GemmaTokenizer(
        vocab=vocabulary,
        merges=merges,
        add_bos_token=True,
        extra_special_tokens=[*extra],
        model_specific_special_tokens=named,
    )


def llama4(folder: Path) -> Path:
    from transformers import Llama4ImageProcessor, Llama4Processor

    marks = ("image_start", "image_end", "image", "patch", "tile_x_separator", "tile_y_separator")
    names = (*marks, "begin_of_text", "header_start", "header_end", "eot")
    tokenizer = qwen(*(f"<|{name}|>" for name in names), eos="<|eot|>")
    tokenizer.bos_token = "<|begin_of_text|>"
    processor = Llama4Processor(
        Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=4),
        tokenizer,
        patch_size=14,
        chat_template=turns("<|header_start|>{role}<|header_end|>\\n\\n", "<|image|>", "<|eot|>", "<|begin_of_text|>"),
    )
    like = {"head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 4, "interleave_moe_layer_step": 2}
    vision = {"image_size": 56, "patch_size": 14, "vision_output_dim": 64, "projector_input_dim": 64}
    vision |= {
        "projector_output_dim": 64,
        "intermediate_size": 192,
    }  # of four times the hidden size: pixels are shuffled
    config = CONFIG_MAPPING["llama4"](
        text_config=text_config(tokenizer, **like),
        vision_config=VISION | vision,
        boi_token_index=tokenizer.convert_tokens_to_ids("<|image_start|>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<|image_end|>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<|patch|>"),
    )
    return save(folder, config, processor, "<|eot|>")


OTHERS = {
    "internvl": Other(internvl),
    "mistral3": Other(mistral3),
    "qwen3_vl_moe": Other(qwen_moe("qwen3_vl_moe", "qwen3_vl", decoder_sparse_step=1)),
    "qwen3_5_moe": Other(qwen_moe("qwen3_5_moe", "qwen3_5", shared_expert_intermediate_size=32)),
    "llava_onevision": Other(llava_onevision),
    "paligemma": Other(
        paligemma,
        "reads a prompt in both directions, as its processor marks it, and such models cannot be trained on conversations; "
        "choose an instruction-tuned model",
    ),
    "idefics3": Other(idefics3),
    "smolvlm": Other(smolvlm),
    "glm4v": Other(glm4v),
    "gemma4": Other(gemma4),
    "gemma3n": Other(
        gemma3n,
        "cannot be loaded here: TimmWrapperModel requires the timm library but it was not found in your environment; install it, "
        "or choose another model",
    ),
    "llama4": Other(llama4),
}
