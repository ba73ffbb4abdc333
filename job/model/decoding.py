"""Runs the steps of greedy generation as a CUDA graph.

A step generates one token per row with about a thousand small kernels, which Python launches more slowly than the GPU runs
them. A CUDA graph launches them at once. It needs tensors at fixed addresses, so keys and values use buffers of the final
length.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from job.model.loaded import Loaded, base, is_sharded
from job.model.patches.model_forward import replaced_forward
from job.model.patches.sdpa_attention import grouped_heads

log = logging.getLogger("job")

GROWING = frozenset({"cross_attention_mask", "mm_token_type_ids"})
"""Inputs that grow at each step by a copy of their last row; a step may use only that row."""
CLOSE = 1e-2
"""Maximum difference between the logits of the graph and of the same step without it, relative to the largest logit."""
NO_GRAPH = "_job_no_graph"
CHECKED = "_job_graph_checked"


class Buffer(StaticLayer):
    """Keys and values in buffers of the final length. The host tracks their number: reading it from the device would
    synchronise, which a graph cannot do."""

    def __init__(self, max_cache_len: int) -> None:
        super().__init__(max_cache_len)
        self.count = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.count += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        return self.count


class Pictures(DynamicLayer):
    """Keys and values of the images, which prefill writes and no step changes."""

    is_compileable = True


def buffers(config: Any, length: int) -> Cache | None:
    """Create a cache for `length` tokens per row, prompt included. Sliding-window layers get the full length too: their mask
    applies the window. None for models with other kinds of layers."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        return None
    crossing = set(getattr(text, "cross_attention_layers", None) or ())
    return Cache(layers=[Pictures() if number in crossing else Buffer(length) for number in range(len(kinds))])


def generate(loaded: Loaded, inputs: dict[str, torch.Tensor], max_new_tokens: int, **settings: Any) -> torch.Tensor:
    """Like `loaded.model.generate`, with its steps as a CUDA graph where device and model allow."""
    bare, sharded = base(loaded.model), is_sharded(loaded.model)
    length = inputs["input_ids"].shape[1] + max_new_tokens
    graph = graphs(loaded.device) and not sharded and not hasattr(bare, NO_GRAPH)
    cache = buffers(bare.config, length) if graph else None
    produced: torch.Tensor
    if cache is None:
        with grouped_heads():
            if sharded:  # ranks whose answers end early go on, since the others need their shares
                settings["synced_gpus"] = True
            produced = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, **settings)
        return produced
    # Unsloth's own `generate` chooses another cache. It otherwise only adds autocast, which it also trains under.
    autocast = torch.autocast(loaded.device.type, torch.bfloat16) if loaded.backend == "unsloth" else nullcontext()
    named = settings | {"max_new_tokens": max_new_tokens, "past_key_values": cache, "disable_compile": True}
    with grouped_heads(), autocast, Steps(bare, cache).taken():
        produced = type(bare).generate(bare, **inputs, **named)
    return produced


def graphs(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.cuda is not None


class Steps:
    """The steps of one generation: the first runs eagerly, which initialises kernels; the second is captured; the rest are
    replayed."""

    def __init__(self, model: Any, cache: Cache) -> None:
        self.model, self.forward = model, model.forward
        self.counted = [layer for layer in cache.layers if isinstance(layer, Buffer)]
        self.seen = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: dict[str, Any] = {}
        self.output: Any = None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Intercept the model's steps while the block runs."""
        try:
            with replaced_forward(self.model, self._step):
                yield
        finally:
            self.graph = self.output = None
            self.inputs = {}

    def _step(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        tokens = named.get("input_ids")
        if arguments or tokens is None or tokens.shape[1] != 1 or hasattr(self.model, NO_GRAPH):
            return self.forward(*arguments, **named)
        self.seen += 1
        if self.seen == 1:
            return self.forward(**named)
        if self.graph is None:
            return self._first(named)
        return self._replay(named)

    def _first(self, named: dict[str, Any]) -> Any:
        counts = [layer.count for layer in self.counted]
        try:
            self._capture(named)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._count(counts)
            self._give_up(str(error).strip().splitlines()[0])
            return self.forward(**named)
        assert self.graph is not None
        self.graph.replay()
        if hasattr(self.model, CHECKED):
            return self.output
        made = self.output.logits.clone()
        self._undo(counts)
        written = self.forward(**named)
        if bool((made - written.logits).abs().max() <= CLOSE * written.logits.abs().max()):
            setattr(self.model, CHECKED, True)
        else:
            self._give_up("its logits differ from those of the same step without it")
        return written

    def _capture(self, named: dict[str, Any]) -> None:
        self.inputs = {name: _copied(value) for name, value in named.items()}
        graph = torch.cuda.CUDAGraph()
        # Other threads of the job query the driver for its memory meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.output = self.forward(**self.inputs)
        self.graph = graph

    def _replay(self, named: dict[str, Any]) -> Any:
        assert self.graph is not None
        taken = {name: value for name, value in named.items() if name not in GROWING}
        if any(_shape(value) != _shape(self.inputs.get(name)) for name, value in taken.items()):
            self._give_up("inputs of another shape")
            return self.forward(**named)
        for name, value in taken.items():
            _put(value, self.inputs[name])
        self.graph.replay()
        for layer in self.counted:
            layer.count += 1
        return self.output

    def _undo(self, counts: list[int]) -> None:
        """Undo the step just run: the next one overwrites its keys and values."""
        self._count(counts)
        for layer in self.counted:
            layer.cumulative_length.sub_(1)

    def _count(self, counts: list[int]) -> None:
        for layer, count in zip(self.counted, counts, strict=True):
            layer.count = count

    def _give_up(self, why: str) -> None:
        """Run all further steps of this model eagerly."""
        self.graph = self.output = None
        setattr(self.model, NO_GRAPH, True)
        log.warning("answers are generated without a CUDA graph, which takes longer: %s", why)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return {name: _copied(each) for name, each in value.items()} if isinstance(value, dict) else value


def _shape(value: Any) -> Any:
    """Return what must match for one input to replace another; None for non-tensors."""
    if isinstance(value, dict):
        return {name: _shape(each) for name, each in value.items()}
    return value.shape if isinstance(value, torch.Tensor) else None


def _put(value: Any, place: Any) -> None:
    if isinstance(value, torch.Tensor):
        place.copy_(value)
    elif isinstance(value, dict):
        for name, each in value.items():
            _put(each, place[name])
