"""Cuts a micro-batch into parts of rows of like length, so that short rows are not padded to the longest one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from job.model.families import Layout
from job.model.image_layout import Uncuttable, cut, without_padding

PASS_TOKENS = 768
"""What one more forward and backward pass costs beside its tokens, in tokens, on an RTX A6000 and on a CPU. Launching the
kernels of Qwen3-VL 8B takes 0.6 to 0.9 s, in which an H200 computes 3,000 to 5,000 tokens and an A6000 a sixth of them. On an
H200 eight rows took 1.54 s in one pass of 8,544 tokens, and 1.71 s in two of 5,232 (benchmarks/mixed_lengths.py)."""
OF_A_CYCLE = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192, (10, 3): 8192}
"""Dense bf16 operations of a multiprocessor in a clock cycle, by compute capability, from NVIDIA's architecture papers; 1024 in
all others since 8.6."""
OF_AN_A6000 = 84 * 1024


def pass_tokens(device: torch.device) -> int:
    """Return what a pass costs on `device`, in tokens. It depends on the kind of GPU alone: a resumed run cuts as before."""
    if device.type != "cuda":
        return PASS_TOKENS
    found = torch.cuda.get_device_properties(device)
    return _scaled(found.multi_processor_count, (found.major, found.minor))


def _scaled(multiprocessors: int, capability: tuple[int, int]) -> int:
    return round(PASS_TOKENS * multiprocessors * OF_A_CYCLE.get(capability, 1024) / OF_AN_A6000)


def of_like_length(lengths: Sequence[int], cost: int = PASS_TOKENS) -> list[list[int]]:
    """Return the rows of each part, such that padded tokens plus `cost` for each part are fewest: rows of neighbouring lengths
    belong together. All rows in their order where one part is best."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    best = [(0, 0)]  # of the first n rows in order: tokens, and where the last part begins
    for stop in range(1, len(order) + 1):
        longest = lengths[order[stop - 1]]
        best.append(min((best[start][0] + (stop - start) * longest + cost, start) for start in range(stop)))
    parts, stop = list[list[int]](), len(order)
    while stop:
        start = best[stop][1]
        parts.append(order[start:stop])
        stop = start
    return parts if len(parts) > 1 else [[*range(len(lengths))]]


def unpadded_parts(
    inputs: dict[str, Any], layout: Layout | None, image_token: int | None, cost: int
) -> list[dict[str, Any]]:
    """Cut a batch of `NumberedRows` into the parts that `of_like_length` chooses, each padded to its own longest row; whole where
    one part is best, or where its images cannot be told apart."""
    parts = of_like_length(inputs["attention_mask"].sum(dim=1).tolist(), cost)
    if len(parts) == 1:
        return [inputs]
    counts, keys = inputs["pictures"], inputs["picture_keys"]
    tensors = {name: each for name, each in inputs.items() if name not in ("pictures", "picture_keys")}
    ends = [0, *accumulate(counts)]
    try:
        return [
            without_padding(cut(tensors, layout, counts, rows, image_token))
            | {"pictures": [counts[row] for row in rows]}
            | {"picture_keys": [key for row in rows for key in keys[ends[row] : ends[row + 1]]]}
            for rows in parts
        ]
    except Uncuttable:
        return [inputs]
