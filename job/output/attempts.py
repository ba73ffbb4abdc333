"""Counts the attempts at an output, and refuses another when the last ones all died without any progress."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from job.checkpoint import steps
from job.errors import EXIT_CODES, NoProgress
from job.layout import ANSWER_KEYS, ATTEMPTS_KEY, EVALUATION, STATUS_KEY
from job.output.stored import read_json
from job.runtime.status import bytes_text
from job.store import Store

NEARLY_ALL = 0.85
"""Share of host memory in use when a process was last seen, above which lack of memory is the likely reason for its end."""
TRIED_AGAIN = {row.code for row in EXIT_CODES if row.kubernetes == "Count"}


def count_attempt(store: Store, most_deaths: int) -> int:
    """Return the number of this attempt. Raises NoProgress if the last `most_deaths` attempts left nothing new.

    `attempts.json` records how earlier attempts died since there was progress, according to the status that they left. A
    preemption is not a death. An ending that no scheduler retries (wrong data, for example) resets the count, since whoever runs
    the job again has fixed something.
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
            f"{deaths[-1]['reason']}. Fix that, then raise preemption.max_attempts_without_progress to continue"
        )
    store.write(ATTEMPTS_KEY, json.dumps({"attempts": number + 1, "progress": done, "deaths": deaths}).encode())
    return number + 1


def progress(store: Store) -> dict[str, int]:
    """What attempts leave for the next one: the newest checkpoint's step, and bytes of answers by file."""
    answers = {entry.key: entry.size for entry in store.list(EVALUATION) if entry.key.startswith(ANSWER_KEYS)}
    return {"step": max(steps(store), default=0)} | answers


def _death(status: dict[str, Any], done: dict[str, int]) -> dict[str, Any]:
    silent = "it was killed, or its machine was lost"
    used, limit = status.get("host_used", 0), status.get("host_limit", 0)
    if used > NEARLY_ALL * limit:
        silent = f"it was killed when {bytes_text(used)} of {bytes_text(limit)} of host memory were in use; give the job more"
    reason = status.get("reason", "unknown") if status["state"] == "failed" else silent
    return {"place": f"stage {status.get('stage')}, after the checkpoint of step {done['step']}", "reason": reason}


def _places(deaths: list[dict[str, Any]]) -> list[str]:
    return [f"{count} in {place}" for place, count in Counter(death["place"] for death in deaths).items()]
