"""Gives the kernels of flash-linear-attention (FLA) one launch configuration each, so that none is tuned at a start.

Why: Qwen3.5's linear attention runs on FLA's Triton kernels. Triton compiles and times every configuration of each kernel at its
first call, and knows nothing of it in the next process: the first step of Qwen3.5 9B took 208 s on an H200, at every start.
Upstream: FLA 0.5.1 as Unsloth Zoo 2026.10.9 brings it; triton.runtime.autotuner.Autotuner of Triton 3.6, which times nothing
where there is one configuration. FLA_CACHE_MODE, FLA's own way, wants a file of each kernel for each kind of GPU.
May go: when FLA brings configurations of its own, or Triton keeps what it chose with the package.
"""

from __future__ import annotations

import math
import sys
from typing import Any

WARPS = 4
"""The usual number for blocks of 64, and the middle of what FLA lists."""


def without_autotuning() -> int:
    """Leave one configuration to each FLA kernel imported so far. Returns the number of kernels changed."""
    changed = 0
    for module in [each for name, each in sys.modules.items() if name.partition(".")[0] == "fla"]:
        for kernel in list(vars(module).values()):
            tuner = _tuner(kernel)
            if tuner is not None and len(tuner.configs) > 1:
                tuner.configs = [moderate(tuner.configs)]
                changed += 1
    return changed


def _tuner(kernel: Any) -> Any:
    """Return the autotuner of a Triton kernel, which may be behind `triton.heuristics`; None for anything else."""
    while kernel is not None and type(kernel).__module__.startswith(("triton.", "fla.")):
        if isinstance(getattr(kernel, "configs", None), list):
            return kernel
        kernel = getattr(kernel, "fn", None)
    return None


def moderate(configs: list[Any]) -> Any:
    """Choose the configuration with middling blocks (the smaller of two), then the fewest stages, which take shared memory, then
    warps nearest to `WARPS`."""
    sizes = sorted({_block(each) for each in configs})
    block = sizes[(len(sizes) - 1) // 2]
    return min(
        (each for each in configs if _block(each) == block),
        key=lambda each: (each.num_stages, abs(each.num_warps - WARPS), each.num_warps),
    )


def _block(config: Any) -> int:
    return math.prod(value for value in config.kwargs.values() if isinstance(value, int))
