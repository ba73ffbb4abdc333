"""Cuts a micro-batch into parts of rows of like length, so that short rows are not padded to the longest one."""

from __future__ import annotations

from collections.abc import Sequence

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
