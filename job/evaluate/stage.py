"""Evaluates the model before and after training, and stores the answers row by row in the output."""

from __future__ import annotations

import io
import json
import logging
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from job.config.schema import EvaluationSpec, LabelSpec
from job.context import RunContext
from job.data import Data
from job.errors import Preempted
from job.evaluate.records import Answer, Comparison, Maps, Requirement, Sample, Settings, from_json
from job.layout import OCCLUSION_KEY, answers_key, partial_key
from job.model.loaded import Loaded, is_sharded
from job.output.stored import NOT_OURS, damaged, own_json, run_of
from job.runtime.progress import progress_bar
from job.runtime.status import on_terminal
from job.store import Missing, Store

log = logging.getLogger("job")

Answers = list[Answer]
MOST_SHOWN = 4
"""Images of a row in the report, which is one page."""
T = TypeVar("T")

KEEP_SECONDS = 15.0
"""Seconds between saves of the finished answers. A preemption notice saves them at once."""


@dataclass(frozen=True)
class Results:
    """The answers before and after training, their comparison (empty without held-out rows), what the spec requires of it, and
    occlusion maps."""

    before: Answers
    after: Answers
    metrics: Comparison
    requirements: list[Requirement]
    maps: Maps = field(default_factory=dict)

    @property
    def unmet(self) -> list[str]:
        """One sentence for each requirement that the tuned model does not meet."""
        return [each.said for each in self.requirements if not each.met]


def measure(ctx: RunContext, loaded: Loaded, data: Data, when: str) -> Answers:
    """Return the answers `before` or `after` training. They are read from the output if it has them, otherwise generated and
    stored there.

    All ranks share the work; rank 0 returns the answers, the others an empty list. On a preemption notice, finished answers
    are stored in `evaluation/<when>.partial.jsonl`, and the next attempt continues from there.
    """
    from job.evaluate import answer_cache as before
    from job.evaluate.generate import agree_on_batches

    if not len(data.evaluation):
        return []
    if ctx.ranks.rank:
        _share(ctx, loaded, data, when)
        return []
    spec, store, record, preemption = ctx.spec, ctx.store, ctx.record, ctx.preemption
    key, partial = answers_key(when), partial_key(when)
    finished = _finished(store, key, data, run_of(spec, data.identity))
    if finished:
        agree_on_batches(ctx.ranks, [])
        return finished
    preemption.check()
    with record.stage(f"evaluate {when}") as facts:
        with preemption.leave_at_once():
            held = before.held(data.evaluation)
            places = before.places(ctx) if when == "before" else []
            name = before.key(spec, loaded, held, _device(loaded)) if places else ""
            rows, where = before.recall(places, name, held)
        if rows:
            agree_on_batches(ctx.ranks, [])
        else:
            rows = _generate_missing(ctx, loaded, data, when, before.longest_first(held))
            before.keep(places, name, held, rows)
        store.write(key, jsonl(rows, run_of(spec, data.identity)))
        store.delete([partial])
        facts.append(f"{len(rows)} rows" + (f", cached by an earlier run in {where}" if where else ""))
    return rows


def _generate_missing(ctx: RunContext, loaded: Loaded, data: Data, when: str, order: Sequence[int]) -> Answers:
    """Generate the answers that no earlier attempt finished, and return all. On a preemption notice, store the finished ones and
    raise Preempted."""
    from job.evaluate.generate import generations, rows_ids

    store, record, preemption = ctx.store, ctx.record, ctx.preemption
    partial = partial_key(when)
    ids, run = rows_ids(data.evaluation), run_of(ctx.spec, data.identity)
    made = [
        from_json(Answer, line | ({"id": ids[line["place"]]} if "place" in line else {}))
        for line in stored_rows(store, partial, dict, run)
    ]
    places = {identity: place for place, identity in enumerate(ids)}  # ids may differ in the next attempt
    kept = time.monotonic()
    show = _progress(f"evaluate {when}", len(data.evaluation), len(made))
    record.update(rows=len(made), of_rows=len(data.evaluation))

    def each(batch: Answers) -> None:
        made.extend(batch)
        show(len(made))
        record.update(rows=len(made), of_rows=len(data.evaluation))
        nonlocal kept
        preemption.check()
        if time.monotonic() > kept + KEEP_SECONDS:
            store.write(partial, jsonl(made, run, places))
            kept = time.monotonic()

    known, tuned, ranks = list(made), when == "after", ctx.ranks
    try:
        return generations(
            loaded, data.evaluation, ctx.spec, tuned=tuned, order=order, known=known, each=each, ranks=ranks
        )
    except Preempted:
        store.write(partial, jsonl(made, run, places))
        raise


