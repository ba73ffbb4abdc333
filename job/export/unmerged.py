"""Records weights and outputs of base + adapter while it is in memory, so that the merged model need not share the GPU with
it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import align_module_device
from torch import Tensor

from job.evaluate.generate import base_or_tuned
from job.export.fold import Lora, changed
from job.export.tensor_map import DTYPES
from job.model.loaded import Loaded
from job.model.lora_targets import group_of
from job.model.memory_model import served_precision
from job.model.transformers_backend import waits
from job.model.weight_map import Base

SAMPLE = 4096
"""Numbers compared per weight."""
NEAREST = 1 / 12
"""Variance of rounding to nearest, in squares of a unit in the last place: an error uniform over ±½ unit."""
MANTISSA = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


@dataclass(frozen=True)
class Expected:
    """A sample of a weight of base + adapter, rounded as in the files (float32, on the CPU), and how far the merged model's
    may be from it: 0 unless the model holds fewer bits than the files."""

    sample: Tensor
    tolerance: Tensor


@dataclass(frozen=True)
class Rounding:
    """The rounding when an adapter is folded into a weight: `dtype` is the files', `chance` the share of the base's numbers
    that must move to their neighbour in it for the same mean square error."""

    dtype: torch.dtype
    chance: float


@dataclass(frozen=True)
class Adapted:
    """A base in memory with its adapter beside it, not folded.

    `weights` yields each weight of the base by its name there, with its adapter, on the device that computes with it; `silent`
    is a context in which the adapter is disabled.
    """

    loaded: Loaded
    weights: Callable[[], Iterator[tuple[str, Any, Tensor, Lora | None]]]
    silent: Callable[[], Any]


def trained(loaded: Loaded) -> Adapted:
    """Return the model as it was trained, with PEFT's adapter."""
    return Adapted(loaded, lambda: _live_weights(loaded.model), lambda: base_or_tuned(loaded, tuned=False))


def beside(loaded: Loaded, base: Any, adapters: Mapping[str, Lora]) -> Adapted:
    """Add the output of `adapters` (by layer name) to the layers of the bare model `base`, as PEFT does.

    PEFT itself cannot adapt a model that is partly outside the GPU.
    """
    says = True

    def layer(lora: Lora) -> Callable[..., Tensor]:
        a, b = lora.a.to(loaded.device), lora.b.to(loaded.device)

        def add(_: Any, given: tuple[Tensor, ...], said: Tensor) -> Tensor:
            if not says:
                return said
            return (said + (given[0].to(a.dtype) @ a.T @ b.T) * lora.scale).to(said.dtype)

        return add

    @contextmanager
    def silent() -> Iterator[None]:
        nonlocal says
        says = False
        try:
            yield
        finally:
            says = True

    for name, lora in adapters.items():
        base.get_submodule(name).register_forward_hook(layer(lora))

    def weights() -> Iterator[tuple[str, Any, Tensor, Lora | None]]:
        for name, module, weight in _aligned_weights(base):
            yield name, module, weight, adapters.get(name.removesuffix(".weight"))

    served = replace(loaded, model=base, precision=served_precision(loaded.precision), backend="transformers")
    return Adapted(served, weights, silent)


def adapters_of(model: Any) -> dict[str, Lora]:
    """Copy the live adapters of a PEFT model to the CPU, by the layer's name in the base."""
    found = {}
    for name, _, _, lora in _live_weights(model):
        if lora is not None:
            a, b = (factor.detach().to("cpu", copy=True) for factor in (lora.a, lora.b))
            found[name.removesuffix(".weight")] = replace(lora, a=a, b=b)
    return found


def trained_weights(model: Any) -> dict[str, Tensor]:
    """Copy to the CPU what a PEFT model learned besides its adapters (`lora.bias`), by the name in the base."""
    return {
        name: weight.detach().to("cpu", copy=True)
        for name, _, weight, _ in _live_weights(model)
        if weight.requires_grad
    }


def expected(
    adapted: Adapted, base: Base
) -> tuple[dict[str, Expected], dict[str, dict[str, float]], dict[str, Rounding]]:
    """Return the expected weights of the merged model, by name; by group, the number adapted and their relative change; and
    the rounding of each adapted weight."""
    kept = {name: DTYPES.get(base.slots[key].dtype) for key, name in base.names.items()}
    groups: dict[str, dict[str, float]] = {}
    found, roundings = {}, {}
    for name, _, weight, adapter in adapted.weights():
        dtype = kept.get(name) or weight.dtype
        exact = weight.dtype in (dtype, torch.float32)
        right = before = sample(name, weight)
        if adapter is not None:
            right = sample(name, changed(weight.detach(), adapter, dtype if exact else torch.float32))
            group = groups.setdefault(group_of(name) or "other", {"adapted": 0, "change": 0.0})
            share = float((right - before).norm() / before.norm())
            group["change"] = (group["change"] * group["adapted"] + share) / (group["adapted"] + 1)
            group["adapted"] += 1
            roundings[name] = Rounding(dtype, _chance(name, weight, adapter, dtype, right.to(dtype).float()))
        # Three roundings to the model's dtype, each by half a unit: of the base, of this sum, and of the merged weight.
        tolerance = (before.abs() + 2 * right.abs()) * 2.0 ** -(MANTISSA[weight.dtype] + 1)
        found[name] = Expected(
            right.to(dtype if exact else weight.dtype).float(), torch.zeros(()) if exact else tolerance
        )
    return found, groups, roundings


