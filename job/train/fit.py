"""Training with its checkpoints: take up the newest whole one, make each new one durable, leave none half-made."""

from __future__ import annotations

import logging
import shutil
import time
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path

from job import checkpoint
from job.attempt import Attempt
from job.data import Data
from job.errors import Unavailable
from job.model import Loaded
from job.model.memory import last_cure
from job.model.transformers_backend import load_adapter
from job.plan import Plan
from job.preemption import Preemption
from job.record import versions
from job.room import thriftier
from job.store.folders import upload_folder
from job.train import train
from job.train.callbacks import Safety
from job.train.held_out import HeldOut
from job.train.ladder import Ladder
from job.train.together import Together, together

log = logging.getLogger("job")

MOST_FAILURES = 5
LEAVE_SECONDS = 2.0
"""Left of the grace when we stop waiting for an upload: to write the status and go."""


def fit(attempt: Attempt, plan: Plan, loaded: Loaded, data: Data) -> None:
    """Bring `loaded.model` to the last step of the plan, from wherever the output's newest checkpoint left it."""
    preemption, ranks = attempt.preemption, attempt.ranks
    folder, shared = attempt.scratch / "trainer", attempt.scratch.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    with preemption.leave_at_once():
        restored = ranks.once_per_node(
            shared, "checkpoint", lambda: checkpoint.restore(attempt.store, folder, on_skip=passed_over)
        )
        step = restored.manifest.step if restored else 0
        if (first := ranks.shared("resumed step", step)) != step:
            raise Unavailable(f"rank {ranks.rank} could restore step {step} and rank 0 step {first}; run again")
    with together(ranks) as group:
        _fit(attempt, plan, loaded, data, restored, group)


def _fit(
    attempt: Attempt, plan: Plan, loaded: Loaded, data: Data, restored: checkpoint.Restored | None, group: Together
) -> None:
    record, preemption, first = attempt.record, attempt.preemption, attempt.ranks.rank == 0
    step = restored.manifest.step if restored else 0
    record.resume_numbers(restored.folder if restored else None)
    less_kept = thriftier(plan.kept, unsloth=loaded.backend == "unsloth")
    cure = f"{less_kept}shrink images with dataset.image_max_side, lower training.max_length, {last_cure(loaded.precision)}"
    ladder = Ladder(plan.micro_batch, cure)
    held_out = HeldOut(attempt, loaded, data.evaluation, ladder, group)
    if restored is not None:
        held_out.resume(restored.folder)
    with record.stage("train") as facts:
        if restored is not None and (step == plan.total_steps or held_out.is_over) and not held_out.is_due(step):
            load_adapter(loaded.model, restored.folder)
            facts += [f"step {step} was saved already", *held_out.finish(step)]
            return
        if restored is not None:
            log.info("resuming from step %d of attempt %d", step, restored.manifest.attempt)
            ladder.rows_at_once = min(plan.micro_batch, restored.manifest.extra.get("rows_at_once", plan.micro_batch))
        with uploader(attempt) if first else nullcontext() as uploads:

            def keep(saved: int, made: Path, epoch: float, written: Future[None]) -> None:
                if uploads is None:
                    return
                record.copy_numbers(made)
                held_out.put_into(made)
                extra = {"submitted": time.time(), "rows_at_once": ladder.rows_at_once}
                uploads.submit(made, saved, epoch=epoch, extra=extra, written=written)

            safety = Safety(preemption, keep, lambda: settle(uploads, preemption), record)
            start = restored.folder if restored else None
            last = train(attempt, plan, loaded, data.train, safety, ladder, held_out, group, start)
            settle(uploads, preemption)
        if first:
            publish_tensorboard(attempt)
        facts.append(f"{last} steps" + (f", the first {step} from an earlier attempt" if step else ""))
        facts += held_out.finish(last)


def passed_over(step: int, why: str) -> None:
    log.warning("checkpoint of step %d is passed over: %s", step, why)


def uploader(attempt: Attempt) -> checkpoint.Uploader:
    """The thread that makes saved folders durable; a failed upload is reported and never stops training."""
    spec, record = attempt.spec, attempt.record

    def committed(manifest: checkpoint.Manifest) -> None:
        seconds = round(time.time() - manifest.extra["submitted"], 1)
        record.update(last_checkpoint=manifest.step, checkpoint_failures=0, checkpoint_seconds=seconds)
        record.publish_numbers()

    return checkpoint.Uploader(
        attempt.store,
        spec_digest=spec.digest,
        attempt=attempt.number,
        lease=attempt.lease,
        keep=spec.checkpoint.keep,
        keep_every=spec.checkpoint.keep_every,
        versions=versions(),
        on_commit=committed,
        on_failure=lambda step, error, failures: record.update(checkpoint_failures=failures),
    )


def publish_tensorboard(attempt: Attempt) -> None:
    """Send TensorBoard's files, if there are any, to `logs/tensorboard/`."""
    folder = attempt.scratch / "tensorboard"
    if folder.exists():
        upload_folder(attempt.store, folder, "logs/tensorboard")


def settle(uploads: checkpoint.Uploader | None, preemption: Preemption) -> None:
    """Wait until all that was saved is committed: after a notice for as long as the grace allows, else until the store
    has failed `MOST_FAILURES` times more. Raises what the store raised, or Preempted."""
    if uploads is not None:
        uploads.try_again()
    while uploads is not None and not uploads.wait(0.2):
        if uploads.error is not None and (uploads.lost or uploads.failures >= MOST_FAILURES):
            raise uploads.error
        if preemption.remaining < LEAVE_SECONDS:
            log.warning("the last checkpoint is not committed; the next attempt goes on from an older one")
            preemption.check()