def _finished(store: Store, key: str, data: Data, run: str) -> Answers:
    """Return the answers of an earlier attempt if they are complete, otherwise an empty list. Each row gets its current id:
    ids are positions in the user's table, so removing a bad row shifts the ids after it."""
    from job.evaluate.generate import rows_ids

    rows, ids = stored_rows(store, key, Answer, run), rows_ids(data.evaluation)
    if len(rows) != len(ids):
        return []
    if [row.id for row in rows] == ids:
        return rows
    rows = [replace(row, id=identity) for row, identity in zip(rows, ids, strict=True)]
    store.delete([OCCLUSION_KEY])  # its maps have the old ids
    store.write(key, jsonl(rows, run))
    return rows


def with_current_labels(ctx: RunContext, data: Data, **sides: Answers) -> list[Answers]:
    """Return the answers `before` and `after` with the references, labels and groups that the spec and the data have now."""
    from job.evaluate.answer_cache import held

    found, run = [], run_of(ctx.spec, data.identity)
    for when, rows in sides.items():
        own = [each.own for each in held(data.evaluation)] if rows else []
        found.append([replace(row, **vars(current)) for row, current in zip(rows, own, strict=True)])
        if found[-1] != rows:
            ctx.store.write(answers_key(when), jsonl(found[-1], run))
    return found


def _share(ctx: RunContext, loaded: Loaded, data: Data, when: str) -> None:
    """On ranks other than 0, generate this rank's share of the batches that rank 0 found missing."""
    from job.evaluate.generate import agree_on_batches, answers

    batches = agree_on_batches(ctx.ranks, [])
    for _ in answers(loaded, data.evaluation, ctx.spec, when == "after", batches, ctx.ranks):
        pass


def _device(loaded: Loaded) -> str:
    """Return the device's name. Answers are cached by it, since devices round differently."""
    import torch

    return torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else platform.machine()


def compare(ctx: RunContext, data: Data, before: Answers, after: Answers) -> Results:
    """Compare the answers before and after, and check the spec's requirements."""
    from job.evaluate import compare as comparison
    from job.evaluate.acceptance import judged
    from job.evaluate.extra import extra_scores

    spec, asked = ctx.spec, ctx.spec.evaluation
    before, after = with_current_labels(ctx, data, before=before, after=after)
    extra = extra_scores(ctx, data, before, after)
    with ctx.record.stage("compare"), ctx.preemption.leave_at_once():
        measured = Comparison()
        if after:
            labels = label_specs(asked, data)
            settings = Settings(asked.bootstrap_samples, asked.confidence, spec.training.seed)
            measured = comparison.compare(
                before,
                after,
                labels,
                asked.groups,
                settings,
                extra,
                metric=asked.primary_metric,
                leaked=data.leaked,
            )
        results = Results(before, after, measured, judged(asked.require, measured))
    ctx.record.update(measured=values(measured))
    return results


def label_specs(asked: EvaluationSpec, data: Data) -> dict[str, LabelSpec]:
    """Return the spec of each label, with the values that the data have if it is read by values."""
    return {
        name: label if label.pattern else label.model_copy(update={"values": data.label_values[name]})
        for name, label in asked.labels.items()
    }