def _chance(name: str, weight: Tensor, adapter: Lora, dtype: torch.dtype, folded: Tensor) -> float:
    """See `Rounding`. `folded` is the sample of the folded weight. Never less than rounding to nearest."""
    error = folded - sampled_sum(name, weight, adapter)
    own = sample(name, weight).to(dtype)
    unit = _neighbour(own, 1).float() - own.float()
    return min(1.0, max(NEAREST, float(error.square().mean() / unit.square().mean())))


def sampled_sum(name: str, weight: Tensor, adapter: Lora) -> Tensor:
    """Return base + adapter at the numbers that `sample` takes, in float32 on the CPU, not rounded."""
    before, b, a = sample(name, weight), adapter.b.detach().flatten(1), adapter.a.detach().flatten(1)
    chosen = _chosen(name, weight.numel())
    place = torch.arange(weight.numel()) if chosen is None else chosen
    rows, columns = place // a.shape[1], place % a.shape[1]
    b_rows, a_columns = b[rows.to(b.device)].cpu().float(), a[:, columns.to(a.device)].cpu().float()
    return before + adapter.scale * (b_rows * a_columns.T).sum(1)


def samples(model: Any) -> dict[str, Tensor]:
    """Return a sample of each weight of a bare model, even of offloaded parts."""
    return {name: sample(name, weight) for name, _, weight in _aligned_weights(model)}


def _aligned_weights(model: Any) -> Iterator[tuple[str, Any, Tensor]]:
    """Yield each weight of a bare model with its name and module, on the device that computes with it while in use."""
    for name, module in model.named_modules():
        with align_module_device(module):
            for last, weight in module.named_parameters(recurse=False):
                yield f"{name}.{last}".removeprefix("."), module, weight


def sample(name: str, weight: Tensor) -> Tensor:
    """Return the same numbers of a weight each time, chosen by its name: float32 on the CPU. They are copied, since a view of
    a weight that is mapped from its file keeps the whole file in memory."""
    flat, chosen = weight.detach().flatten(), _chosen(name, weight.numel())
    if chosen is not None:
        flat = flat[chosen.to(flat.device)]
    return flat.to("cpu", torch.float32, copy=True)


def _chosen(name: str, size: int) -> Tensor | None:
    if size <= SAMPLE:
        return None
    return torch.randint(size, (SAMPLE,), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


@contextmanager
def jittered(adapted: Adapted, roundings: Mapping[str, Rounding], draw: int) -> Iterator[None]:
    """Move numbers of each adapted weight to their neighbours, as many as `roundings` says and different ones at each `draw`;
    restore them afterwards.

    A weight offloaded from the GPU is changed in the copy that the GPU computes with.
    """
    places = [(module, f"{draw} {name}", roundings[name]) for name, module, _, lora in adapted.weights() if lora]
    here = [place for place in places if not waits(place[0])]
    waiting = [_Jitter(*place) for place in places if waits(place[0])]
    for place in here:
        _flip(*place)
    try:
        yield
    finally:
        for place in here:
            _flip(*place)
        for hook in waiting:
            hook.active = False


class _Jitter(ModelHook):
    """Flips the copy of an offloaded weight that is on the GPU during one forward."""

    def __init__(self, module: Any, seed: str, rounding: Rounding) -> None:
        super().__init__()
        self.seed, self.rounding, self.active = seed, rounding, True
        add_hook_to_module(module, self, append=True)  # after accelerate's own hook, which loads the weight

    def pre_forward(self, module: Any, *arguments: Any, **named: Any) -> Any:
        if self.active:
            _flip(module, self.seed, self.rounding)
        return arguments, named


@torch.no_grad()
def _flip(module: Any, seed: str, rounding: Rounding) -> None:
    """Flip the last bit that the files keep, in numbers chosen by `seed`. A second call undoes it."""
    weight = module.weight
    bit = 1 << max(0, MANTISSA[weight.dtype] - MANTISSA[rounding.dtype])
    generator = torch.Generator(weight.device).manual_seed(zlib.crc32(seed.encode()))
    dice = torch.randint(256, weight.shape, dtype=torch.uint8, device=weight.device, generator=generator)
    weight.data.copy_(_neighbour(weight.data, (dice < round(256 * rounding.chance)).to(torch.int64) * bit))


def _neighbour(weight: Tensor, bits: Tensor | int) -> Tensor:
    """Return `weight` with `bits` of its numbers flipped."""
    integers = weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
    return (integers ^ (bits.to(integers.dtype) if isinstance(bits, Tensor) else bits)).view(weight.dtype)


def _live_weights(model: Any) -> Iterator[tuple[str, Any, Tensor, Lora | None]]:
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    for name, weight in base.named_parameters():
        if ".lora_" in name:
            continue
        module, _, last = name.rpartition(".base_layer.")
        adapter = _live(layers[module]) if module in layers and last == "weight" else None
        holder = base.get_submodule(name.rpartition(".")[0])
        yield name.replace(".base_layer.", "."), holder, weight, adapter


def _live(layer: Any) -> Lora:
    """Return the live adapter of a layer, with the scale that PEFT uses."""
    (adapter,) = layer.active_adapters
    return Lora(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, float(layer.scaling[adapter]))
