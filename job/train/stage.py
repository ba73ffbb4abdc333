"""Trains with checkpoints: resumes from the newest complete one, makes each new one durable, leaves none incomplete."""

from __future__ import annotations

import logging
import shutil
import time
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path

from job import checkpoint
from job.context import RunContext
from job.data import Data
from job.distributed.allreduce import AllReduce, all_reduce
from job.errors import Unavailable
from job.evaluate.answer_cache import read_base_ahead
from job.model.loaded import Loaded
from job.model.memory_model import last_cure
from job.model.transformers_backend import load_adapter
from job.planning.batch_fit import thriftier
from job.planning.plan import Plan
from job.runtime.preemption import Preemption
from job.runtime.status import versions
from job.train.callbacks import Safety
from job.train.eval_callback import HeldOut
from job.train.oom_retry import StepRetry
from job.train.trackers import publish_tensorboard
from job.train.trainer import run_trainer

log = logging.getLogger("job")

MOST_FAILURES = 5
LEAVE_SECONDS = 2.0
"""Seconds of the grace period kept for writing the status and exiting when an upload is abandoned."""


def train(ctx: RunContext, plan: Plan, loaded: Loaded, data: Data) -> None:
    """Train `loaded.model` to the last step of the plan, from the output's newest checkpoint if there is one."""
    preemption, ranks = ctx.preemption, ctx.ranks
    if not ranks.rank:
        read_base_ahead(loaded.folder)
    folder, shared = ctx.scratch / "trainer", ctx.scratch.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    with preemption.leave_at_once():
        restored = ranks.once_per_node(
            shared,
            "checkpoint",
            lambda: checkpoint.restore(ctx.store, folder, on_skip=log_skipped, spec_digest=ctx.spec.digest),
        )
        step = restored.manifest.step if restored else 0
        if (first := ranks.shared("resumed step", step)) != step:
            raise Unavailable(f"rank {ranks.rank} restored step {step}, and rank 0 step {first}; run again")
    with all_reduce(ranks) as group:
        _train(ctx, plan, loaded, data, restored, group)


def _train(
    ctx: RunContext, plan: Plan, loaded: Loaded, data: Data, restored: checkpoint.Restored | None, group: AllReduce
) -> None:
    record, preemption, first = ctx.record, ctx.preemption, ctx.ranks.rank == 0
    step = restored.manifest.step if restored else 0
    record.resume_numbers(restored.folder if restored else None)
    less_kept = thriftier(plan.kept, unsloth=loaded.backend == "unsloth")
    cure = f"{less_kept}shrink images with dataset.image_max_side, lower training.max_length, {last_cure(loaded.precision)}"
    retry = StepRetry(plan.micro_batch, cure, whole=plan.shards > 1)
    measured = data.validation if ctx.spec.evaluation.chooses_step else data.evaluation
    held_out = HeldOut(ctx, loaded, measured, retry, group)
    if restored is not None:
        held_out.resume(restored.folder)
    with record.stage("train") as facts:
        if restored is not None and (step == plan.total_steps or held_out.is_over) and not held_out.is_due(step):
            load_adapter(loaded.model, restored.folder)
            facts += [f"step {step} was already saved", *held_out.finish(step)]
            return
        if restored is not None:
            log.info("resuming from step %d of attempt %d", step, restored.manifest.attempt)
            retry.micro_batch = min(plan.micro_batch, restored.manifest.extra.get("micro_batch", plan.micro_batch))
        submitted = dict[int, float]()
        with uploader(ctx, submitted) if first else nullcontext() as uploads:

            def keep(saved: int, made: Path, epoch: float, written: Future[None]) -> None:
                if uploads is None:
                    return
                record.copy_numbers(made)
                held_out.put_into(made)
                submitted[saved] = time.monotonic()
                extra = {"micro_batch": retry.micro_batch}
                uploads.submit(made, saved, epoch=epoch, extra=extra, written=written)

            safety = Safety(preemption, keep, lambda: wait_for_uploads(uploads, preemption), record)
            start = restored.folder if restored else None
            last = run_trainer(ctx, plan, loaded, data.train, safety, retry, held_out, group, start)
            wait_for_uploads(uploads, preemption)
        if first:
            publish_tensorboard(ctx)
        facts.append(f"{last} steps" + (f", the first {step} from an earlier attempt" if step else ""))
        facts += held_out.finish(last)


def log_skipped(step: int, why: str) -> None:
    log.warning("checkpoint of step %d is skipped: %s", step, why)


def uploader(ctx: RunContext, submitted: dict[int, float]) -> checkpoint.Uploader:
    """Create the thread that makes saved folders durable; a failed upload is reported and never stops training. `submitted`
    maps steps to the monotonic time at which their folders were submitted."""
    spec, record = ctx.spec, ctx.record

    def committed(manifest: checkpoint.Manifest) -> None:
        seconds = round(time.monotonic() - submitted[manifest.step], 1)
        record.update(last_checkpoint=manifest.step, checkpoint_failures=0, checkpoint_seconds=seconds)
        record.publish_numbers()

    return checkpoint.Uploader(
        ctx.store,
        spec_digest=spec.digest,
        attempt=ctx.number,
        lease=ctx.lease,
        keep=spec.checkpoint.keep,
        versions=versions(),
        on_commit=committed,
        on_failure=lambda step, error, failures: record.update(checkpoint_failures=failures),
    )


def wait_for_uploads(uploads: checkpoint.Uploader | None, preemption: Preemption) -> None:
    """Wait until everything saved is committed: after a notice for as long as the grace period allows, else until the store
    has failed `MOST_FAILURES` more times. Raises the store's error, or Preempted."""
    if uploads is not None:
        uploads.try_again()
    while uploads is not None and not uploads.wait(0.2):
        if uploads.error is not None and (uploads.lost or uploads.failures >= MOST_FAILURES):
            raise uploads.error
        if preemption.remaining < LEAVE_SECONDS:
            log.warning("the last checkpoint is not committed; the next attempt continues from an older one")
            preemption.check()
