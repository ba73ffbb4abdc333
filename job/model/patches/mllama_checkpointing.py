"""Changes the class of Llama 3.2's vision layers, so that activation checkpointing reaches them.

Why: these are the only layers of any family that transformers leaves out, eleven gigabytes per image in the 11B shape.
Upstream: transformers 5.17, whose `MllamaVisionEncoderLayer` is a plain `nn.Module`; Unsloth has its own patch for it
(github.com/unslothai/unsloth-zoo/pull/264).
May go: when `MllamaVisionEncoderLayer` derives from `GradientCheckpointingLayer`, as every other family's layer does.
"""

from __future__ import annotations

import warnings
from typing import Any

from job.model.patches.mllama_attention import llamas


def make_recomputable(model: Any) -> None:
    """Make the vision layers of a bare mllama `model` checkpointable like all others; leaves other models alone."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    tower, made = llamas(model), dict[type, type]()
    if tower is not None:  # transformers 5.17 calls these layers by an old name, and would say so at every call
        warnings.filterwarnings("ignore", "`hidden_state` is deprecated", FutureWarning)
    for layer in [*tower.transformer.layers, *tower.global_transformer.layers] if tower is not None else []:
        kind = type(layer)
        if not issubclass(kind, GradientCheckpointingLayer):
            bases = (GradientCheckpointingLayer, kind)
            layer.__class__ = made.setdefault(kind, type(kind.__name__, bases, {"__module__": kind.__module__}))
