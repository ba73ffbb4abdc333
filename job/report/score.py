"""Scores the stored answers of a run by metrics that need a model, without a GPU job. `job score` shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

from job.config.schema import ExtraMetric
from job.errors import DataError, SpecError
from job.evaluate.compare import compare
from job.evaluate.extra import by_side, model_folders, scored
from job.evaluate.metric_info import needs_model
from job.evaluate.records import Comparison, Settings
from job.output.stored import stored_spec
from job.report.page import fill
from job.report.rebuild import stored_contents
from job.store import Store


def asked_for(arguments: tuple[str, ...]) -> dict[ExtraMetric, str]:
    """Read `METRIC=FOLDER` arguments. Raises SpecError for anything else, or a metric that is not known."""
    found = dict[ExtraMetric, str]()
    for each in arguments:
        metric, given, folder = each.partition("=")
        if not given or not folder or metric not in get_args(ExtraMetric):
            raise SpecError(f"METRIC=FOLDER: {each} is none; METRIC is one of {', '.join(get_args(ExtraMetric))}")
        found[cast(ExtraMetric, metric)] = folder
    return found


def score(store: Store, metrics: Mapping[ExtraMetric, str], scratch: Path) -> Comparison:
    """Return the comparison of the run's answers before and after training by these `metrics`, which map to the folders of their
    models, and its other metrics. Nothing is written to the output.

    Raises DataError if the output holds no answers before and after; SpecError if a model or its package is missing.
    """
    contents, spec = stored_contents(store), stored_spec(store)
    if spec is None or not contents.before or not contents.after:
        raise DataError(f"{store.url} holds no answers before and after training, so there is nothing to score")
    found: dict[ExtraMetric, dict[str, list[Any]]] = {}
    try:
        for each in scored(model_folders(metrics, scratch), [contents.before, contents.after]):
            found |= each
    except SpecError as error:
        raise SpecError(str(error).replace("evaluation.extra_metrics.", "METRIC=FOLDER: ")) from error
    settings = contents.metrics.settings
    return compare(
        contents.before,
        contents.after,
        {},
        (),
        Settings(spec.evaluation.bootstrap_samples, spec.evaluation.confidence, settings.seed),
        by_side(found.values()),
    )


def text(measured: Comparison) -> str:
    """Return the table of the metrics that need a model as Markdown."""
    return fill("score.md", autoescape=False, measured=measured, metrics=[*filter(needs_model, measured.change)])
