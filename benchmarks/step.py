"""Forward and backward of one training step: seconds, peak memory, and what the GPU spends them on.

    python benchmarks/step.py MODEL [--rows 8] [--at-once 8 4] [--side 512] [--kept inputs] [--rounds 3] [--kernels 0]

MODEL is a checkpoint, real or made by models.py. Each row has an image of SIDE × SIDE pixels and an answer of 16 or 40 words. The
rows are taken AT-ONCE in a pass, in turn for each number given, as in training: through Unsloth in 16 bits on a GPU, by plain
transformers on a CPU. The first step of each is not timed. With --kernels N, the N kernels with the most GPU time are printed,
and the GPU time of all is recorded: where it is well below the step's, launching the kernels takes longer than they do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mixed_lengths import loaded_for_training, rows_of
from results import append, this_machine

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--at-once", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--kept", choices=("all", "inputs", "nothing"), default="inputs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kernels", type=int, default=0)
    given = parser.parse_args()
    import torch

    on_gpu = torch.cuda.is_available()
    loaded = loaded_for_training(given.model, given.kept)

    from job.model.collator import Collator
    from job.train.loss import count_tokens, token_loss

    collate = Collator(loaded.processor, 1 << 15)
    rows = rows_of([given.side] * 2, [16, 40], given.rows)
    divisor = count_tokens([collate(rows)]).to(loaded.device)  # type: ignore[arg-type]

    def batches(at_once: int) -> list[dict[str, torch.Tensor]]:
        parts = [collate(rows[start : start + at_once]) for start in range(0, len(rows), at_once)]  # type: ignore[arg-type]
        return [
            {name: each.to(loaded.device) for name, each in part.items() if isinstance(each, torch.Tensor)}
            for part in parts
        ]

    def step(parts: list[dict[str, Any]]) -> float:
        loaded.model.zero_grad()
        began = time.monotonic()
        for part in parts:
            with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
                loss = token_loss(loaded.model, dict(part), divisor)
            loss.backward()  # type: ignore[no-untyped-call]
        if on_gpu:
            torch.cuda.synchronize()
        return time.monotonic() - began

    family = str(loaded.model.config.model_type)
    where = torch.cuda.get_device_name(0) if on_gpu else this_machine()
    for at_once in given.at_once:
        parts = batches(at_once)
        step(parts)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(step(parts) for _ in range(given.rounds))
        case = f"{family}, {given.rows} rows, {at_once} at once"
        detail = f"peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB" if on_gpu else ""
        append("step", f"{case}: forward and backward", seconds, "s", detail=detail, device=where)
        if given.kernels and on_gpu:
            append(
                "step", f"{case}: of it on the GPU", computing(partial(step, parts), given.kernels), "s", device=where
            )


def computing(run: Callable[[], Any], most: int) -> float:
    """Seconds of GPU time of `run`; the kernels that take most are printed."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        run()
    kernels = [each for each in seen.key_averages() if each.device_type.name == "CUDA"]
    for each in sorted(kernels, key=lambda each: -each.self_device_time_total)[:most]:
        print(f"{each.self_device_time_total / 1e3:9.1f} ms {each.count:6d} times  {each.key[:100]}")
    return float(sum(each.self_device_time_total for each in kernels)) / 1e6


if __name__ == "__main__":
    main()
