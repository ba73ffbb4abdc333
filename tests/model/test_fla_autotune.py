"""One configuration of each kernel of flash-linear-attention: which one, of which modules. On real kernels: tests/gpu."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from job.model.patches.fla_autotune import moderate, without_autotuning


class Config:
    """As `triton.Config`, in what is read of it."""

    def __init__(self, blocks: dict[str, int], num_warps: int, num_stages: int) -> None:
        self.kwargs, self.num_warps, self.num_stages = blocks, num_warps, num_stages


class Kernel:
    """As a Triton kernel behind its decorators."""

    def __init__(self, configs: list[Config] | None = None, fn: Any = None) -> None:
        self.fn = fn
        if configs is not None:
            self.configs = configs


Kernel.__module__ = "triton.runtime.autotuner"
STATES = [Config({"BV": v}, warps, stages) for warps in (2, 4) for stages in (2, 3, 4) for v in (32, 64)]
ELEMENTS = [Config({"BD": d}, warps, 3) for d in (16, 32, 64, 128) for warps in (4, 8, 16, 32)]
BLOCKS = [Config({"BK": n, "BV": n}, warps, 3) for n, warps in ((128, 8), (64, 4), (32, 2))]
WARPS = [Config({}, warps, stages) for warps in (2, 8) for stages in (4, 3)]


@pytest.mark.parametrize(
    ("configs", "blocks", "warps", "stages"),
    [
        (STATES, {"BV": 32}, 4, 2),
        (ELEMENTS, {"BD": 32}, 4, 3),
        (BLOCKS, {"BK": 64, "BV": 64}, 4, 3),
        (WARPS, {}, 2, 3),
    ],
)
def test_the_middling_one_of_a_kernels_configurations_is_taken(
    configs: list[Config], blocks: dict[str, int], warps: int, stages: int
) -> None:
    taken = moderate(configs)
    assert (taken.kwargs, taken.num_warps, taken.num_stages) == (blocks, warps, stages)


def test_kernels_of_fla_alone_keep_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, others = ModuleType("fla.ops.states"), ModuleType("flask.kernels")
    ours.behind = Kernel(fn=Kernel(list(STATES)))  # type: ignore[attr-defined]
    ours.single, ours.number = Kernel(STATES[:1]), 3  # type: ignore[attr-defined]
    others.kernel = Kernel(list(STATES))  # type: ignore[attr-defined]
    for module in (ours, others):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert without_autotuning() == 1
    assert len(ours.behind.fn.configs) == 1  # type: ignore[attr-defined]
    assert len(others.kernel.configs) == len(STATES)  # type: ignore[attr-defined]
    assert without_autotuning() == 0
