"""Which servers load a family's merged weights, from the servers' own documents. No torch: `check` prints it."""

from __future__ import annotations

from typing import NamedTuple


class Server(NamedTuple):
    """`versions` says which load the family, and is empty where none does; then `note` says why."""

    name: str
    versions: str
    command: str
    note: str
    source: str


VLLM = "https://docs.vllm.ai/en/latest/models/supported_models.html"
SGLANG = "https://docs.sglang.io/supported_models/text_generation/multimodal_language_models.html"
TGI = "https://huggingface.co/docs/text-generation-inference/supported_models"
LLAMA_CPP = "https://github.com/ggml-org/llama.cpp/blob/master/docs/multimodal.md"
ARCHIVED = "archived; 3.3.7 is its last"


def _transformers() -> Server:
    return Server(
        "transformers", "5.17", "the code above", "", "https://huggingface.co/docs/transformers/models_timeline"
    )


def _vllm(versions: str, note: str = "", source: str = VLLM) -> Server:
    return Server("vLLM", versions, "vllm serve ./merged", note, source)


def _sglang() -> Server:
    return Server("SGLang", "0.5 and newer", "python -m sglang.launch_server --model-path ./merged", "", SGLANG)


def _tgi() -> Server:
    return Server("TGI", "3.3.7", "text-generation-launcher --model-id ./merged", ARCHIVED, TGI)


def _llama_cpp(note: str = "", source: str = LLAMA_CPP) -> Server:
    """Where there is no note, its own converter makes the two files it wants."""
    command = "convert_hf_to_gguf.py merged, and again with --mmproj; llama-server -m … --mmproj …"
    return Server("llama.cpp", "" if note else "since November 2025", command, note, source)


NO_MLLAMA = "its converter does not know MllamaForConditionalGeneration"
NO_CLIP = "its converter takes LLaVA models with a Pixtral tower only"
SERVERS: dict[str, tuple[Server, ...]] = {
    "mllama": (
        _transformers(),
        _vllm(
            "up to 0.10.2",
            "dropped in 0.11 with the other encoder-decoder models",
            "https://github.com/vllm-project/vllm/pull/24907",
        ),
        _sglang(),
        _tgi(),
        _llama_cpp(NO_MLLAMA, "https://github.com/ggml-org/llama.cpp/issues/13805"),
    ),
    "qwen2_vl": (_transformers(), _vllm("0.6.1 and newer"), _sglang(), _tgi(), _llama_cpp()),
    "qwen2_5_vl": (_transformers(), _vllm("0.7.2 and newer"), _sglang(), _tgi(), _llama_cpp()),
    "qwen3_vl": (_transformers(), _vllm("0.11.0 and newer"), _sglang(), _llama_cpp()),
    "gemma3": (_transformers(), _vllm("0.8.0 and newer"), _sglang(), _tgi(), _llama_cpp()),
    "llava": (_transformers(), _vllm("0.4.2 and newer"), _sglang(), _llama_cpp(NO_CLIP)),
}


def servers(model_type: str) -> str:
    """One line for `check`: who loads this family, and who does not and why."""
    known = SERVERS.get(model_type, (_transformers(),))
    able = [f"{server.name} {server.versions}" for server in known if server.versions]
    unable = [f"{server.name} does not ({server.note})" for server in known if not server.versions]
    return "; ".join([", ".join(able), *unable])
