"""The measurement before and after, kept row by row in the output."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterable
from typing import Any

from job.attempt import Attempt
from job.data import Data
from job.errors import JobError, Preempted
from job.model import Loaded
from job.record import watched
from job.spec import JobSpec
from job.store import Store

log = logging.getLogger("job")

Rows = list[dict[str, Any]]

KEEP_SECONDS = 15.0
"""Between writes of the answers so far; a notice writes them at once."""


def measure(attempt: Attempt, loaded: Loaded, data: Data, when: str) -> Rows:
    """Generations `before` or `after`, from the output if they are there, else made now and kept there.

    Asked to stop, what is finished is kept as `evaluation/<when>.partial.jsonl` and the next attempt goes on from it.
    """
    from job.evaluate.generate import generations

    if not len(data.evaluation):
        return []
    spec, store, record, preemption = attempt.spec, attempt.store, attempt.record, attempt.preemption
    key, partial = f"evaluation/{when}.jsonl", f"evaluation/{when}.partial.jsonl"
    finished = stored_rows(store, key)
    if finished:
        return finished
    preemption.check()
    with record.stage(f"evaluate {when}") as facts:
        made = stored_rows(store, partial)
        kept = time.monotonic()
        show = _progress(f"evaluate {when}", len(data.evaluation), len(made))

        def each(batch: Rows) -> None:
            made.extend(batch)
            show(len(made))
            record.update(rows=len(made), of_rows=len(data.evaluation))
            nonlocal kept
            if preemption.requested or time.monotonic() > kept + KEEP_SECONDS:
                store.write(partial, jsonl(made))
                kept = time.monotonic()
                preemption.check()

        rows = generations(loaded, data.evaluation, spec, tuned=when == "after", known=list(made), each=each)
        store.write(key, jsonl(rows))
        store.delete([partial])
        facts.append(f"{len(rows)} rows")
    return rows


def metrics(spec: JobSpec, data: Data, before: Rows, after: Rows) -> dict[str, Any]:
    """What `evaluation/metrics.json` holds."""
    from job.evaluate.statistics import compare

    labels = {
        name: label if label.pattern else label.model_copy(update={"values": data.label_values[name]})
        for name, label in spec.evaluation.labels.items()
    }
    return compare(
        before,
        after,
        labels,
        spec.evaluation.groups,
        bootstrap_samples=spec.evaluation.bootstrap_samples,
        confidence=spec.evaluation.confidence,
        seed=spec.training.seed,
    )


def pictures(rows: Any, ids: Iterable[str], longest_side: int = 384) -> dict[str, bytes]:
    """PNG files of held-out rows for the report, by id: the first picture of each that has one."""
    from job.evaluate.generate import rows_ids

    places = {identity: place for place, identity in enumerate(rows_ids(rows))}
    found = {}
    for identity in dict.fromkeys(ids):
        images = rows[places[identity]]["images"]
        if not images:
            continue
        image = images[0]
        image.thumbnail((longest_side, longest_side))
        stream = io.BytesIO()
        image.save(stream, "PNG", optimize=True)
        found[identity] = stream.getvalue()
    return found


def stored_rows(store: Store, key: str) -> Rows:
    """Rows of an earlier attempt; none when they are not there."""
    try:
        lines = store.read(key).decode().splitlines()
    except Preempted:
        raise
    except JobError:
        return []
    return [json.loads(line) for line in lines]


def jsonl(rows: Rows) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def _progress(title: str, total: int, done: int) -> Any:
    """A bar where a terminal watches, else a line a quarter."""
    if watched():
        from tqdm import tqdm

        bar = tqdm(total=total, initial=done, desc=title, unit="row")

        def advance(count: int) -> None:
            bar.update(count - bar.n)
            if count >= total:
                bar.close()

        return advance
    told = done * 4 // total

    def tell(count: int) -> None:
        nonlocal told
        if count * 4 // total > told and count < total:
            told = count * 4 // total
            log.info("%s: %d of %d rows", title, count, total)

    return tell
