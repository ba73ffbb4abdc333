"""What base + adapter says and weighs, taken while it is in memory, so that the merged model need not share the GPU with it."""

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
from job.export.places import DTYPES, Base
from job.model import Loaded
from job.model.lora import group_of
from job.model.memory import served_precision

SAMPLE = 4096
"""Numbers of each weight that are compared."""
FLIPPED = 12
MANTISSA = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


@dataclass(frozen=True)
class Expected:
    """A sample of a weight of base + adapter, rounded as the files round it (float32, on the CPU), and how far from it the
    merged model's may be: 0 but where the model holds fewer bits than the files."""

    sample: Tensor
    tolerance: Tensor


@dataclass(frozen=True)
class Adapted:
    """A base in memory with its adapter beside it, not folded.

    `weights` gives each weight of the base by its name there, with the adapter beside it, on the device that computes with
    it; `silent` is a context in which the adapter says nothing.
    """

    loaded: Loaded
    weights: Callable[[], Iterator[tuple[str, Any, Tensor, Lora | None]]]
    silent: Callable[[], Any]


def trained(loaded: Loaded) -> Adapted:
    """The model as it was trained, with the adapter that PEFT holds."""
    return Adapted(loaded, lambda: _live_weights(loaded.model), lambda: base_or_tuned(loaded, tuned=False))


def beside(loaded: Loaded, base: Any, adapters: Mapping[str, Lora]) -> Adapted:
    """The bare model `base` with `adapters` (by the layer's name) added to what its layers say, as PEFT adds them.

    PEFT itself cannot put an adapter beside a model of which a part waits outside the GPU.
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
    """The live adapters of a PEFT model by the layer's name in the base, copied to the CPU."""
    found = {}
    for name, _, _, lora in _live_weights(model):
        if lora is not None:
            a, b = (factor.detach().to("cpu", copy=True) for factor in (lora.a, lora.b))
            found[name.removesuffix(".weight")] = replace(lora, a=a, b=b)
    return found


def trained_weights(model: Any) -> dict[str, Tensor]:
    """What a PEFT model learned beside its adapters (`lora.bias`), by the name in the base, copied to the CPU."""
    return {
        name: weight.detach().to("cpu", copy=True)
        for name, _, weight, _ in _live_weights(model)
        if weight.requires_grad
    }


def expected(adapted: Adapted, base: Base) -> tuple[dict[str, Expected], dict[str, dict[str, float]]]:
    """What the merged model's weights must be, by name; and by group how many were adapted, and by what share of their size."""
    kept = {name: DTYPES.get(base.slots[key].dtype) for key, name in base.names.items()}
    groups: dict[str, dict[str, float]] = {}
    found = {}
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
        tolerance = torch.zeros(()) if exact else right.abs() * 2.0 ** -MANTISSA[weight.dtype]
        found[name] = Expected(right.to(dtype if exact else weight.dtype).float(), tolerance)
    return found, groups


def samples(model: Any) -> dict[str, Tensor]:
    """A sample of each weight of a bare model, wherever its parts wait."""
    return {name: sample(name, weight) for name, _, weight in _aligned_weights(model)}


def _aligned_weights(model: Any) -> Iterator[tuple[str, Any, Tensor]]:
    """Each weight of a bare model with its name and module, on the device that computes with it while it is looked at."""
    for name, module in model.named_modules():
        with align_module_device(module):
            for last, weight in module.named_parameters(recurse=False):
                yield f"{name}.{last}".removeprefix("."), module, weight


def sample(name: str, weight: Tensor) -> Tensor:
    """The same numbers of a weight each time, chosen by its name: float32 on the CPU. A copy, since a view of a weight that is
    mapped from its file keeps the whole file in memory."""
    flat = weight.detach().flatten()
    if len(flat) > SAMPLE:
        chosen = torch.randint(len(flat), (SAMPLE,), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        flat = flat[chosen.to(flat.device)]
    return flat.to("cpu", torch.float32, copy=True)


@contextmanager
def jittered(adapted: Adapted, base: Base) -> Iterator[None]:
    """One number in twelve of each adapted weight moved to its neighbour in the files' dtype; afterwards all are as they were.

    A weight that waits outside the GPU is moved in the copy that the GPU computes with.
    """
    dtypes = {name: DTYPES.get(base.slots[key].dtype, torch.float32) for key, name in base.names.items()}
    here, waiting = [], []
    for name, module, weight, adapter in adapted.weights():
        if adapter is not None:
            place = (name, dtypes.get(name, weight.dtype))
            waiting.append(_Jitter(module, *place)) if _waits(module) else here.append((module, *place))
    for module, name, dtype in here:
        _flip(module, name, dtype)
    try:
        yield
    finally:
        for module, name, dtype in here:
            _flip(module, name, dtype)
        for hook in waiting:
            hook.active = False


class _Jitter(ModelHook):
    """Flips the copy of a weight that comes to the GPU for one forward and goes again."""

    def __init__(self, module: Any, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.dtype, self.active = name, dtype, True
        add_hook_to_module(module, self, append=True)  # behind accelerate's own, which brings the weight

    def pre_forward(self, module: Any, *arguments: Any, **named: Any) -> Any:
        if self.active:
            _flip(module, self.name, self.dtype)
        return arguments, named


def _waits(module: Any) -> bool:
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


@torch.no_grad()
def _flip(module: Any, name: str, dtype: torch.dtype) -> None:
    """Flip the last bit that the files keep, in one number of twelve. Done twice, it undoes itself."""
    weight = module.weight
    bit = 1 << max(0, MANTISSA[weight.dtype] - MANTISSA[dtype])
    generator = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
    dice = torch.randint(FLIPPED, weight.shape, dtype=torch.uint8, device=weight.device, generator=generator)
    integers = weight.data.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
    integers ^= (dice == 0).to(integers.dtype) * bit


def _live_weights(model: Any) -> Iterator[tuple[str, Any, Tensor, Lora | None]]:
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    for name, weight in base.named_parameters():
        if ".original_module." in name or ".lora_" in name:
            continue
        module, _, last = name.rpartition(".base_layer.")
        adapter = _live(layers[module]) if module in layers and last == "weight" else None
        holder = base.get_submodule(name.rpartition(".")[0])
        name = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        yield name, holder, weight, adapter


def _live(layer: Any) -> Lora:
    """The live adapter of a layer, with the scale that PEFT uses."""
    (adapter,) = layer.active_adapters
    scale = float(layer.scaling[adapter])
    if adapter in layer.lora_embedding_A:
        return Lora(layer.lora_embedding_B[adapter].T, layer.lora_embedding_A[adapter].T, scale)
    magnitude = layer.lora_magnitude_vector[adapter].weight if adapter in layer.lora_magnitude_vector else None
    return Lora(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, scale, magnitude)
