"""Gives Llama 3.2's language model the states of the vision tower that it was trained on.

Why: beside its last states, the tower hands on those that enter layers 3, 7, 15, 23 and 30, in Meta's own code and in vLLM,
SGLang and TGI. Transformers takes those that leave these layers, so an adapter would learn from, and be measured on, other states
than the weights were trained on and servers compute.
Upstream: transformers 5.17, `MllamaVisionEncoder`; so since 4.55 (github.com/huggingface/transformers/pull/39643, 40083, 39785).
May go: when transformers collects the states before each layer.
"""

from __future__ import annotations

from typing import Any

from job.model.patches.mllama_attention import llamas


def install(model: Any) -> None:
    """Correct the tower of a bare mllama `model`, unless transformers has been mended. Leaves other models alone."""
    if (tower := llamas(model)) is not None:
        tower.transformer.register_forward_hook(_with_first, prepend=True)


def _with_first(encoder: Any, arguments: Any, output: Any) -> Any:
    if len(output.hidden_states) == len(encoder.layers):
        output.hidden_states = (arguments[0], *output.hidden_states)
    return output
