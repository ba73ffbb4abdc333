"""Whose an output is, and how far it got, from the files in it. Needs no torch and none of the training libraries."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import yaml

from job.checkpoint import steps
from job.errors import EXIT_CODES, JobError, NoProgress, Preempted, SpecError
from job.record import STATUS_KEY
from job.spec import JobSpec, differences
from job.specfile import parse, validate
from job.store import Store, open_store

RESULT_KEY, SPEC_KEY, REPORT_KEY = "RESULT.json", "spec.yaml", "report.html"
MADE_OF_MERGED = ("merged/", "merged_4bit/", "merged_fp8/", "merged_int4/", "gguf/")
WORK = ("checkpoints/", "evaluation/", "adapter/", *MADE_OF_MERGED)
OURS = (*WORK, "data/", "logs/")
ATTEMPTS_KEY = "attempts.json"
ANSWERS = ("evaluation/before.", "evaluation/after.")
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
    try:
        stored = stored_spec(store)
    except SpecError:
        if _refuses(store, spec):
            raise
        return True
    if stored is None or stored.digest == spec.digest:
        return False
    if _refuses(store, spec):
        raise SpecError(_conflict(store, spec))
    return True


def _refuses(store: Store, spec: JobSpec) -> bool:
    """Whether the output holds work that the spec does not give up."""
    return spec.output.on_conflict == "refuse" and any(entry.key.startswith(WORK) for entry in store.list())


def begin(store: Store, spec: JobSpec) -> int:
    """Make the output this spec's and return the attempt's number, from 1.

    Raises SpecError when it holds the work of another spec, unless `on_conflict` is restart: then that run is deleted.
    Raises NoProgress when the last attempts all died and left nothing new.
    """
    if check_owner(store, spec):
        store.delete([RESULT_KEY])
        entries = [entry.key for entry in store.list() if entry.key.startswith(OURS) or entry.key in OUR_FILES]
        store.delete([key for key in entries if key.endswith("MANIFEST.json")])
        # All but the other spec, which ours replaces below: killed on the way, the next attempt finds it and goes on.
        store.delete([key for key in entries if key != SPEC_KEY])
    number = count_attempt(store, spec.preemption.max_attempts_without_progress)
    text = f"# sha256 of what decides the result: {spec.digest}\n" + yaml.safe_dump(
        spec.model_dump(mode="json", exclude_unset=False), sort_keys=False, allow_unicode=True
    )
    store.write(SPEC_KEY, text.encode())
    return number


def count_attempt(store: Store, most_deaths: int) -> int:
    """The number of the attempt that begins. Raises NoProgress when the last `most_deaths` left nothing new behind.

    `attempts.json` holds how earlier attempts died since there was progress, taken from the status that they left. To be
    preempted is not to die; an ending that no scheduler tries again (wrong data, say) begins the count anew, since whoever
    runs that again has mended something.
    """
    history = read_json(store, ATTEMPTS_KEY) or {}
    number, done, last = int(history.get("attempts", 0)), progress(store), read_json(store, STATUS_KEY)
    deaths: list[dict[str, Any]] = history.get("deaths", []) if history.get("progress") == done else []
    if last is not None and last.get("attempt") == number:
        died = last.get("state") == "running" or last.get("exit_code") in TRIED_AGAIN
        mended = last.get("state") == "failed" and not died
        deaths = [*deaths, _death(last, done)] if died else [] if mended else deaths
    if len(deaths) >= most_deaths:
        raise NoProgress(
            f"{len(deaths)} attempts died without any progress: {'; '.join(_places(deaths))}; the last reason: "
            f"{deaths[-1]['reason']}. Mend that, then raise preemption.max_attempts_without_progress to go on"
        )
    store.write(ATTEMPTS_KEY, json.dumps({"attempts": number + 1, "progress": done, "deaths": deaths}).encode())
    return number + 1


def progress(store: Store) -> dict[str, int]:
    """What attempts leave for the next one: the newest checkpoint's step, and bytes of answers by file."""
    answers = {entry.key: entry.size for entry in store.list("evaluation/") if entry.key.startswith(ANSWERS)}
    return {"step": max(steps(store), default=0)} | answers


def _death(status: dict[str, Any], done: dict[str, int]) -> dict[str, Any]:
    silent = "it vanished without a word, as a process does that is killed or runs out of host memory"
    reason = status.get("reason", "unknown") if status["state"] == "failed" else silent
    return {"place": f"stage {status.get('stage')}, after the checkpoint of step {done['step']}", "reason": reason}


def _places(deaths: list[dict[str, Any]]) -> list[str]:
    return [f"{count} in {place}" for place, count in Counter(death["place"] for death in deaths).items()]


def stored_spec(store: Store) -> JobSpec | None:
    """The spec of the run that the output holds. Raises SpecError when another version of this program wrote it, with fields
    that are unknown here."""
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


def _conflict(store: Store, spec: JobSpec) -> str:
    stored = stored_spec(store)
    fields = "; ".join(differences(stored, spec)) if stored is not None else "its spec.yaml is gone"
    return (
        f"output.url: {spec.output.url} holds a run of another spec ({fields}). Choose another output, put the fields "
        "back, or set output.on_conflict to restart, which deletes that run"
    )


def open_output(spec: JobSpec) -> Store:
    return open_store(spec.output.url, sse=spec.output.sse, sse_kms_key_id=spec.output.sse_kms_key_id)
