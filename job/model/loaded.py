"""Defines `Loaded`, the interface to the model libraries, common to both backends."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Loaded:
    """A base model with fresh adapters, ready for training or generation.

    `groups` counts trainable parameters by group (see `job.model.lora_targets.GROUPS`); `precision` is what `auto` resolved
    to.
    """

    model: Any
    processor: Any
    folder: Path
    backend: str
    precision: str
    device: torch.device
    groups: dict[str, int]


def base(model: Any) -> Any:
    """Return the model inside PEFT's wrapper, if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_sharded(model: Any) -> bool:
    """Whether ranks hold shares of the weights (`job.model.sharding`): all must then run the model at the same time."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # importing it takes a second; sharding has
    return fsdp is not None and isinstance(getattr(base(model), "base_model", None), fsdp.FSDPModule)


def without_gradients(model: Any) -> AbstractContextManager[Any]:
    """Return `torch.inference_mode`, or `torch.no_grad` for a sharded model: its gathered weights train too."""
    import torch

    return torch.no_grad() if is_sharded(model) else torch.inference_mode()


def logits_at(model: Any, inputs: Mapping[str, Any], columns: torch.Tensor) -> torch.Tensor:
    """Return the logits (rows, columns, vocabulary) of `inputs`, without labels, at these `columns` alone.

    transformers' language models compute no others when told so by `logits_to_keep`. Those of a whole batch of 8 rows, with a
    vocabulary of 248,000, and their gradients take 7 GB.
    """
    keeps = "logits_to_keep" in inspect.signature(type(base(model)).forward).parameters
    logits: torch.Tensor = model(**inputs, **({"logits_to_keep": columns} if keeps else {})).logits
    return logits if logits.shape[1] == len(columns) else logits[:, columns]


def release(model: Any) -> None:
    """Free the memory of a model's tensors even if references to them remain. The model is unusable afterwards.

    Trainers, hooks and library patches keep references to models that are no longer needed.
    """
    from job.model.oom_retry import free_cached

    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_meta:  # offloaded
            continue
        tensor.grad = None
        if hasattr(tensor, "to_local"):  # a share, which FSDP keeps references to
            tensor.to_local().untyped_storage().resize_(0)
        else:
            tensor.data = tensor.data.new_empty(0)
    for holder in [*model.parameters(), *model.modules()]:
        if getattr(holder, "quant_state", None) is not None:  # bitsandbytes' scales, held by weights and layers
            holder.quant_state = None
    free_cached()
