"""The boundary to the model libraries: one `Loaded`, whichever backend made it."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import SpecError
from job.model.memory import Kept
from job.model.sooner import changed, one_trainer, uncollected
from job.spec import JobSpec, ModelSpec

if TYPE_CHECKING:
    import torch

SUPPORTED = {
    "mllama": "Llama 3.2 Vision",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen2_vl": "Qwen2-VL",
    "qwen3_vl": "Qwen3-VL",
    "gemma3": "Gemma 3",
    "llava": "LLaVA",
}


@dataclass(frozen=True)
class Loaded:
    """A base model with fresh adapters, ready to train or to generate.

    `groups` counts trainable parameters by group (see `job.model.lora.GROUPS`); `precision` is what `auto` became.
    """

    model: Any
    processor: Any
    folder: Path
    backend: str
    precision: str
    device: torch.device
    groups: dict[str, int]


def choose_backend(spec: ModelSpec, cuda: bool) -> str:
    """`unsloth` or `transformers`. Raises SpecError when the one asked for cannot work here."""
    present = importlib.util.find_spec("unsloth") is not None
    if spec.backend == "unsloth" and not (cuda and present):
        what = "is not installed; install the gpu extra" if cuda else "needs an NVIDIA GPU, and there is none here"
        raise SpecError(f"model.backend: unsloth {what}, or choose transformers")
    if spec.backend == "auto":
        return "unsloth" if cuda and present and spec.by_unsloth else "transformers"
    return spec.backend


def import_first(backend: str) -> None:
    """Unsloth patches transformers, TRL and PEFT, so it must come before they are imported by anyone."""
    with uncollected(), changed("unsloth.models.rl", one_trainer):
        importlib.import_module(f"job.model.{backend}_backend")


def load_model(
    spec: JobSpec, folder: Path, device: torch.device, backend: str, precision: str, kept: Kept, start: Path | None
) -> Loaded:
    """The base of `folder` with adapters, fresh or those of the folder `start`, through the backend named; `kept` is what
    stays on the GPU for the backward, which Unsloth wants to know when it loads."""
    import torch

    # Hopper's default. With a mask it gives NaN gradients at some lengths (github.com/pytorch/pytorch/issues/196678), and
    # wrong numbers where the mask is in float32 (pull 191612): in torch 2.11 to 2.13 at least.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if backend == "unsloth":
        from job.model import unsloth_backend

        loaded = unsloth_backend.load(spec, folder, device, start, precision, kept)
    else:
        from job.model import transformers_backend

        loaded = transformers_backend.load(spec, folder, device, start, precision)
    from job.model.compiling import hold_stance

    hold_stance(loaded.model)
    return loaded


def release(model: Any) -> None:
    """Free the memory of a model's tensors, whoever still refers to it. It can be used no more.

    Trainers, hooks and patches of the libraries keep references to a model that nobody wants any more.
    """
    from job.model.oom_retry import free_cached

    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_meta:  # it waits elsewhere
            continue
        tensor.grad = None
        tensor.data = tensor.data.new_empty(0)
        if getattr(tensor, "quant_state", None) is not None:  # bitsandbytes' scales
            tensor.quant_state = None
    free_cached()


def to_training(loaded: Loaded) -> None:
    """Adapters trainable, dropout on."""
    if loaded.backend == "unsloth":
        from job.model.unsloth_backend import for_training

        for_training(loaded.model)
        _set_stance()
    loaded.model.train()


def to_generation(loaded: Loaded) -> None:
    """Dropout off, and the backend's faster paths for generating."""
    if loaded.backend == "unsloth":
        from job.model.unsloth_backend import for_generation

        for_generation(loaded.model)
        _set_stance()
    loaded.model.eval()


def _set_stance() -> None:
    """Unsloth lets torch.compile compile again when it changes between training and generation."""
    from job.model.compiling import set_stance

    set_stance()
