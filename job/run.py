"""One job from start to finish. Every rank runs it; only rank 0 writes to the output."""

from __future__ import annotations

import logging

from job.config.environment import Environment
from job.config.schema import JobSpec
from job.context import RunContext, open_run, take_lease
from job.export.stage import check_mergeable, export
from job.model.load import load_model
from job.model.loaded import Loaded
from job.output.stored import open_output
from job.planning.plan import Plan
from job.planning.stage_in import StagedIn, agree_on_plan, stage_in
from job.planning.survey import torch_device
from job.report.rebuild import shows_rows, withdraw_rows
from job.runtime.preemption import Preemption

log = logging.getLogger("job")


def run(spec: JobSpec, environment: Environment, preemption: Preemption) -> None:
    """Run a job from spec to `RESULT.json`. Raises a JobError for every other foreseen ending.

    Running it again after any ending does only what is missing.
    """
    with open_run(spec, environment, preemption) as ctx:
        if ctx is None:
            keep_private(spec, environment, preemption)
            log.info("already published: %s", spec.output.url)
            return
        with preemption.leave_at_once():
            staged = stage_in(ctx)
            ctx, plan = agree_on_plan(ctx, staged)
            with ctx.record.stage("load"):
                # Imported here: a published job, or one that waits for the lease, needs none of the training libraries.
                from job.evaluate.stage import add_occlusion_maps, compare, measure, share_occlusion_maps
                from job.publish import publish
                from job.train.stage import train

                loaded = load(ctx, plan, staged)
        before = measure(ctx, loaded, staged.data, "before")
        train(ctx, plan, loaded, staged.data)
        after = measure(ctx, loaded, staged.data, "after")
        if ctx.ranks.rank:
            if plan.shards > 1:
                share_occlusion_maps(ctx, loaded, staged.data)
            ctx.ranks.end_with_rank_0()
        results = compare(ctx, staged.data, before, after)
        results = add_occlusion_maps(ctx, loaded, staged.data, results)
        with preemption.leave_at_once():
            fold = ctx.spec.export.merged and not results.unmet
            exported = export(ctx, loaded, staged.data, results, fold=fold, gate_room=plan.gate_room)
            publish(ctx, plan, staged, results, exported)
        log.info("published: %s", spec.output.url)


def keep_private(spec: JobSpec, environment: Environment, preemption: Preemption) -> None:
    """Apply a `report_images: false` that was set after the report was published with images."""
    store = open_output(spec)
    if not spec.privacy.report_images and shows_rows(store):
        with take_lease(store, environment.lease_seconds, preemption):
            store.take_up()
            withdraw_rows(store, spec)
        log.info("removed images and texts of rows from the report: %s", store.url)


def load(ctx: RunContext, plan: Plan, staged: StagedIn) -> Loaded:
    """Load the base model with adapters as planned. Raises SpecError if they could not be merged later."""
    spec = ctx.spec
    sharded = plan.shards > 1
    if sharded:
        from job.distributed.allreduce import connect

        connect(ctx.ranks)
    loaded = load_model(
        spec, staged.base, torch_device(), staged.backend, plan.precision, plan.kept, staged.adapter, sharded=sharded
    )
    if not ctx.ranks.rank:
        check_mergeable(spec, loaded)
    return loaded
