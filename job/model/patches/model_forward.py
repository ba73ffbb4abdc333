"""Replaces the `forward` of one model during generation, so that its steps can be replayed as a CUDA graph.

Why: `generate` calls the model itself, once per token, and accepts no other function for a step.
Upstream: transformers 5.17, whose `generate` makes CUDA graphs only through torch.compile (`compile_config`).
May go: when `generate` runs its steps as CUDA graphs without compiling them, or accepts a function for a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from job.model.patches import replaced


def replaced_forward(model: Any, step: Callable[..., Any]) -> AbstractContextManager[None]:
    """While the block runs, call `step` instead of the forward of `model`, with a tuple and a dict of arguments."""
    wrapped = functools.wraps(model.forward)  # transformers reads its signature
    return replaced(model, "forward", wrapped(lambda *arguments, **named: step(arguments, named)))
