"""Facts about each model family. No torch: `check` uses them too. See docs/how-to/add-a-family.md to add one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Layout = Literal["rows", "patches", "pictures", "list"]


class Server(NamedTuple):
    """`versions` lists the versions that load the family; when empty, none does and `note` says why. `tried` is the version that
    `make test-serve` found to answer as was measured, and `lora` the adapters that it then served so: of the language model
    alone, or of the tower too."""

    name: str
    versions: str
    command: str
    note: str
    source: str
    tried: str = ""
    lora: Literal["", "language", "tower"] = ""


TIMELINE = "https://huggingface.co/docs/transformers/models_timeline"
VLLM_MODELS = "https://docs.vllm.ai/en/latest/models/supported_models.html"
SGLANG_MODELS = "https://docs.sglang.io/supported_models/text_generation/multimodal_language_models.html"
TGI_MODELS = "https://huggingface.co/docs/text-generation-inference/supported_models"
GGML = "https://github.com/ggml-org/llama.cpp/"
CONVERT = "convert_hf_to_gguf.py merged, and again with --mmproj; llama-server -m … --mmproj …"
TRANSFORMERS = Server("transformers", "5.17", "the code above", "", TIMELINE, "5.17")
VLLM = Server("vLLM", "", "vllm serve ./merged", "", VLLM_MODELS)
SGLANG = Server("SGLang", "0.5 and newer", "python -m sglang.launch_server --model-path ./merged", "", SGLANG_MODELS)
NO_MASK = "0.5.23 gives cross-attention no mask: empty tiles are read too, and by text before the image"
NO_SGLANG = SGLANG._replace(versions="", note="0.5.23 does not load this family")
NO_TOWER_LORA = "0.32 silently leaves out the LoRA of this tower, or ends at it: serve merged weights"
"""It calls the layers vision_tower.vision_model.encoder…, and transformers 5, with PEFT, vision_tower.encoder…. It also leaves
CLIP's class token out of its count of the tower's tokens."""
TGI = Server("TGI", "3.3.7", "text-generation-launcher --model-id ./merged", "archived; 3.3.7 is its last", TGI_MODELS)
LLAMA_CPP = Server("llama.cpp", "since November 2025", CONVERT, "", f"{GGML}blob/master/docs/multimodal.md")


def vllm(versions: str, lora: Literal["", "language", "tower"] = "") -> Server:
    """`lora` says that `make test-serve` tries this family."""
    tried, note = ("0.32" if lora else ""), (NO_TOWER_LORA if lora == "language" else "")
    return VLLM._replace(versions=versions, note=note, tried=tried, lora=lora)


def no_llama_cpp(note: str, source: str = LLAMA_CPP.source) -> Server:
    return LLAMA_CPP._replace(versions="", note=note, source=source)


@dataclass(frozen=True)
class Family:
    """Every default is safe for an unknown family, if slow or memory-hungry. Facts that a model's own files give are read from
    there instead: layers (lora_targets), template and answers (collator), sizes (memory_model)."""

    name: str = ""
    """The name its users know."""
    whole: bool = False
    """The tests cover it from spec to RESULT.json, and the headers of its files give its layer names."""
    loss_divides: bool = False
    """Its own loss divides by the tokens of the whole step. Else the loss is computed from its logits."""
    layout: Layout | None = None
    """How a batch stores images (image_layout): `rows` (rows, images per row, tiles, …); `patches` (patches of all images, …)
    with image_grid_thw (images, 3); `pictures` (images, channels, height, width); `list` the same, but the model's forward
    takes a list of features. None: there is no vision cache."""
    fences: tuple[str, ...] = ()
    """Image delimiter tokens that the processor does not name and no model should learn to write."""
    cross_attention: bool = False
    """Its text attends to images through separate layers rather than through tokens within the text."""
    tiles: int | None = None
    """Maximum number of tiles of `image_size` per image. None: the image's tokens are in the text, each for as many patches of
    the tower as `memory_model.patches_per_token` says, but an image takes at least one tile."""
    budgets: tuple[int, ...] = ()
    """Tokens of an image that its processor may be set to, if it pads every image to the patches of as many."""
    padded_tiles: bool = False
    """Images with fewer tiles are padded and masked; the tower is changed by patches/mllama_*.py."""
    kept: tuple[tuple[int, int], tuple[int, int]] = ((15, 4), (13, 6))
    """Multiples of the hidden and the intermediate width that a language and a vision layer keep for the backward without
    activation checkpointing (Korthikanti et al., 2022, section 4.1, without attention's own matrix and dropout). Norms in 32
    bits, gates and rotary embeddings make the families differ. tests/model/test_memory_model.py counts them."""
    servers: tuple[Server, ...] = ()
    """Servers that load its merged weights, and those that do not with the reason, from the servers' documentation."""
    named: tuple[tuple[str, str], ...] = ()
    """Patterns of its published names in lower case, each with the licence in report/licences.md; the first match counts."""
    maker: tuple[str, str] | None = None
    """Publisher and licence, for a base whose name matches no pattern."""


APACHE, LLAMA = "apache-2.0", "llama-community"
NO_CLIP = "its converter takes LLaVA models with a Pixtral tower only"
NO_MLLAMA = "its converter does not know MllamaForConditionalGeneration"
NO_ENCODER_DECODER = "dropped in 0.11 with the other encoder-decoder models"
VLLM_ONCE = vllm("up to 0.10.2")._replace(
    note=NO_ENCODER_DECODER, source="https://github.com/vllm-project/vllm/pull/24907"
)
QWEN_VL = Family(whole=True, loss_divides=True, layout="patches", fences=("<|vision_start|>", "<|vision_end|>"))

FAMILIES = {
    "mllama": Family(
        "Llama 3.2 Vision",
        whole=True,
        loss_divides=True,
        layout="rows",
        cross_attention=True,
        tiles=4,
        padded_tiles=True,
        kept=((9, 4), (9, 2)),
        servers=(
            TRANSFORMERS,
            VLLM_ONCE,
            SGLANG._replace(note=NO_MASK),
            TGI,
            no_llama_cpp(NO_MLLAMA, f"{GGML}issues/13805"),
        ),
        named=((r"llama-?3[._]2.*vision|llama-?3[._]2-(11b|90b)", "llama3.2"),),
        maker=("Meta's Llama 3.2 Vision", "llama3.2"),
    ),
    "llama4": Family(named=((r"(^|[/_-])llama-?[34]", LLAMA),), maker=("Meta's Llama 4", LLAMA)),
    "qwen2_5_vl": replace(
        QWEN_VL,
        name="Qwen2.5-VL",
        kept=((9, 4), (13, 4)),
        servers=(TRANSFORMERS, vllm("0.7.2 and newer", "tower"), SGLANG, TGI, LLAMA_CPP),
        named=(
            (r"qwen2[._]5-vl-3b", "qwen-research"),
            (r"qwen2[._]5-vl-72b", "qwen"),
            (r"qwen2[._]5-vl-(2b|7b|32b)", APACHE),
        ),
    ),
    "qwen2_vl": replace(
        QWEN_VL,
        name="Qwen2-VL",
        servers=(TRANSFORMERS, vllm("0.6.1 and newer"), SGLANG, TGI, LLAMA_CPP),
        named=((r"qwen2-vl-72b", "qwen"), (r"qwen2-vl-(2b|7b|32b)", APACHE)),
    ),
    "qwen3_vl": replace(
        QWEN_VL,
        name="Qwen3-VL",
        kept=((11, 4), (11, 2)),
        servers=(TRANSFORMERS, vllm("0.11.0 and newer", "tower"), SGLANG, LLAMA_CPP),
        named=((r"qwen3-vl", APACHE),),
        maker=("Qwen3-VL", APACHE),
    ),
    "qwen3_5": replace(
        QWEN_VL,
        name="Qwen3.5",
        loss_divides=False,
        servers=(TRANSFORMERS,),
        named=((r"qwen3[._]5", APACHE),),
        maker=("Qwen3.5", APACHE),
    ),
    "gemma3": Family(
        "Gemma 3",
        whole=True,
        loss_divides=True,
        layout="pictures",
        tiles=1,
        kept=((15, 4), (9, 2)),
        servers=(TRANSFORMERS, vllm("0.8.0 and newer", "language"), SGLANG, TGI, LLAMA_CPP),
        named=((r"medgemma", "health-ai-developer-foundations"), (r"^(?!.*gemma-?4).*gemma", "gemma")),
        maker=("Google's Gemma 3", "gemma"),
    ),
    "gemma4": Family(budgets=(70, 140, 280, 560, 1120), kept=((19, 4), (13, 6)), named=((r"gemma-?4", APACHE),)),
    "paligemma": Family(maker=("Google's PaliGemma", "gemma")),
    "llava": Family(
        "LLaVA",
        whole=True,
        loss_divides=True,
        layout="list",
        tiles=1,
        kept=((10, 4), (9, 6)),
        servers=(TRANSFORMERS, vllm("0.4.2 and newer", "language"), NO_SGLANG, no_llama_cpp(NO_CLIP)),
    ),
    "llava_next": Family("LLaVA-NeXT", whole=True, loss_divides=True, tiles=5, servers=(TRANSFORMERS,)),
}


def family_of(model_type: str) -> Family:
    """Return what is known of a `model_type` in config.json."""
    return FAMILIES.get(model_type, Family())
