"""Trainer callbacks: metrics, checkpoints, and stopping on a preemption notice."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job.errors import DataError, JobError
from job.runtime.preemption import FITS, Preemption
from job.runtime.status import Record, on_terminal
from job.train.gpu_stats import gpu_numbers

log = logging.getLogger("job")

EXPLODED = 3.0
"""Multiple of the loss of guessing (the logarithm of the vocabulary's size) or of the first logged loss, beyond which no run
recovers."""
LINE_SECONDS = 10.0
"""Seconds between progress lines in the log; every `logging_steps` goes to metrics.jsonl."""


class Numbers(TrainerCallback):
    """Reports loss, learning rate and speed: a log line, JSONL, and a progress bar on a terminal."""

    def __init__(self, record: Record, effective_batch_size: int) -> None:
        self.record, self.samples = record, effective_batch_size
        self.bar: tqdm[Any] | None = None
        self.trainer: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.time, self.step, self.told = time.monotonic(), state.global_step, 0.0
        self.worst_start: float | None = None
        self.record.update(step=state.global_step, steps=state.max_steps)
        if on_terminal():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.record.update(step=state.global_step, epoch=round(state.epoch or 0, 4))
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        elapsed, steps = time.monotonic() - self.time - self.trainer.paused, state.global_step - self.step
        self.time, self.step = time.monotonic(), state.global_step
        seconds = elapsed / max(steps, 1)
        self._stop_when_lost(logs, state.global_step)
        self.record.numbers(
            step=state.global_step,
            epoch=round(state.epoch or 0, 4),
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            step_seconds=round(seconds, 4),
            samples_per_second=round(self.samples / seconds, 3) if seconds else None,
            tokens_per_second=round(self.trainer.tokens_of_step / elapsed, 1) if elapsed else None,
            data_wait_seconds=round(self.trainer.waited / max(steps, 1), 4),
            **rank_waits(self.trainer.waits_of_step),
            micro_batch=self.trainer.retry.micro_batch,
            rows=list(self.trainer.rows_of_step),
            **gpu_numbers(self.record.peaks),
        )
        self.trainer.rows_of_step.clear()
        self.trainer.waits_of_step.clear()
        self.trainer.tokens_of_step, self.trainer.waited, self.trainer.paused = 0, 0.0, 0.0
        left = seconds * (state.max_steps - state.global_step)
        self.record.update(loss=logs["loss"], seconds_left=round(left))
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")
        elif time.monotonic() - self.told > LINE_SECONDS:
            self.told = time.monotonic()
            log.info(
                "train: step %d/%d, loss %.4f, %.2f s per step, %.0f s left",
                state.global_step,
                state.max_steps,
                logs["loss"],
                seconds,
                left,
            )

    def _stop_when_lost(self, logs: dict[str, float], step: int) -> None:
        """Raise DataError when the loss is not finite, or several times that of guessing (or of the first line)."""
        loss, norm = logs["loss"], logs.get("grad_norm", 0.0)
        vocabulary = self.trainer.model.get_input_embeddings().weight.shape[0]
        if self.worst_start is None and math.isfinite(loss):
            self.worst_start = EXPLODED * max(loss, math.log(vocabulary))
        if math.isfinite(loss) and math.isfinite(norm) and self.worst_start is not None and loss < self.worst_start:
            return
        raise DataError(lost(step, f"the loss is {loss:.4g}, the gradient's norm {norm:.4g}", self.record))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def rank_waits(waits: list[list[float]]) -> dict[str, list[float]]:
    """Return `rank_wait_seconds`: mean seconds per step that each rank spent on the sum of gradients. The slow rank has the
    least."""
    means = [round(sum(each) / len(each), 4) for each in zip(*waits, strict=True)]
    return {"rank_wait_seconds": means} if len(means) > 1 else {}


def lost(step: int, why: str, record: Record) -> str:
    """Return the error message for training that cannot recover."""
    kept = record.read("last_checkpoint")
    good = f"the last good checkpoint is that of step {kept}" if kept else "there is no earlier checkpoint"
    return (
        f"training diverged at step {step}: {why}; {good}. Lower training.learning_rate, or raise training.warmup_ratio, "
        "and check the rows of that step in logs/metrics.jsonl"
    )


class Safety(TrainerCallback):
    """Commits what the trainer saved, and stops after the current micro-batch when asked to.

    `keep(step, folder, epoch, written)` makes a folder durable once it is `written`; `settle()` waits until that is done. An
    incomplete step is dropped: weights and optimizer stay those of the last finished step until the next one is complete, and
    its random states are restored before saving, so that the step is repeated exactly.
    """

    def __init__(
        self,
        preemption: Preemption,
        keep: Callable[[int, Path, float, Future[None]], None],
        settle: Callable[[], None],
        record: Record,
    ) -> None:
        self.preemption, self.keep, self.settle, self.record = preemption, keep, settle, record
        self.shortened = False
        self.half_made = 0
        self.trainer: Any = None
        self.last_saved = -1
        self.random_states: dict[str, Any] = {}
        self.learning_rate = 0.0
        self.without_line: tuple[torch.Tensor, int] = (torch.zeros(()), 0)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.last_saved = state.global_step if state.global_step else -1

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.learning_rate = self.trainer._get_learning_rate()  # of this step: the scheduler advances afterwards

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.half_made += 1
        if not self.trainer.sharded:  # else other ranks wait for this one's share of the weights
            self.preemption.check()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.random_states and not self.trainer.ranks.rank:  # from here on the optimizer has state
            self.trainer.snapshot.prepare(self.trainer.states())
        self.random_states, self.half_made = random_states(), 0
        self.without_line = self.trainer._tr_loss.clone(), len(self.trainer.rows_of_step)
        if self.preemption.requested:
            control.should_save = True  # after the step's metrics line; then training stops
        if control.should_save or state.global_step == state.max_steps:
            control.should_log = True  # whatever `logging_steps` is: no later line would include these steps
        seconds = self.record.read("checkpoint_seconds")
        if not self.shortened and seconds is not None and seconds > FITS * self.preemption.grace_seconds:
            self.shortened = True
            state.save_steps = max(1, int(state.save_steps) // 2)
            log.warning(
                "a checkpoint takes %.0f s to reach the store, and a preemption notice leaves %.0f s (JOB_GRACE_SECONDS): the "
                "last steps may be lost; saving every %d steps from now on",
                seconds,
                self.preemption.grace_seconds,
                state.save_steps,
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._commit(state)
        if state.global_step < state.max_steps:
            self.preemption.check()

    def _commit(self, state: TrainerState) -> None:
        folder = Path(str(self.trainer.args.output_dir)) / f"checkpoint-{state.global_step}"
        self.keep(state.global_step, folder, state.epoch or 0.0, self.trainer.snapshot.written)
        self.last_saved = state.global_step

    def _write_line(self, state: TrainerState) -> None:
        """Write the metrics line of finished steps that have none yet, without the incomplete step."""
        trainer, (loss, rows) = self.trainer, self.without_line
        if steps := state.global_step - trainer._globalstep_last_logged:
            del trainer.rows_of_step[rows:]
            trainer.log({"loss": float(loss) / steps, "learning_rate": self.learning_rate})

    def leave(self) -> None:
        """Save the last finished step, unless already saved, after a notice has ended training."""
        state = self.trainer.state
        if state.global_step > 0 and state.global_step != self.last_saved:
            if self.random_states:
                restore_random_states(self.random_states)
            self._write_line(state)
            self.trainer.save_state_now()
            self._commit(state)
        try:
            self.settle()
        except JobError as error:
            log.warning("preempted, and the last step could not be saved: %s", error)
        noticed = self.preemption.noticed
        if noticed is not None:
            log.info(
                "notice → commit: %.1f s, at step %d, %d micro-batches dropped",
                time.monotonic() - noticed,
                state.global_step,
                self.half_made,
            )


def random_states() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators (CPU and each GPU)."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
