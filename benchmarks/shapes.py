"""The families' configurations: `full` as published, `tiny` the same architecture with small numbers.

The full figures are those of the published configs; `PARAMETERS` is what the models then hold, in all weights.
"""

from typing import Any

PARAMETERS = {
    "mllama": 10_670_220_835,  # Llama 3.2 11B Vision
    "qwen2_5_vl": 8_292_166_656,  # Qwen2.5-VL 7B
    "qwen3_vl": 8_767_123_696,  # Qwen3-VL 8B
    "qwen3_5": 9_409_813_744,  # Qwen3.5 9B, without the layer that foretells a second token, which transformers leaves out
    "gemma3": 4_300_079_472,  # Gemma 3 4B
    "llava": 7_063_427_072,  # LLaVA 1.5 7B
    "llava_next": 7_566_747_648,  # LLaVA 1.6 7B over Mistral
}
FAMILIES = tuple(PARAMETERS)

WIDTH, SPREAD = (
    64,
    0.12,
)  # tiny models' hidden size, and a spread of weights that makes what they see tell on what they say
TINY_TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": SPREAD,
}
TINY_VISION: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80, "initializer_range": SPREAD}

TEXT: dict[str, dict[str, dict[str, Any]]] = {
    "mllama": {
        "full": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        "tiny": {**TINY_TEXT, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
    },
    "qwen2_5_vl": {
        "full": {
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_window_layers": 28,
            "max_position_embeddings": 128_000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "tiny": {
            **TINY_TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
    },
    "qwen3_vl": {
        "full": {
            "vocab_size": 151_936,
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262_144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        "tiny": {
            **TINY_TEXT,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
    },
    "qwen3_5": {
        "full": {
            "vocab_size": 248_320,
            "max_position_embeddings": 262_144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e7,
                "mrope_section": [11, 11, 10],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.25,
            },
        },
        "tiny": {
            **TINY_TEXT,
            "num_hidden_layers": 4,
            "head_dim": 32,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.25,
            },
        },
    },
    "gemma3": {
        "full": {
            "vocab_size": 262_208,
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 1024,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        # A window shorter than a conversation, and one layer that sees all of it. Its embeddings, tied to the head and scaled
        # by the root of the width, must be small, or each token only repeats itself.
        "tiny": {
            **TINY_TEXT,
            "initializer_range": 0.03,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "sliding_window_pattern": 3,
        },
    },
    "llava": {
        "full": {"vocab_size": 32_064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        "tiny": TINY_TEXT,
    },
    "llava_next": {
        "full": {
            "model_type": "mistral",
            "vocab_size": 32_064,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        "tiny": {**TINY_TEXT, "model_type": "mistral", "sliding_window": None},
    },
}

VISION: dict[str, dict[str, dict[str, Any]]] = {
    "mllama": {
        "full": {"image_size": 560},
        "tiny": {
            **TINY_VISION,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 96,
            "image_size": 56,
        },
    },
    "qwen2_5_vl": {
        "full": {"hidden_size": 1280, "out_hidden_size": 3584},
        "tiny": {
            **TINY_VISION,
            "depth": 2,
            "num_heads": 4,
            "out_hidden_size": WIDTH,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
    },
    "qwen3_vl": {
        "full": {"out_hidden_size": 4096},
        "tiny": {
            **TINY_VISION,
            "depth": 2,
            "num_heads": 4,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
    "qwen3_5": {
        "full": {"out_hidden_size": 4096},
        "tiny": {**TINY_VISION, "depth": 2, "num_heads": 4, "out_hidden_size": WIDTH, "num_position_embeddings": 16},
    },
    "gemma3": {
        "full": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "tiny": {
            **TINY_VISION,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
    "llava": {
        "full": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
        "tiny": {
            **TINY_VISION,
            "model_type": "clip_vision_model",
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "initializer_factor": 4.0,
        },
    },
}

PIXELS: dict[str, dict[str, dict[str, int]]] = {
    "mllama": {"full": {"height": 560, "width": 560}, "tiny": {"height": 56, "width": 56}},
    "qwen2_5_vl": {
        "full": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        "tiny": {"shortest_edge": 56 * 56, "longest_edge": 84 * 84},
    },
    "qwen3_vl": {
        "full": {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096},
        "tiny": {"shortest_edge": 64 * 64, "longest_edge": 96 * 96},
    },
    "gemma3": {"full": {"height": 896, "width": 896}, "tiny": {"height": 56, "width": 56}},
    "llava": {"full": {"height": 336, "width": 336}, "tiny": {"height": 56, "width": 56}},
}
VISION["llava_next"], PIXELS["llava_next"] = VISION["llava"], PIXELS["llava"]
PIXELS["qwen3_5"] = PIXELS["qwen3_vl"]

INTERNVL: dict[str, Any] = {
    "vocab_size": 151_674,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
"""Text model of InternVL3 8B. Its tower is transformers' default."""
QWEN3_VL_MOE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
"""What Qwen3-VL 30B-A3B's text model has otherwise than Qwen3-VL 8B's."""
GEMMA4: dict[str, Any] = {"vocab_size": 262_144}
"""transformers' defaults: 30 layers of width 2304, 4.6 billion weights with the embeddings of each layer."""
OTHERS = ("internvl", "gemma4", "qwen3_vl_moe")
"""Families of tests/other_families.py that are made in full too."""

SERVED = ("qwen2_5_vl", "qwen3_vl", "gemma3", "llava")
"""Families with the size `served`: the tiny one, with heads of 32, the smallest that vLLM's attention takes on a CPU."""
for family in SERVED:
    tiny = TEXT[family]["tiny"]
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32}
    TEXT[family]["served"] = tiny | {name: size for name, size in heads.items() if name in tiny}
    if sections := tiny.get("rope_parameters", {}).get("mrope_section"):
        rope = tiny["rope_parameters"] | {"mrope_section": [2 * section for section in sections]}
        TEXT[family]["served"] |= {"rope_parameters": rope}
    VISION[family]["served"], PIXELS[family]["served"] = dict(VISION[family]["tiny"]), PIXELS[family]["tiny"]
# As published, a token of Gemma's stands for 16 patches, which vLLM counts on.
VISION["gemma3"]["served"] |= {"image_size": 112}
PIXELS["gemma3"]["served"] = {"height": 112, "width": 112}
