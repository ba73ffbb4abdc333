"""When torch.compile may compile: inside `compiled(True)`, and nowhere else.

Unsloth wraps functions and layers in torch.compile as it is imported, when nobody knows yet how many steps there will be.
torch's stance decides at each call instead: with "force_eager" all that is wrapped runs as it is written, with no recompiling
and no guards. It holds for the whole process, so for the threads of the backward too, where checkpointed layers run again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_stance = "force_eager"


def hold_stance(model: Any) -> None:
    """Compile nothing from here on but inside `compiled(True)`.

    Unsloth sets the stance to "default" in `for_training`, `for_inference` and at the start of `generate`, so it is set
    again as each forward of `model`, a PEFT model, or of its base begins; and as inputs of generation are prepared, which makes
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
    """Give torch the stance that holds here, whatever anyone set it to."""
    torch.compiler.set_stance(_stance)


@contextmanager
def compiled(wanted: bool) -> Iterator[None]:
    """Let all that is wrapped in torch.compile be compiled while the block runs, its backward included; or nothing."""
    global _stance
    before = _stance
    _stance = "default" if wanted else "force_eager"
    set_stance()
    try:
        yield
    finally:
        _stance = before
        set_stance()


def keep_flex_attention_compiled() -> None:
    """Compile flex attention whatever the stance is: Unsloth takes it for Gemma 3.

    Eagerly it makes all scores at once, rows × heads × tokens² numbers of 4 bytes six times over in the backward, and
    takes several times as long for each layer and each token that is generated.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    given = ALL_ATTENTION_FUNCTIONS["flex_attention"]

    @functools.wraps(given)  # Unsloth finds its own wrapper by an attribute
    def fused(*arguments: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling() or _stance == "default":
            return given(*arguments, **named)
        with torch.compiler.set_stance("default"):
            return given(*arguments, **named)

    ALL_ATTENTION_FUNCTIONS["flex_attention"] = fused
