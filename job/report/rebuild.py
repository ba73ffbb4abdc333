"""Rebuilds the report from the files of an output. It needs the libraries that render the page, but no GPU and no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from job import layout
from job.config.schema import JobSpec
from job.errors import DataError, SpecError
from job.evaluate.records import Answer, Comparison, Sample, from_json
from job.evaluate.stage import stored_rows
from job.output.ownership import write_spec
from job.output.stored import NOT_OURS, damaged, read_json
from job.report.contents import Contents, Privacy
from job.store import Missing, OwnedStore, Store


def stored_contents(store: Store) -> Contents:
    """Returns the contents of the report at an output. Raises DataError if no job has written a report there, or a file of it is
    damaged."""
    kept = read_json(store, layout.FACTS_KEY)
    if kept is None:
        raise DataError(f"{store.url} holds no {layout.FACTS_KEY}: no job has written a report there yet")
    try:
        contents = from_json(Contents, kept)
        metrics = from_json(Comparison, read_json(store, layout.METRICS_KEY) or {})
    except NOT_OURS as error:
        raise damaged(store, f"{layout.FACTS_KEY} or {layout.METRICS_KEY}") from error
    return replace(
        contents,
        metrics=metrics,
        before=stored_rows(store, layout.answers_key("before"), Answer),
        after=stored_rows(store, layout.answers_key("after"), Answer),
        samples=stored_rows(store, layout.SAMPLES_KEY, Sample),
        log=stored_rows(store, layout.NUMBERS_KEY, dict),
    )


def rebuild(store: Store) -> str:
    """Returns the page with its stored images. Raises SpecError if the libraries that render it are not installed."""
    keys = [entry.key for entry in store.list(layout.IMAGES)]
    images = {key.removeprefix(layout.IMAGES).removesuffix(".jpg"): store.read(key) for key in keys}
    return _page(stored_contents(store), images)


def _page(contents: Contents, images: dict[str, bytes]) -> str:
    try:
        from job.report.page import render
    except ImportError as error:
        raise SpecError(f"job report needs {error.name}; install the train extra, which includes it") from error
    return render(contents, images)


SHOWN, WITHHELD = (f"Held-out images and texts {are} in the run's report." for are in ("are", "are not"))
"""What a model card says about the report. `withdraw_rows` replaces the first sentence with the second."""


def shows_rows(store: Store) -> bool:
    """Returns whether the report at an output shows images and texts of rows."""
    return bool(((read_json(store, layout.FACTS_KEY) or {}).get("privacy") or {}).get("report_images"))


def withdraw_rows(store: OwnedStore, spec: JobSpec) -> None:
    """Removes images and texts of rows from a published output, and corrects what its files say about them. Files that the job
    did not write are left alone. If the job is killed meanwhile, its next start does this again, because
    `evaluation/report.json`, which marks it as done, is written last."""
    kept = (read_json(store, layout.FACTS_KEY) or {}) | {"privacy": {"report_images": False}, "occlusion": {}}
    store.delete([entry.key for entry in store.list(layout.IMAGES)])
    contents = replace(stored_contents(store), privacy=Privacy(report_images=False), occlusion={})
    store.write(layout.REPORT_KEY, _page(contents, {}).encode())
    try:
        last = store.read(layout.EXAMPLE_KEY).decode().splitlines()[-1].partition(" (text")[0]
        store.write(layout.EXAMPLE_KEY, f"{last} (text not shown: privacy.report_images is false)".encode())
    except Missing:
        pass
    result = read_json(store, layout.RESULT_KEY) or {}
    for key in [key for key in result.get("files", {}) if key.endswith("/README.md")]:
        card = store.read(key).replace(SHOWN.encode(), WITHHELD.encode())
        store.write(key, card)
        result["files"][key] = {"size": len(card), "sha256": hashlib.sha256(card).hexdigest()}
    store.write(layout.RESULT_KEY, json.dumps(result | {"result_digest": spec.result_digest}, indent=1).encode())
    write_spec(store, spec)
    store.write(layout.FACTS_KEY, json.dumps(kept, indent=1).encode())
