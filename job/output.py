"""Whose an output is, and how far it got, from the files in it. Needs no torch and none of the training libraries."""

from __future__ import annotations

import json
from typing import Any

import yaml

from job.errors import JobError, Preempted, SpecError
from job.record import STATUS_KEY
from job.spec import JobSpec, differences
from job.specfile import parse, validate
from job.store import Store, open_store

RESULT_KEY, SPEC_KEY, REPORT_KEY = "RESULT.json", "spec.yaml", "report.html"
OURS = ("checkpoints/", "evaluation/", "adapter/", "merged/", "data/", "logs/")
OUR_FILES = (RESULT_KEY, REPORT_KEY, STATUS_KEY, SPEC_KEY)


def read_json(store: Store, key: str) -> dict[str, Any] | None:
    """An object of the output, None when it is not there (or is not JSON, which only another's hand can cause)."""
    try:
        tree = json.loads(store.read(key))
    except Preempted:
        raise
    except (JobError, ValueError) as error:
        if isinstance(error, ValueError) or error.exit_code == 65:
            return None
        raise
    return tree if isinstance(tree, dict) else None


def is_published(store: Store, spec: JobSpec) -> bool:
    """Whether this very job ended well here. Raises SpecError when another one did and the spec says refuse."""
    result = read_json(store, RESULT_KEY)
    if result is None:
        return False
    if result.get("spec_digest") == spec.digest:
        return True
    if spec.output.on_conflict == "refuse":
        raise SpecError(_conflict(store, spec))
    return False


def check_owner(store: Store, spec: JobSpec) -> bool:
    """Whether the output holds a run of another spec, to be deleted. Raises SpecError when the spec does not say so."""
    stored = stored_spec(store)
    if stored is None or stored.digest == spec.digest:
        return False
    if spec.output.on_conflict == "refuse":
        raise SpecError(_conflict(store, spec))
    return True


def begin(store: Store, spec: JobSpec) -> int:
    """Make the output this spec's and return the attempt's number, from 1.

    Raises SpecError when it holds a run of another spec, unless `on_conflict` is restart: then that run is deleted.
    """
    if check_owner(store, spec):
        store.delete([RESULT_KEY])
        entries = [entry.key for entry in store.list() if entry.key.startswith(OURS) or entry.key in OUR_FILES]
        store.delete(sorted(entries, key=lambda key: not key.endswith("MANIFEST.json")))
    last = read_json(store, STATUS_KEY) or {}
    text = f"# sha256 of what decides the result: {spec.digest}\n" + yaml.safe_dump(
        spec.model_dump(mode="json", exclude_unset=False), sort_keys=False, allow_unicode=True
    )
    store.write(SPEC_KEY, text.encode())
    return int(last.get("attempt", 0)) + 1


def stored_spec(store: Store) -> JobSpec | None:
    """The spec of the run that the output holds."""
    try:
        text = store.read(SPEC_KEY).decode()
    except Preempted:
        raise
    except JobError as error:
        if error.exit_code == 65:
            return None
        raise
    tree = parse(text)
    if tree.get("dataset", {}).get("eval_path") or tree.get("dataset", {}).get("eval_split"):
        tree["dataset"].pop("eval_fraction", None)  # a default written out, not a choice
    return validate(tree)


def _conflict(store: Store, spec: JobSpec) -> str:
    stored = stored_spec(store)
    fields = "; ".join(differences(stored, spec)) if stored is not None else "its spec.yaml is gone"
    return (
        f"output.url: {spec.output.url} holds a run of another spec ({fields}). Choose another output, put the fields "
        "back, or set output.on_conflict to restart, which deletes that run"
    )


def open_output(spec: JobSpec) -> Store:
    return open_store(spec.output.url, sse=spec.output.sse, sse_kms_key_id=spec.output.sse_kms_key_id)