def add_occlusion_maps(ctx: RunContext, loaded: Loaded, data: Data, results: Results) -> Results:
    """Add occlusion maps of a few gallery rows to the results. They are read from the output if it has them. Raises Preempted on
    a preemption notice."""
    from job.evaluate import examples

    spec, store, after = ctx.spec, ctx.store, results.after
    count = spec.evaluation.explained_rows if spec.privacy.report_images and after else 0
    run = run_of(spec, data.identity)
    stored = own_json(store, OCCLUSION_KEY, run) if count else {}
    chosen = examples.chosen(results.before, after, results.metrics) if count else {}
    ranks = [places[rank] for rank in range(examples.EACH) for places in chosen.values() if rank < len(places)]
    wanted = {after[place].id: after[place].generated for place in ranks[:count]}
    missing = not stored.keys() >= wanted.keys()
    if is_sharded(loaded.model):
        ctx.ranks.shared("rows to map", wanted if missing else {})
    if not missing:
        return replace(results, maps=stored)
    with ctx.record.stage("map where it looks") as facts:
        stored = _explained(ctx, loaded, data, wanted)
        store.write(OCCLUSION_KEY, json.dumps(stored | {"run": run}).encode())
        facts.append(f"{len(stored)} rows")
    return replace(results, maps=stored)


def share_occlusion_maps(ctx: RunContext, loaded: Loaded, data: Data) -> None:
    """On ranks other than 0, run a sharded model while rank 0 maps where it looks."""
    wanted: dict[str, str] = ctx.ranks.shared("rows to map", {})
    _explained(ctx, loaded, data, wanted)


def _explained(ctx: RunContext, loaded: Loaded, data: Data, wanted: dict[str, str]) -> Maps:
    from job.distributed.allreduce import AllReduce
    from job.evaluate.generate import rows_ids
    from job.evaluate.occlusion import explain

    group, sharded = AllReduce(ctx.ranks), is_sharded(loaded.model)
    place = {identity: index for index, identity in enumerate(rows_ids(data.evaluation))}
    rows = data.evaluation.select([place[identity] for identity in wanted])
    with group.connected(sharded):
        return explain(loaded, rows, wanted, ctx.spec, group.agree if sharded else ctx.preemption.check)


def values(measured: Comparison) -> dict[str, dict[str, float]]:
    """Return the values of each metric for the status and Prometheus: {metric: {"before": …, "after": …}}."""
    found: dict[str, dict[str, float]] = {}
    for when, estimates in (("before", measured.before), ("after", measured.after)):
        for metric, estimate in estimates.items():
            if estimate.value is not None:
                found.setdefault(metric, {})[when] = estimate.value
    return found


def pictures(rows: Any, ids: Iterable[str], longest_side: int = 384) -> dict[str, bytes]:
    """Return the first `MOST_SHOWN` images of each held-out row in `ids` as JPEG files: the first by the row's id, further ones
    by `<id>.2` and so on. Rows without images are left out."""
    from job.evaluate.generate import rows_ids

    places = {identity: place for place, identity in enumerate(rows_ids(rows))}
    found = {}
    for identity in dict.fromkeys(ids):
        for number, each in enumerate(rows[places[identity]]["images"][:MOST_SHOWN], 1):
            image = each.convert("RGB")
            image.thumbnail((longest_side, longest_side))
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality=85)
            found[identity if number == 1 else f"{identity}.{number}"] = stream.getvalue()
    return found


def stored_rows(store: Store, key: str, kind: type[T], run: str | None = None) -> list[T]:
    """Return the rows of an earlier attempt; an empty list if there are none, or if they belong to another run than `run`.
    Errors of the store are raised, since they are no reason to generate the rows again.
    Raises DataError if the file is damaged."""
    try:
        rows = [json.loads(line) for line in store.read(key).decode().splitlines()]
        runs = {row.pop("run", None) for row in rows}
        if run is not None and runs - {run}:
            log.warning("skipped %s: its answers are for another spec or other rows, and are generated again", key)
            return []
        return [from_json(kind, row) for row in rows]
    except Missing:
        return []
    except NOT_OURS as error:
        raise damaged(store, key) from error


def jsonl(rows: Sequence[Answer | Sample], run: str | None = None, places: Mapping[str, int] | None = None) -> bytes:
    """Serialise rows as JSON lines. Each line also holds the run, and the row's position among the held-out rows, if given."""
    lines = (
        asdict(row) | ({"place": places[row.id]} if places else {}) | ({"run": run} if run else {}) for row in rows
    )
    return "".join(f"{json.dumps(line)}\n" for line in lines).encode()


def _progress(title: str, total: int, done: int) -> Any:
    """Return a function that takes the number of finished rows and shows it: as a progress bar on a terminal, otherwise as a log
    line at every quarter."""
    if on_terminal():
        bar = progress_bar(title, total, done=done)

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
