"""Shards the frozen language model over the ranks, so that a model larger than one device can be trained.

Each rank holds its rows of every matrix of the text blocks, the embeddings and the head, and FSDP gathers one block at a time
for its forward and backward. These weights have no gradients, so nothing is reduced. Everything else is whole on every rank:
adapters, so that optimizer, checkpoints and sums over ranks know nothing of sharding; vectors, which are small; and the vision
tower, because ranks do not call it equally often (cached features, rows without images).

A gather waits for all ranks, so they must call the language model equally often (`job.distributed.allreduce`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from job.errors import SpecError
from job.model.weight_map import read_base


def load_shards(folder: Path, build: Callable[[], Any], device: torch.device) -> Any:
    """Return the model that `build()` makes, with this rank's share of the weights in `folder`. Neither rank nor device ever
    holds more than its share and one tensor. Needs `job.distributed.allreduce.connect`.

    Raises SpecError if a weight has no single place in the files.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = build()
    model.requires_grad_(False)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    _shard(model, device)
    _fill(model, folder, device)
    return model


def _shard(model: Any, device: torch.device) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    assert distributed.group.WORLD is not None
    mesh = DeviceMesh.from_group(distributed.group.WORLD, device.type)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = ends[0].weight is ends[1].weight
    units = [*text_blocks(model), *([ends] if tied else ends)]
    whole = {weight for weight in model.parameters() if weight.dim() < 2}
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    # The outermost module of every forward, called by training and generation alike; it shards nothing of its own.
    rest = {weight for weight in model.parameters() if not _is_share(weight)}
    fully_shard(model.base_model, mesh=mesh, reshard_after_forward=True, ignored_params=rest)


def text_blocks(model: Any) -> list[torch.nn.Module]:
    """Return the language model's layers."""
    return list(model.get_decoder().layers)


def _is_share(weight: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


@torch.no_grad()
def _fill(model: Any, folder: Path, device: torch.device) -> None:
    from safetensors import safe_open

    files = read_base(folder)
    there = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    found: dict[str, Tensor] = {}
    for file in files.files:
        with safe_open(folder / file, "pt") as stream:
            for key in (key for key, slot in files.slots.items() if slot.file == file and key in files.names):
                name = files.names[key]
                if name in there:
                    found[name] = _share(stream.get_slice(key), there[name], device)
    found |= {tied: found[name] for name, tied in files.tied.items() if name in found and tied in there}
    if missing := [name for name, weight in there.items() if weight.is_meta and name not in found]:
        raise SpecError(
            f"training.shard: {len(missing)} weights of {folder}, first {missing[0]}, are not tensors of its files, and cannot "
            "be loaded in shares; set it to none"
        )
    model.load_state_dict(found, strict=False, assign=True)
    model.tie_weights()


def _share(tensor: Any, target: Tensor, device: torch.device) -> Tensor:
    """Read this rank's rows of a tensor in a file, or all of it if `target` is not sharded."""
    from torch.distributed.tensor import DTensor, Shard

    if not _is_share(target):
        whole: Tensor = tensor[...].to(device, target.dtype, copy=True).view(target.shape)
        return torch.nn.Parameter(whole, requires_grad=False) if isinstance(target, torch.nn.Parameter) else whole
    assert isinstance(target, DTensor)
    each = -(-len(target) // distributed.get_world_size())
    start = min(distributed.get_rank() * each, len(target))
    rows = tensor[start : min(start + each, len(target))].to(device, target.dtype, copy=True)
    share = DTensor.from_local(
        rows, target.device_mesh, [Shard(0)], run_check=False, shape=target.shape, stride=target.stride()
    )
    return torch.nn.Parameter(share, requires_grad=False)
