"""GPU memory, utilisation and power for `logs/metrics.jsonl`."""

from __future__ import annotations

import importlib.util
import warnings

import torch

from job.runtime.peaks import Peaks


def gpu_numbers(peaks: Peaks) -> dict[str, float]:
    """Return `gpu_memory_peak_gb` (allocated, since the last call), `gpu_memory_reserved_gb`, and from NVML `gpu_utilization`
    (percent of the last sample period in which a kernel ran) and `gpu_power_watts`. Empty without a GPU."""
    found = peaks.take_device()
    if found is None:
        return {}
    allocated, reserved = found
    numbers = {"gpu_memory_peak_gb": round(allocated / 1e9, 3), "gpu_memory_reserved_gb": round(reserved / 1e9, 3)}
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
