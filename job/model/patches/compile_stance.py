"""Pins torch.compile's stance: wrapped functions compile only inside `compiled(True)`.

Why: Unsloth wraps functions and layers in torch.compile at import, before the number of steps is known. Under the stance
"force_eager" they run eagerly, without recompiling and without guards. It applies to the whole process, so also to backward
threads, where checkpointed layers run again. `prepare_inputs_for_generation` is wrapped because Unsloth resets the stance when
`generate` begins.
Upstream: Unsloth 2026.10.9 (`for_training`, `for_inference` of unsloth/models/vision.py); transformers 5.17.
May go: when Unsloth can be told after its import whether to compile, and leaves the stance alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_stance = "force_eager"


def hold_stance(model: Any) -> None:
    """Compile nothing from now on except inside `compiled(True)`.

    Unsloth sets the stance to "default" in `for_training`, `for_inference` and at the start of `generate`, so it is set again
    before each forward of `model`, a PEFT model, and of its base; and before inputs of generation are prepared, which makes
    masks by functions that Unsloth wraps too.
    """
    for module in (model, model.get_base_model()):
        module.register_forward_pre_hook(lambda _module, _arguments: set_stance())
    bare = model.get_base_model()
    prepare = bare.prepare_inputs_for_generation

    @functools.wraps(prepare)  # transformers reads its signature
    def prepared(*arguments: Any, **named: Any) -> Any:
        set_stance()
        return prepare(*arguments, **named)

    bare.prepare_inputs_for_generation = prepared
    set_stance()


def set_stance() -> None:
    """Restore the stance pinned here, whatever it was set to since."""
    torch.compiler.set_stance(_stance)


@contextmanager
def compiled(wanted: bool) -> Iterator[None]:
    """While the block runs, compile everything wrapped in torch.compile, its backward included, if `wanted`; else nothing."""
    global _stance
    before = _stance
    _stance = "default" if wanted else "force_eager"
    set_stance()
    try:
        yield
    finally:
        _stance = before
        set_stance()
