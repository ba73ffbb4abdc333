"""Chooses a backend and loads the model through it."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from job.config.schema import JobSpec, ModelSpec
from job.errors import SpecError
from job.model.loaded import Loaded
from job.model.memory_model import Kept
from job.model.patches.unsloth_import import changed, one_trainer, uncollected, upstreams_processor

if TYPE_CHECKING:
    import torch


def choose_backend(spec: ModelSpec, cuda: bool) -> str:
    """Return `unsloth` or `transformers`. Raises SpecError when the requested backend cannot work here."""
    present = importlib.util.find_spec("unsloth") is not None
    cuda = cuda or os.environ.get("UNSLOTH_ALLOW_CPU") == "1"  # Unsloth's own, for tests without a GPU
    if spec.backend == "unsloth" and not (cuda and present):
        what = "is not installed; install the gpu extra" if cuda else "needs an NVIDIA GPU, and there is none here"
        raise SpecError(f"model.backend: unsloth {what}, or choose transformers")
    if spec.backend == "auto":
        return "unsloth" if cuda and present and spec.by_unsloth else "transformers"
    return spec.backend


def import_first(backend: str) -> None:
    """Import the backend before transformers, TRL and PEFT, which Unsloth patches."""
    gemma = "unsloth_zoo.temporary_patches.gemma"
    with uncollected(), changed("unsloth.models.rl", one_trainer), changed(gemma, upstreams_processor):
        importlib.import_module(f"job.model.{backend}_backend")


def load_model(
    spec: JobSpec,
    folder: Path,
    device: torch.device,
    backend: str,
    precision: str,
    kept: Kept,
    start: Path | None,
    *,
    sharded: bool = False,
) -> Loaded:
    """Load the base model in `folder` with fresh adapters, or those in `start`, through the named backend. `kept` says which
    activations stay on the GPU for the backward, which Unsloth needs at load time. `sharded`: only this rank's share of the
    weights, which Unsloth cannot do."""
    avoid_cudnn_attention()
    if backend == "unsloth":
        from job.model import unsloth_backend

        loaded = unsloth_backend.load(spec, folder, device, start, precision, kept)
    else:
        from job.model import transformers_backend

        loaded = transformers_backend.load(spec, folder, device, start, precision, sharded=sharded)
    from job.model.patches.compile_stance import hold_stance
    from job.model.patches.fla_autotune import without_autotuning

    hold_stance(loaded.model)
    without_autotuning()
    return loaded


def avoid_cudnn_attention() -> None:
    """Disable cuDNN's attention, the default on Hopper. With a mask it gives NaN gradients at some lengths
    (github.com/pytorch/pytorch/issues/196678), and wrong numbers with float32 masks (pull 191612), at least in torch 2.11 to
    2.13."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def to_training(loaded: Loaded) -> None:
    """Make the adapters trainable and enable dropout."""
    if loaded.backend == "unsloth":
        from job.model.unsloth_backend import for_training

        for_training(loaded.model)
        _set_stance()
    loaded.model.train()


def to_generation(loaded: Loaded) -> None:
    """Disable dropout and enable the backend's faster generation paths."""
    if loaded.backend == "unsloth":
        from job.model.unsloth_backend import for_generation

        for_generation(loaded.model)
        _set_stance()
    loaded.model.eval()


def _set_stance() -> None:
    """Restore the stance, because Unsloth re-enables compilation when it switches between training and generation."""
    from job.model.patches.compile_stance import set_stance

    set_stance()
