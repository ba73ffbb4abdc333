"""Cuts a micro-batch into parts of rows of like length, so that short rows are not padded to the longest one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from job.model.families import Layout
from job.model.image_layout import Uncuttable, cut, without_padding

PASS_TOKENS = 512
"""What one more forward and backward pass costs beside its tokens, in tokens: about 0.1 s of launches, where Qwen3-VL 8B takes
0.24 ms a token on an H200 (benchmarks/RESULTS.md, whole job: 0.76 s for eight rows of 400 tokens)."""


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


def unpadded_parts(inputs: dict[str, Any], layout: Layout | None, image_token: int | None) -> list[dict[str, Any]]:
    """Cut a batch of `NumberedRows` into the parts that `of_like_length` chooses, each padded to its own longest row; whole where
    one part is best, or where its images cannot be told apart."""
    parts = of_like_length(inputs["attention_mask"].sum(dim=1).tolist())
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
