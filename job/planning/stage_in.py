"""Brings base, adapter and data to scratch once per node; all ranks then agree on one plan."""

from __future__ import annotations

import importlib
import logging
import os
import socket
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from job.context import RunContext
from job.data import BadRows, Data
from job.data.facts import QuarantinedRow, as_jsonl
from job.distributed.ranks import Ranks
from job.errors import DataError, SpecError, Unavailable
from job.export import hub
from job.layout import EXAMPLE_KEY, NEAR_KEY, QUARANTINE_KEY
from job.model.base_model import base_facts, fetch_base
from job.model.load import choose_backend, import_first
from job.output import ownership
from job.output.identity import Identity
from job.planning.describe import describe, foreseen_bytes
from job.planning.facts import Facts
from job.planning.optional_packages import check_packages
from job.planning.plan import Plan, apply_plan, make_plan
from job.planning.sharding import backend_for
from job.planning.shortage import refuse
from job.planning.survey import arriving, find_device, keep_within, look_at_output, survey
from job.prefetch import use_bundle
from job.runtime.scratch import check_kernels
from job.runtime.status import on_terminal
from job.store import OwnedStore

log = logging.getLogger("job")


@dataclass(frozen=True)
class StagedIn:
    """What was brought and found: the facts for the plan, the rows, the folders of base and adapter, and the backend."""

    facts: Facts
    data: Data
    base: Path
    adapter: Path | None
    backend: str


def stage_in(ctx: RunContext) -> StagedIn:
    """Brings base and data to scratch once per node, and imports the backend meanwhile.

    Rank 0 records in the output which rows are bad, and which rows the run has. Raises DataError if the run in the output began
    with others, or if a node has other rows than rank 0.
    """
    with ctx.record.stage("stage in"):
        if ctx.ranks.rank:
            return _bring(ctx)
        hub.check_token(ctx.spec.export.hub)
        return _take_in(ctx)


def agree_on_plan(ctx: RunContext, staged: StagedIn) -> tuple[RunContext, Plan]:
    """Returns rank 0's plan on every rank, and the context with the resolved spec. Raises a JobError with every shortage."""
    if ctx.ranks.rank:
        plan: Plan = ctx.ranks.shared("plan", None)  # type: ignore[assignment]
    else:
        plan = make_plan(ctx.spec, staged.facts)
        log.info("%s", describe(ctx.spec, plan, staged.facts, example=on_terminal()))
        if staged.facts.example is not None:
            ctx.store.write(EXAMPLE_KEY, staged.facts.example.encode())
        ctx.record.update(foreseen=foreseen_bytes(plan.foreseen.needs, plan.device_memory))
        refuse(plan.foreseen.shortages)
        ctx.ranks.shared("plan", plan)
        ctx.store.write(QUARANTINE_KEY, as_jsonl(staged.data.quarantined))
        ctx.store.write(NEAR_KEY, as_jsonl(staged.data.near))
    return replace(ctx, spec=apply_plan(ctx.spec, plan)), plan


def _take_in(ctx: RunContext) -> StagedIn:
    spec, store = ctx.spec, ctx.store
    assert isinstance(store, OwnedStore)
    try:
        staged = _bring(ctx)
    except BadRows as error:
        store.write(QUARANTINE_KEY, as_jsonl(error.rows))
        refuse_lost_hosts(store, error.rows, None)
        raise
    assert staged.data.identity is not None
    refuse_lost_hosts(store, staged.data.quarantined, staged.data.identity)
    if ownership.take_data(store, spec, staged.data.identity):
        staged = replace(staged, facts=look_at_output(staged.facts, spec, store, ctx.scratch))
    return staged


def refuse_lost_hosts(store: OwnedStore, bad: list[QuarantinedRow], rows: Identity | None) -> None:
    """Raises Unavailable if the run in the output began with more rows and the hosts of some images cannot be resolved now: the
    network has changed, not the rows."""
    from job.data.images import UNKNOWN_HOST

    lost = sum(row.reason == UNKNOWN_HOST for row in bad)
    if lost and ownership.began_with_more(store, rows):
        raise Unavailable(
            f"dataset: the image hosts of {lost} rows cannot be resolved now, and the run began with more rows than are good "
            "now; run again once DNS works"
        )


def _bring(ctx: RunContext) -> StagedIn:
    scratch = shared_scratch(ctx)
    ctx.ranks.once_per_node(scratch, "bundle", lambda: use_bundle(ctx.spec, ctx.environment.bundle, scratch))
    with ownership.found_before(ctx.store):
        return _brought(ctx, scratch)


def _brought(ctx: RunContext, scratch: Path) -> StagedIn:
    spec, ranks = ctx.spec, ctx.ranks
    with nullcontext() if ranks.place.local_rank else arriving(spec, scratch):
        device = find_device(has_torch=True, granted_gb=ctx.environment.gpu_memory_gb)
        check_packages(spec, device.kind == "cuda")  # `survey` does too, after fetching gigabytes
        if device.kind == "cuda":
            check_kernels(os.environ)
            keep_within(device)
        if ranks.shared("device", device.kind) != device.kind:
            raise SpecError(
                f"rank {ranks.rank} on {socket.gethostname()} has a {device.kind} and rank 0 has none: start as many processes "
                "on a node as it has GPUs"
            )
        backend = choose_backend(spec.model, device.kind == "cuda")
        if backend == "unsloth" and ranks.world > 1:
            base = ranks.once_per_node(scratch, "base", lambda: base_facts(fetch_base(spec.model, scratch)))
            backend = backend_for(spec, backend, base, device, ranks.world)
        import_first(backend)
    if ranks.rank:
        importlib.import_module("job.train.stage")  # while rank 0 validates the rows
    look = ranks.once_per_node(
        scratch,
        "rows",
        lambda: survey(
            spec, ctx.store, scratch, ctx.environment, fetch=True, world=ranks.world, on_this_node=ranks.on_this_node()
        ),
    )
    assert look.base is not None
    assert look.data is not None
    assert look.data.identity is not None
    refuse_other_rows(ranks, look.data.identity)
    return StagedIn(look.facts, look.data, look.base, look.adapter, backend)


def shared_scratch(ctx: RunContext) -> Path:
    """Returns the job folder that all ranks of a node share: rank 0's, whose name begins the others' names."""
    return ctx.scratch.with_suffix("")


def refuse_other_rows(ranks: Ranks, rows: Identity) -> None:
    """Raises DataError if a node has other rows than rank 0, for example in an older copy of its own."""
    if ranks.shared("rows", rows.digest) != rows.digest:
        raise DataError(
            f"dataset: rank {ranks.rank} on {socket.gethostname()} has other rows than rank 0; give every node the same "
            "copy of the data, and run again"
        )
