"""Compares runs by their answers to the same held-out rows. `job compare` shows it, as text or as one page.

The statistics are those of a run's own before and after, with the first run in the place of "before". With several others, each
interval and each test is at the level that holds for all of them together (Bonferroni).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from job.config.rules import differences
from job.config.schema import JobSpec, LabelSpec
from job.errors import DataError, SpecError
from job.evaluate import metric_info
from job.evaluate.compare import compare
from job.evaluate.examples import labels_read, rouge_l
from job.evaluate.records import Answer, Comparison, Settings
from job.evaluate.verdict import chosen_metric
from job.layout import FACTS_KEY, SPEC_KEY
from job.output.describe import jobs_below
from job.output.stored import read_json, stored_spec
from job.report import gallery
from job.report.conclusion import doubts, moved
from job.report.contents import Contents
from job.report.page import fill
from job.report.rebuild import stored_contents
from job.store import Store

log = logging.getLogger("job")

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_SAMPLES = 8
SAID = {
    "better": "{b} is better than {a}",
    "worse": "{b} is worse than {a}",
    "changed": "{b} differs from {a}",
    "unchanged": "{b} scores as {a} in every sample",
    "no clear change": "No clear difference of {b} from {a}",
    "unproven": "{b} is not shown to be better than {a}",
}


@dataclass(frozen=True)
class Run:
    """A run under the letter that stands for it, and what its output holds."""

    letter: str
    url: str
    spec: JobSpec
    contents: Contents

    @property
    def title(self) -> str:
        return f"{self.letter}: {self.contents.name or self.url}"


@dataclass(frozen=True)
class Beside:
    """A run beside the first one: the fields of its spec that differ and decide the training, its answers compared with the first
    one's, and the outcome in one sentence."""

    run: Run
    fields: list[str]
    measured: Comparison
    said: str


@dataclass(frozen=True)
class Runs:
    """The first run, the others beside it, and the samples in which they differ most, in the form that the template reads; no
    samples if a run keeps those of its report private."""

    first: Run
    others: list[Beside]
    samples: list[dict[str, Any]]


def compare_runs(stores: Sequence[Store], metric: str | None = None) -> Runs:
    """Read two or more outputs and compare each with the first one.

    The verdict is about `metric`, by default the first run's primary metric. Raises SpecError for a metric that was not measured,
    too few or too many outputs, or one that is named twice; DataError for an output without a report or answers, and for runs
    that held out different rows.
    """
    urls = [store.url for store in stores]
    if not 2 <= len(stores) <= len(LETTERS) or len({*urls}) < len(urls):
        raise SpecError(f"OUTPUT: name between two and {len(LETTERS)} different outputs")
    first, *rest = [_read(letter, store) for letter, store in zip(LETTERS, stores, strict=False)]
    others = [_beside(first, run, len(rest), metric) for run in rest]
    private = not all(run.contents.privacy.report_images for run in (first, *rest))
    return Runs(first, others, [] if private else _samples([first, *rest], labels_read(others[0].measured)))


def finished_below(store: Store) -> list[Store]:
    """Return the outputs below a folder or prefix, as of a sweep, that can be compared; a log line names the others.

    Raises DataError if there is no job.
    """
    found = jobs_below(store)
    without = [place for place, output in found.items() if read_json(output, FACTS_KEY) is None]
    if without:
        log.warning("left out, for there is no report yet: %s", ", ".join(without))
    return [output for place, output in found.items() if place not in without]


def _read(letter: str, store: Store) -> Run:
    contents, spec = stored_contents(store), stored_spec(store)
    if not contents.after or spec is None:
        what = SPEC_KEY if spec is None else "answers to held-out rows"
        raise DataError(f"{store.url} holds no {what}, so there is nothing to compare")
    return Run(letter, store.url, spec, contents)


def _beside(first: Run, run: Run, count: int, metric: str | None) -> Beside:
    rows, asked = _same_rows(first, run), first.spec.evaluation
    settings = Settings(asked.bootstrap_samples, 1 - (1 - asked.confidence) / count, first.spec.training.seed)
    labels = {name: _as_read(name, label, first.contents.metrics) for name, label in asked.labels.items()}
    wanted = chosen_metric(metric or asked.primary_metric, list(labels))
    measured = compare(first.contents.after, rows, labels, (), settings, metric=wanted)
    if wanted not in measured.change:
        there = ", ".join(measured.change)
        raise SpecError(f"--metric: {wanted} was not measured in these runs; choose one of {there}")
    return Beside(run, differences(first.spec, run.spec), measured, _said(first.letter, run.letter, measured))


def _same_rows(first: Run, run: Run) -> list[Answer]:
    """Return the answers of `run`, with labels and units as the first run has them."""
    ours, theirs = first.contents, run.contents
    digests = {each.lineage.held_out_sha256 for each in (ours, theirs)} - {None}
    if len(digests) > 1 or [(row.id, row.reference) for row in ours.after] != [
        (row.id, row.reference) for row in theirs.after
    ]:
        raise DataError(
            f"{run.url} was measured on other held-out rows than {first.url}; compare runs of the same data that hold out the "
            "same rows (dataset.eval_path, or the same dataset.eval_rows and training.seed)"
        )
    return [
        replace(row, labels=same.labels, groups=same.groups, unit=same.unit)
        for row, same in zip(theirs.after, ours.after, strict=True)
    ]


def _as_read(name: str, label: LabelSpec, measured: Comparison) -> LabelSpec:
    """Return a label with the values that the run found in its data, where its spec names none."""
    known = measured.labels.get(name)
    return label if label.pattern or known is None else label.model_copy(update={"values": known.values})


def _said(a: str, b: str, measured: Comparison) -> str:
    verdict = measured.verdict
    if verdict.said not in SAID:
        return metric_info.too_few(measured) or "Nothing was judged."
    title = metric_info.about(verdict.metric).title
    text = f"{SAID[verdict.said].format(a=a, b=b)}: {title} {moved(measured)}"
    return f"{text}; {doubts(measured)}." if verdict.doubts else f"{text}."


def _samples(runs: Sequence[Run], labels: dict[str, LabelSpec]) -> list[dict[str, Any]]:
    """Return the rows whose ROUGE-L differs most between runs."""
    scores = np.stack([rouge_l(run.contents.after) for run in runs])
    apart = np.ptp(scores, axis=0)
    order = [index for index in np.argsort(-apart, kind="stable").tolist() if apart[index] > 0]
    found = []
    for index in order[:MOST_SAMPLES]:
        rows = [run.contents.after[index] for run in runs]
        said = [gallery.answer(run.letter, row, labels) for run, row in zip(runs, rows, strict=True)]
        found.append({"id": rows[0].id, "reference": rows[0].reference, "answers": said})
    return found


def page(runs: Runs) -> str:
    """Return one HTML page, under the same rules as a run's own report."""
    return fill("compare_runs.html", autoescape=True, runs=runs)


def text(runs: Runs) -> str:
    """Return the comparison as Markdown, without texts of rows."""
    return fill("compare_runs.md", autoescape=False, runs=runs)
