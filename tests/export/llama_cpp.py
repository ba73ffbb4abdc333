"""What llama.cpp computes, by its own libraries and the ctypes declarations that llama-cpp-python brings with its sources."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

MARKER = "<__media__>"  # llama.cpp's own word for "the image is here"
F32 = 0


def logits(gguf: Path, prompt: str, image: Image.Image, answer: list[int]) -> tuple[list[int], np.ndarray]:
    """The prompt's tokens (-1 for each of the image), and the logits for each of the answer's: float32, (tokens, vocabulary).

    The answer is given, so one token that differs does not change all that follow. What is kept of earlier tokens is
    float32; what multiplies bfloat16 weights is rounded to bfloat16 by llama.cpp itself.
    """
    llama, mtmd = _bindings()
    silent = llama.llama_log_callback(lambda level, text, data: None)
    for setting in (llama.llama_log_set, mtmd.mtmd_log_set, mtmd.mtmd_helper_log_set):
        setting(silent, None)
    model = llama.llama_model_load_from_file(str(gguf / "model.gguf").encode(), llama.llama_model_default_params())
    seen = mtmd.mtmd_context_params_default()
    seen.n_threads, seen.warmup = 1, False
    tower = mtmd.mtmd_init_from_file(str(gguf / "mmproj.gguf").encode(), model, seen)
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 1024  # an image is decoded whole
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = F32
    context = llama.llama_init_from_model(model, settings)

    text = mtmd.mtmd_input_text(text=prompt.encode(), text_len=len(prompt.encode()), parse_special=True)
    pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(mtmd.mtmd_bitmap_init(image.width, image.height, pixels))
    chunks, past = mtmd.mtmd_input_chunks_init(), llama.llama_pos()
    assert mtmd.mtmd_tokenize(tower, chunks, ctypes.byref(text), bitmaps, 1) == 0
    assert mtmd.mtmd_helper_eval_chunks(tower, context, chunks, 0, 0, 1024, True, ctypes.byref(past)) == 0
    size = (llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model)),)
    found = [np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), size).copy()]
    for number, token in enumerate(answer[:-1]):
        batch = llama.llama_batch_init(1, 0, 1)
        batch.n_tokens, batch.token[0], batch.pos[0], batch.logits[0] = 1, token, past.value + number, True
        batch.n_seq_id[0], batch.seq_id[0][0] = 1, 0
        assert llama.llama_decode(context, batch) == 0
        found.append(np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), size).copy())
    return _tokens(mtmd, chunks), np.stack(found)


def _tokens(mtmd: Any, chunks: Any) -> list[int]:
    tokens: list[int] = []
    for number in range(mtmd.mtmd_input_chunks_size(chunks)):
        chunk, count = mtmd.mtmd_input_chunks_get(chunks, number), ctypes.c_size_t()
        if known := mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count)):
            tokens += known[: count.value]
        else:
            tokens += [-1] * mtmd.mtmd_input_chunk_get_n_tokens(chunk)
    return tokens


def _bindings() -> tuple[Any, Any]:
    """Its two modules of declarations, without the rest of the package, which asks for packages of its own."""
    if "llama_cpp" not in sys.modules:
        package = ModuleType("llama_cpp")
        package.__path__ = [str(Path(os.environ["LLAMA_CPP"]).parents[1] / "llama_cpp")]
        sys.modules["llama_cpp"] = package
        os.environ["LLAMA_CPP_LIB_PATH"] = os.environ["MTMD_CPP_LIB"] = f"{os.environ['LLAMA_CPP_BUILD']}/bin"
    import llama_cpp.llama_cpp as llama
    import llama_cpp.mtmd_cpp as mtmd

    return llama, mtmd
