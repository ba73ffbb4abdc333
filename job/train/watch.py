"""What the card is doing, for `logs/metrics.jsonl`."""

from __future__ import annotations

import importlib.util
import warnings

import torch


def gpu_numbers() -> dict[str, float]:
    """`gpu_memory_peak_gb` (allocated, since the last call), `gpu_memory_reserved_gb`, and from NVML `gpu_utilization`
    (percent of the last sample period in which a kernel ran) and `gpu_power_watts`. Empty without a GPU.
    """
    if not torch.cuda.is_available():
        return {}
    numbers = {
        "gpu_memory_peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3),
        "gpu_memory_reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 3),
    }
    torch.cuda.reset_peak_memory_stats()
    if importlib.util.find_spec("pynvml") is None:
        return numbers
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return numbers | {
                "gpu_utilization": torch.cuda.utilization(),
                "gpu_power_watts": round(torch.cuda.power_draw() / 1000, 1),
            }
    except (RuntimeError, OSError, ImportError):  # a driver without NVML, or a container that hides it
        return numbers
