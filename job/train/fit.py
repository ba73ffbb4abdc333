"""Training with its checkpoints: take up the newest whole one, make each new one durable, leave none half-made."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from job import checkpoint
from job.data import Data
from job.model import Loaded
from job.model.transformers_backend import load_adapter
from job.plan import Plan
from job.preemption import Preemption
from job.record import Record
from job.spec import JobSpec
from job.store import Store
from job.store.lease import Lease
from job.train import train

log = logging.getLogger("job")


def fit(
    spec: JobSpec,
    plan: Plan,
    loaded: Loaded,
    data: Data,
    scratch: Path,
    store: Store,
    lease: Lease,
    record: Record,
    preemption: Preemption,
    attempt: int,
) -> None:
    """Bring `loaded.model` to the last step of the plan, from wherever the output's newest checkpoint left it."""
    folder = scratch / "trainer"
    shutil.rmtree(folder, ignore_errors=True)
    with preemption.leave_at_once():
        restored = checkpoint.restore(
            store, folder, on_skip=lambda step, why: log.warning("checkpoint of step %d is passed over: %s", step, why)
        )
    step = restored.manifest.step if restored else 0
    record.resume_numbers(step)
    with record.stage("train") as facts:
        if restored is not None and step == plan.total_steps:
            load_adapter(loaded.model, restored.folder)
            facts.append(f"step {step} was saved already")
            return
        if restored is not None:
            log.info("resuming from step %d of attempt %d", step, restored.manifest.attempt)

        def keep(saved: int, made: Path, epoch: float) -> None:
            checkpoint.commit(
                store, made, step=saved, epoch=epoch, spec_digest=spec.digest, attempt=attempt, extra={}, lease=lease
            )
            checkpoint.prune(store, keep=spec.checkpoint.keep, keep_every=spec.checkpoint.keep_every)
            shutil.rmtree(made, ignore_errors=True)
            record.publish_numbers()
            record.update(last_checkpoint=saved)

        last = train(
            spec,
            loaded,
            data.train,
            plan.micro_batch,
            scratch,
            record,
            preemption,
            keep,
            restored.folder if restored else None,
        )
        facts.append(f"{last} steps" + (f", the first {step} from an earlier attempt" if step else ""))
