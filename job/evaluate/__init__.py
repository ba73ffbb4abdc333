"""The measurement before and after, kept row by row in the output."""

from __future__ import annotations

import io
import json
import logging
import platform
import time
from collections.abc import Iterable, Sequence
from typing import Any

from job.attempt import Attempt
from job.data import Data
from job.errors import Preempted
from job.model import Loaded
from job.output import read_json
from job.record import watched
from job.spec import JobSpec
from job.store import Missing, Store

log = logging.getLogger("job")

Rows = list[dict[str, Any]]

OCCLUSION_KEY = "evaluation/occlusion.json"
KEEP_SECONDS = 15.0
"""Between writes of the answers so far; a notice writes them at once."""


def measure(attempt: Attempt, loaded: Loaded, data: Data, when: str) -> Rows:
    """Generations `before` or `after`, from the output if they are there, else made now and kept there.

    Asked to stop, what is finished is kept as `evaluation/<when>.partial.jsonl` and the next attempt goes on from it.
    """
    from job.evaluate import before

    if not len(data.evaluation):
        return []
    spec, store, record, preemption = attempt.spec, attempt.store, attempt.record, attempt.preemption
    key, partial = f"evaluation/{when}.jsonl", f"evaluation/{when}.partial.jsonl"
    finished = stored_rows(store, key)
    if finished:
        return finished
    preemption.check()
    with record.stage(f"evaluate {when}") as facts:
        with preemption.leave_at_once():
            held = before.held(data.evaluation)
            places = before.places(attempt) if when == "before" else []
            name = before.key(spec, loaded, held, _device(loaded)) if places else ""
            rows, where = before.recall(places, name, held)
        if not rows:
            rows = _made(attempt, loaded, data, when, before.longest_first(held))
            before.keep(places, name, held, rows)
        store.write(key, jsonl(rows))
        store.delete([partial])
        facts.append(f"{len(rows)} rows" + (f", which {where} has from an earlier run" if where else ""))
    return rows


def _made(attempt: Attempt, loaded: Loaded, data: Data, when: str, order: Sequence[int]) -> Rows:
    """Generations made now, but for those that an earlier attempt finished. Leaves when asked to, keeping what is finished."""
    from job.evaluate.generate import generations

    store, record, preemption = attempt.store, attempt.record, attempt.preemption
    partial = f"evaluation/{when}.partial.jsonl"
    made = stored_rows(store, partial)
    kept = time.monotonic()
    show = _progress(f"evaluate {when}", len(data.evaluation), len(made))

    def each(batch: Rows) -> None:
        made.extend(batch)
        show(len(made))
        record.update(rows=len(made), of_rows=len(data.evaluation))
        nonlocal kept
        preemption.check()
        if time.monotonic() > kept + KEEP_SECONDS:
            store.write(partial, jsonl(made))
            kept = time.monotonic()

    known, tuned, ranks = list(made), when == "after", attempt.ranks
    try:
        return generations(
            loaded, data.evaluation, attempt.spec, tuned=tuned, order=order, known=known, each=each, ranks=ranks
        )
    except Preempted:
        store.write(partial, jsonl(made))
        raise


def answer_for(attempt: Attempt, loaded: Loaded, data: Data, tuned: bool, batches: Sequence[Sequence[int]]) -> None:
    """Do a share of what rank 0 measures."""
    from job.evaluate.generate import answers

    for _ in answers(loaded, data.evaluation, attempt.spec, tuned, batches, attempt.ranks):
        pass


def _device(loaded: Loaded) -> str:
    """The card by name: another one rounds otherwise."""
    import torch

    return torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else platform.machine()


def judge(spec: JobSpec, data: Data, before: Rows, after: Rows) -> tuple[dict[str, Any] | None, list[str]]:
    """What was measured, None without held-out rows; and why the tuned model must not be published, one sentence each."""
    from job.evaluate.requirements import unmet

    measured = metrics(spec, data, before, after) if after else None
    return measured, unmet(spec.evaluation.require, measured)


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


def looked_at(
    attempt: Attempt, loaded: Loaded, data: Data, measured: dict[str, Any] | None, before: Rows, after: Rows
) -> dict[str, Any]:
    """Occlusion maps of a few rows of the gallery, by id: from the output if they are there. Asked to stop, it leaves."""
    from job.evaluate import gallery
    from job.evaluate.generate import rows_ids
    from job.evaluate.occlusion import explain

    spec, store = attempt.spec, attempt.store
    count = spec.evaluation.explained_rows if spec.privacy.report_images and after else 0
    if not count:
        return {}
    stored: dict[str, Any] = read_json(store, OCCLUSION_KEY) or {}
    chosen = gallery.chosen({"metrics": measured, "before": before, "after": after})
    ranks = [places[rank] for rank in range(gallery.EACH) for places in chosen.values() if rank < len(places)]
    wanted = {str(after[place]["id"]): str(after[place]["generated"]) for place in ranks[:count]}
    if stored.keys() >= wanted.keys():
        return stored
    with attempt.record.stage("map where it looks") as facts:
        place = {identity: index for index, identity in enumerate(rows_ids(data.evaluation))}
        rows = data.evaluation.select([place[identity] for identity in wanted])
        stored = explain(loaded, rows, wanted, spec, attempt.preemption.check)
        store.write(OCCLUSION_KEY, json.dumps(stored).encode())
        facts.append(f"{len(stored)} rows")
    return stored


def values(measured: dict[str, Any] | None) -> dict[str, dict[str, float]]:
    """Each metric's values alone, for the status and for Prometheus: {metric: {"before": …, "after": …}}."""
    found: dict[str, dict[str, float]] = {}
    for when in ("before", "after"):
        for metric, entry in ((measured or {}).get(when) or {}).items():
            if entry["value"] is not None:
                found.setdefault(metric, {})[when] = entry["value"]
    return found


def pictures(rows: Any, ids: Iterable[str], longest_side: int = 384) -> dict[str, bytes]:
    """JPEG files of held-out rows for the report, by id: the first picture of each that has one."""
    from job.evaluate.generate import rows_ids

    places = {identity: place for place, identity in enumerate(rows_ids(rows))}
    found = {}
    for identity in dict.fromkeys(ids):
        images = rows[places[identity]]["images"]
        if not images:
            continue
        image = images[0].convert("RGB")
        image.thumbnail((longest_side, longest_side))
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=85)
        found[identity] = stream.getvalue()
    return found


def stored_rows(store: Store, key: str) -> Rows:
    """Rows of an earlier attempt; none when they are not there. A store that fails is no reason to make them again."""
    try:
        lines = store.read(key).decode().splitlines()
    except Missing:
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
