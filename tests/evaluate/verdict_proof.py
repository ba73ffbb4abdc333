"""How often a verdict is wrong when nothing changed, how often its interval holds the truth, and how often a change is seen.

    python -m tests.evaluate.verdict_proof N

Draws N data sets in each setting: a metric (accuracy, ROUGE-L, loss), 30 or 120 patients, with one row each or with one to five
rows that resemble each other. Before and after are two noisy measurements of the same rows; with an effect, after is better.
Gaps are of two groups that mean nothing, within patients and across them. `make verdict-proof` draws 2,000; a quarter of them
for each figure of power, and four times as many for gaps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from job.evaluate import bootstrap, compare, metric_info
from job.evaluate.records import Change, Settings
from job.evaluate.sums import Floats, Sums, ratio

ALPHA = 0.05
EFFECT = 0.5
"""In standard deviations of a row's noise."""


@dataclass(frozen=True)
class Tally:
    """Shares of the data sets: a verdict where nothing changed, an interval that holds zero, "better" where it is better by
    EFFECT, and where it is better by the change that the report calls noticeable."""

    false: float
    coverage: float
    power: float
    noticed: float


def accuracy(latent: Floats, _: np.random.Generator) -> Sums:
    right = (latent > 0.3).astype(float)
    return Sums(np.stack([right, np.ones(len(right))], axis=-1), np.ones(len(right), bool), ratio, True)


def rouge_l(latent: Floats, _: np.random.Generator) -> Sums:
    score = 1 / (1 + np.exp(1.5 - latent))
    return Sums(np.stack([score, np.ones(len(score))], axis=-1), np.ones(len(score), bool), ratio)


def loss(latent: Floats, draw: np.random.Generator) -> Sums:
    tokens = draw.integers(5, 80, len(latent)).astype(float)
    return Sums(np.stack([np.exp(-0.5 * latent) * tokens, tokens], axis=-1), np.ones(len(latent), bool), ratio)


METRICS: dict[str, Callable[[Floats, np.random.Generator], Sums]] = {
    "finding_accuracy": accuracy,
    "rougeL": rouge_l,
    "loss": loss,
}
SETTINGS = tuple(product(METRICS, (30, 120), (False, True)))


def patients(count: int, several: bool, draw: np.random.Generator) -> NDArray[np.intp]:
    return np.repeat(np.arange(count), draw.integers(1, 6, count) if several else 1)


def measured(metric: str, units: NDArray[np.intp], effect: float, draw: np.random.Generator) -> bootstrap.Pair:
    """Both measurements share each row's difficulty; each patient has a noise of its own in each of them."""
    own = draw.normal(size=len(units)) + draw.normal(size=units.max() + 1)[units]
    seed = int(draw.integers(2**32))
    sides = []
    for shift in (0.0, effect):
        noise = draw.normal(scale=0.5, size=len(units)) + draw.normal(scale=0.5, size=units.max() + 1)[units]
        sides.append(METRICS[metric](own + noise + shift, np.random.default_rng(seed)))
    return bootstrap.pair(*sides)


def changes(metric: str, count: int, several: bool, effect: float, runs: int) -> Iterator[Change]:
    draw = np.random.default_rng([runs, count, several, int(effect * 10), *map(ord, metric)])
    for seed in range(runs):
        units = patients(count, several, draw)
        pair = measured(metric, units, effect, draw)
        yield bootstrap.measure({metric: pair}, units, Settings(400, 1 - ALPHA, seed)).change[metric]


def effect_of(metric: str, size: float) -> float:
    """The effect that changes the metric by `size`, from a large population."""
    effects, units = np.linspace(0, 5, 51), np.arange(20_000)
    pairs = [measured(metric, units, effect, np.random.default_rng(0)) for effect in effects]
    moved = [abs(pair.finish(pair.after.sum(axis=0)) - pair.finish(pair.before.sum(axis=0))) for pair in pairs]
    return float(np.interp(size, moved, effects))


def verdicts(metric: str, count: int, several: bool, runs: int) -> Tally:
    def share(said: str, found: Sequence[Change]) -> float:
        return sum(metric_info.direction(metric, each, 1 - ALPHA) == said for each in found) / len(found)

    null = list(changes(metric, count, several, 0.0, runs))
    held = sum(each.low is not None and each.high is not None and each.low <= 0 <= each.high for each in null)
    size = float(np.mean([metric_info.noticeable(each, 1 - ALPHA) or 0.0 for each in null]))
    power = [
        share("better", list(changes(metric, count, several, effect, max(runs // 4, 1))))
        for effect in (EFFECT, effect_of(metric, size))
    ]
    return Tally(1 - share("no clear change", null), held / runs, *power)


def gaps(within: bool, runs: int) -> float:
    """Share of the data sets whose gap is flagged; groups are of patients, or of the rows of each."""
    draw, flagged = np.random.default_rng([runs, within]), 0
    for seed in range(runs):
        units = patients(60, True, draw)
        pair = measured("rougeL", units, 0.0, draw)
        groups = draw.integers(0, 2, len(units)) if within else draw.integers(0, 2, units.max() + 1)[units]
        gap = compare._gap(pair, units, np.array(["a", "b"])[groups], Settings(400, 1 - ALPHA, seed))
        flagged += bool(gap and compare._flagged({"": {"": gap}}, ALPHA)[""][""].flagged)
    return flagged / runs


def table(runs: int) -> Iterator[str]:
    for metric, count, several in SETTINGS:
        tally = verdicts(metric, count, several, runs)
        rows = "1 to 5 rows each" if several else "one row each"
        yield (
            f"{metric}, {count} patients, {rows}: false {100 * tally.false:.1f} %, coverage {100 * tally.coverage:.1f} %, "
            f"power {100 * tally.power:.0f} %, noticeable changes noticed {100 * tally.noticed:.0f} %"
        )
    for within in (False, True):
        yield f"gap of groups {'within' if within else 'across'} patients: flagged {100 * gaps(within, 4 * runs):.1f} %"


if __name__ == "__main__":
    for line in table(int(sys.argv[1]) if len(sys.argv) > 1 else 2000):
        print(line, flush=True)
