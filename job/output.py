"""Whose an output is, and how far it got, from the files in it. Needs no torch and none of the training libraries."""

from __future__ import annotations

import json
from typing import Any

import yaml

from job.checkpoint import steps
from job.errors import EXIT_CODES, JobError, NoProgress, Preempted, SpecError
from job.record import STATUS_KEY
from job.spec import JobSpec, differences
from job.specfile import parse, validate
from job.store import Store, open_store

RESULT_KEY, SPEC_KEY, REPORT_KEY = "RESULT.json", "spec.yaml", "report.html"
MADE_OF_MERGED = ("merged/", "merged_4bit/", "merged_fp8/", "gguf/")
WORK = ("checkpoints/", "evaluation/", "adapter/", *MADE_OF_MERGED)
OURS = (*WORK, "data/", "logs/")
ATTEMPTS_KEY = "attempts.json"
TRIED_AGAIN = {row.code for row in EXIT_CODES if row.kubernetes == "Count"}
OUR_FILES = (RESULT_KEY, REPORT_KEY, STATUS_KEY, SPEC_KEY, ATTEMPTS_KEY)


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
    """Whether the output holds a run of another spec, to be deleted. Raises SpecError when the spec does not say so, unless
    that run came to nothing: its spec was wrong, say, and has been mended."""
    stored = stored_spec(store)
    if stored is None or stored.digest == spec.digest:
        return False
    if spec.output.on_conflict == "refuse" and any(entry.key.startswith(WORK) for entry in store.list()):
        raise SpecError(_conflict(store, spec))
    return True


def begin(store: Store, spec: JobSpec) -> int:
    """Make the output this spec's and return the attempt's number, from 1.

    Raises SpecError when it holds the work of another spec, unless `on_conflict` is restart: then that run is deleted.
    Raises NoProgress when the last attempts all died at the same place.
    """
    if check_owner(store, spec):
        store.delete([RESULT_KEY])
        entries = [entry.key for entry in store.list() if entry.key.startswith(OURS) or entry.key in OUR_FILES]
        store.delete(sorted(entries, key=lambda key: not key.endswith("MANIFEST.json")))
    number = count_attempt(store, spec.preemption.max_attempts_without_progress)
    text = f"# sha256 of what decides the result: {spec.digest}\n" + yaml.safe_dump(
        spec.model_dump(mode="json", exclude_unset=False), sort_keys=False, allow_unicode=True
    )
    store.write(SPEC_KEY, text.encode())
    return number


def count_attempt(store: Store, most_deaths: int) -> int:
    """The number of the attempt that begins. Raises NoProgress when the last `most_deaths` died at the same place.

    `attempts.json` holds how earlier attempts died, taken from the status that they left. To be preempted is not to
    die, nor is an ending that no scheduler tries again (wrong data, say): whoever runs that again has mended something.
    """
    history = read_json(store, ATTEMPTS_KEY) or {"attempts": 0, "deaths": []}
    deaths: list[dict[str, Any]] = history["deaths"]
    last = read_json(store, STATUS_KEY)
    if last is not None and last.get("attempt") == history["attempts"]:
        died = last.get("state") == "running" or last.get("exit_code") in TRIED_AGAIN
        deaths = [*deaths, _death(store, last)] if died else []
    deaths = [death for death in deaths if death["place"] == deaths[-1]["place"]]
    if len(deaths) >= most_deaths:
        raise NoProgress(
            f"{len(deaths)} attempts in a row died at the same place: {deaths[-1]['place']}; the last reason: "
            f"{deaths[-1]['reason']}. Mend that, then raise preemption.max_attempts_without_progress to go on"
        )
    number = int(history["attempts"]) + 1
    store.write(ATTEMPTS_KEY, json.dumps({"attempts": number, "deaths": deaths}).encode())
    return number


def _death(store: Store, status: dict[str, Any]) -> dict[str, Any]:
    saved = max(steps(store), default=0)
    silent = "it vanished without a word, as a process does that is killed or runs out of host memory"
    reason = status.get("reason", "unknown") if status["state"] == "failed" else silent
    return {"place": f"stage {status.get('stage')}, after the checkpoint of step {saved}", "reason": reason}


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
    return validate(parse(text))


def _conflict(store: Store, spec: JobSpec) -> str:
    stored = stored_spec(store)
    fields = "; ".join(differences(stored, spec)) if stored is not None else "its spec.yaml is gone"
    return (
        f"output.url: {spec.output.url} holds a run of another spec ({fields}). Choose another output, put the fields "
        "back, or set output.on_conflict to restart, which deletes that run"
    )


def open_output(spec: JobSpec) -> Store:
    return open_store(spec.output.url, sse=spec.output.sse, sse_kms_key_id=spec.output.sse_kms_key_id)
