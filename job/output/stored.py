"""Reads the JSON, the spec and the result that jobs left in an output. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from job.config.loader import validate
from job.config.parsing import parse
from job.config.schema import ANSWERS, JobSpec
from job.errors import DataError, JobError, Preempted, SpecError
from job.layout import RESULT_KEY, SPEC_KEY
from job.output.identity import Identity
from job.store import OwnedStore, Store, open_store

NOT_OURS = (ValueError, TypeError, LookupError, AttributeError)
"""What reading the JSON of a job raises if it was cut or edited."""


def damaged(store: Store, key: str) -> DataError:
    return DataError(f"{store.url}: {key} is not as a job wrote it; copy the output again, or put the file back")


def open_output(spec: JobSpec) -> OwnedStore:
    return OwnedStore(open_store(spec.output.url, sse=spec.output.sse, sse_kms_key_id=spec.output.sse_kms_key_id))


def read_json(store: Store, key: str) -> dict[str, Any] | None:
    """Read an object of the output; None if it is missing (or is not JSON, which only another program can cause)."""
    try:
        tree = json.loads(store.read(key))
    except Preempted:
        raise
    except (JobError, ValueError) as error:
        if isinstance(error, ValueError) or error.exit_code == 65:
            return None
        raise
    return tree if isinstance(tree, dict) else None


def run_of(spec: JobSpec, rows: Identity | None) -> str:
    """Return the run that answers belong to, and carry: a digest of everything that decides them, including the rows. All
    attempts are of one run, whatever their lease's token."""
    asked = [getattr(spec.evaluation, field) for field in ANSWERS]
    return hashlib.sha256(json.dumps([spec.digest, asked, rows.digest if rows else None]).encode()).hexdigest()[:32]


def own_json(store: Store, key: str, run: str) -> dict[str, Any]:
    """Read what attempts at this run keep there; empty if a late writer of another run replaced it."""
    tree = read_json(store, key) or {}
    return tree if tree.pop("run", None) == run else {}


def stored_spec(store: Store) -> JobSpec | None:
    """Read the spec of the run in the output. Raises SpecError if another version of this program wrote it, with fields that
    are unknown here."""
    try:
        text = store.read(SPEC_KEY).decode()
    except Preempted:
        raise
    except JobError as error:
        if error.exit_code == 65:
            return None
        raise
    try:
        return validate(parse(text))
    except SpecError as error:
        problems = "; ".join(line.removeprefix("  - ") for line in str(error).splitlines()[1:])
        raise SpecError(
            f"output.url: {store.url} holds a run of another version of this program, whose spec.yaml does not fit this one "
            f"({problems}). Choose another output, run that version, or set output.on_conflict to restart, which deletes that run"
        ) from error


def read_published(store: Store, output: str) -> tuple[dict[str, Any], JobSpec]:
    """Return RESULT.json and the spec of the model published at `output`. Raises DataError if there is none."""
    result, spec = read_json(store, RESULT_KEY), stored_spec(store)
    if result is None or spec is None or not isinstance(result.get("files"), dict):
        raise DataError(f"{output} holds no published model: {RESULT_KEY} is missing or names no files")
    return result, spec


def published_folders(result: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Return which of these folders RESULT.json lists files of."""
    return [name for name in names if any(key.startswith(f"{name}/") for key in result["files"])]
