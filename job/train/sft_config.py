"""Translates the spec and the plan to TRL's arguments."""

from __future__ import annotations

import os
from pathlib import Path

from trl import SFTConfig

from job.context import RunContext
from job.model.loaded import Loaded
from job.planning.needs import LOADER_BYTES, MOST_LOADERS
from job.planning.plan import Plan
from job.runtime.scratch import free_bytes


def loader_workers(given: int | str, on_gpu: bool) -> int:
    """Resolve `auto`: none on a CPU, where workers would take cores from training; else up to four, limited by the cores and
    by /dev/shm, through which they pass pixels."""
    if isinstance(given, int):
        return given
    shared = free_bytes(Path("/dev/shm"))
    return min(MOST_LOADERS, len(os.sched_getaffinity(0)) - 1, shared // LOADER_BYTES) if on_gpu else 0


def arguments(ctx: RunContext, loaded: Loaded, plan: Plan) -> SFTConfig:
    spec = ctx.spec
    training, on_gpu = spec.training, loaded.device.type == "cuda"
    workers = loader_workers(training.dataloader_num_workers, on_gpu)
    checkpointing = plan.kept != "all"
    return SFTConfig(
        output_dir=str(ctx.scratch / "trainer"),
        num_train_epochs=training.num_train_epochs,
        max_steps=training.max_steps or -1,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_ratio,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optim,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        bf16=loaded.precision != "32bit",
        use_cpu=not on_gpu,
        max_length=None,
        seed=training.seed,
        data_seed=training.seed,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=spec.checkpoint.save_steps,
        report_to=[],  # `tracked` adds them
        run_name=spec.name,
        disable_tqdm=True,
    )
