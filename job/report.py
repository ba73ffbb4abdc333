"""The report made again from what a job left in its output. Needs the libraries of the page, and neither a GPU nor torch."""

from __future__ import annotations

from typing import Any

from job.errors import DataError, SpecError
from job.evaluate import stored_rows
from job.output import read_json
from job.store import Store

FACTS_KEY, IMAGES, SAMPLES_KEY = "evaluation/report.json", "evaluation/images/", "evaluation/samples.jsonl"
KEPT = ("name", "plan", "lineage", "gate", "occlusion", "data", "privacy", "base", "instruction")
"""The facts that lie in no other file of the output."""


def stored_facts(store: Store) -> dict[str, Any]:
    """All that `evaluate.report.render` takes. Raises DataError where no job came as far as a report."""
    kept = read_json(store, FACTS_KEY)
    if kept is None:
        raise DataError(f"{store.url} holds no {FACTS_KEY}: no job came as far as its report there")
    return kept | {
        "metrics": read_json(store, "evaluation/metrics.json"),
        "before": stored_rows(store, "evaluation/before.jsonl"),
        "after": stored_rows(store, "evaluation/after.jsonl"),
        "samples": stored_rows(store, SAMPLES_KEY),
        "log": stored_rows(store, "logs/metrics.jsonl"),
    }


def rebuild(store: Store) -> str:
    """The page, with the pictures that were kept for it. Raises SpecError where the libraries are not installed."""
    try:
        from job.evaluate.report import render
    except ImportError as error:
        raise SpecError(f"job report needs {error.name}; install the train extra, which brings it") from error
    found = {entry.key.removeprefix(IMAGES).removesuffix(".jpg"): entry.key for entry in store.list(IMAGES)}
    return render(stored_facts(store), {identity: store.read(key) for identity, key in found.items()})
