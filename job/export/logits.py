"""Computes a model's logits on held-out rows, and the difference between two models' logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from job.config.schema import JobSpec
from job.data import Row
from job.evaluate.generate import answer_logits
from job.model.loaded import Loaded
from job.model.oom_retry import MicroBatches


def spread_rows(rows: Any, most: int, size: int) -> list[list[Row]]:
    """Select at most `most` rows, evenly spread over all of them, in batches of `size`."""
    count = min(len(rows), most)
    chosen = [rows[index * len(rows) // count] for index in range(count)]
    return [chosen[start : start + size] for start in range(0, count, size)]


@dataclass(frozen=True)
class Answers:
    """One row's logits (answer tokens, vocabulary) in the model's dtype on the CPU, and the true tokens."""

    logits: Tensor
    targets: Tensor


@torch.inference_mode()
def answers(loaded: Loaded, batches: list[list[Row]], spec: JobSpec, micro_batches: MicroBatches) -> list[Answers]:
    """Return the model's logits where they predict a token of the true answers, batch by batch."""
    truncate = spec.dataset.over_length == "truncate"

    def say(rows: Sequence[Row]) -> list[Answers]:
        logits, targets, counts = answer_logits(loaded, list(rows), spec.training.max_length, truncate)
        pairs = zip(torch.split(logits.cpu(), counts), torch.split(targets.cpu(), counts), strict=True)
        return [Answers(*pair) for pair in pairs if len(pair[1])]

    return [each for batch in batches for each in micro_batches.map(batch, say)]


def spread(answers: list[Answers]) -> float:
    """Standard deviation of all logits."""
    count = sum(batch.logits.numel() for batch in answers)
    mean = sum(float(batch.logits.sum(dtype=torch.float64)) for batch in answers) / count
    squares = sum(float((batch.logits.float() - mean).square().sum(dtype=torch.float64)) for batch in answers)
    return float((squares / count) ** 0.5)


def logit_difference(one: list[Answers], other: list[Answers]) -> tuple[float, float]:
    """Mean and largest |a − b|, a row at a time: in 32 bits, the differences of all rows would take twice the logits' memory."""
    total, count, largest = 0.0, 0, 0.0
    for a, b in zip(one, other, strict=True):
        gap = (a.logits.float() - b.logits.float()).abs()
        total, count = total + float(gap.sum(dtype=torch.float64)), count + gap.numel()
        largest = max(largest, float(gap.amax()))
    return total / count, largest


def share_along(start: list[Answers], end: list[Answers], found: list[Answers]) -> float | None:
    """Share of the way from `start` to `end` that `found` has gone: ⟨found − start, end − start⟩ / |end − start|². Noise across
    that direction does not count. None if the two are equal."""
    dot = square = 0.0
    for a, b, c in zip(start, end, found, strict=True):
        way = b.logits.float() - a.logits.float()
        dot += float(((c.logits.float() - a.logits.float()) * way).sum(dtype=torch.float64))
        square += float(way.square().sum(dtype=torch.float64))
    return dot / square if square else None


def agreement(one: list[Answers], other: list[Answers], near: float) -> float:
    """Share of tokens at which the first choice of `other` is that of `one`, or within `near` of it by the logits of `one`."""
    lost = [
        a.logits.float().amax(-1) - a.logits.float().gather(-1, b.logits.argmax(-1, keepdim=True)).squeeze(-1)
        for a, b in zip(one, other, strict=True)
    ]
    kept = torch.cat(lost) <= near
    return int(kept.sum()) / len(kept)


def loss(answers: list[Answers]) -> float:
    """Mean cross-entropy of the true tokens, in nats."""
    return sum(_losses(answers)) / sum(len(a.targets) for a in answers)


def loss_error(one: list[Answers], other: list[Answers]) -> float | None:
    """Standard error of the difference between two models' losses on the same rows, as of a ratio of sums over rows (Cochran,
    Sampling Techniques, 1977, equation 2.46); None for one row."""
    tokens, rows = [len(a.targets) for a in one], len(one)
    if rows < 2:
        return None
    gaps = [a - b for a, b in zip(_losses(one), _losses(other), strict=True)]
    mean = sum(gaps) / sum(tokens)
    rest = sum((gap - mean * count) ** 2 for gap, count in zip(gaps, tokens, strict=True))
    return math.sqrt(rest * rows / (rows - 1)) / sum(tokens)


def _losses(answers: list[Answers]) -> list[float]:
    """Each row's summed cross-entropy."""
    return [float(cross_entropy(a.logits.float(), a.targets, reduction="sum")) for a in answers]
