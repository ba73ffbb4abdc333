"""Measures loss and sample answers during training on rows that are not trained on, keeps the best adapter, and stops early.

All of this is stored in the checkpoints, so that a resumed run knows what an uninterrupted run would know. Nothing is drawn
from a random generator, and a preemption notice never waits: an incomplete measurement is dropped and repeated.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from job.context import RunContext
from job.distributed.allreduce import AllReduce
from job.errors import JobError, Preempted
from job.evaluate.generate import answer
from job.evaluate.records import Sample, from_json
from job.evaluate.stage import jsonl
from job.layout import SAMPLES_KEY
from job.model.load import to_generation, to_training
from job.model.loaded import Loaded, is_sharded
from job.model.memory_model import last_cure
from job.model.oom_retry import MicroBatches
from job.model.transformers_backend import load_adapter
from job.train.callbacks import random_states, restore_random_states
from job.train.oom_retry import StepRetry

log = logging.getLogger("job")

LOSSES, SAMPLES, BEST = "held_out/losses.json", "held_out/samples.jsonl", "held_out/best"
"""Paths in a checkpoint's folder. transformers would load an adapter directly below it beside the one in training."""


class NoneBetter(Exception):
    """The resumed training was already over."""


class HeldOut(TrainerCallback):
    """`losses` are the measurements so far, in nats over answer tokens by step; `samples` are the answers at each of them to
    the first `evaluation.eval_samples` rows; `best` is the folder with the best adapter.

    `rows` are the held-out rows, or the validation rows if their loss chooses the step: the final measurement must not be made
    on rows that chose what is measured. At most `evaluation.eval_loss_rows` of them are measured, always the same ones. All
    ranks know the losses; only rank 0 has samples and the best adapter.
    """

    def __init__(self, ctx: RunContext, loaded: Loaded, rows: Any, retry: StepRetry, group: AllReduce) -> None:
        self.ctx, self.loaded, self.retry, self.group = ctx, loaded, retry, group
        self.spec = ctx.spec.evaluation
        self.kind = "validation" if self.spec.chooses_step else "held-out"
        count = min(len(rows), self.spec.eval_loss_rows)
        self.rows = rows.select([index * len(rows) // count for index in range(count)]) if count else rows
        self.losses: dict[int, float] = {}
        self.samples: list[Sample] = []
        self.best: Path | None = None
        self._shown = ThreadPoolExecutor(1, thread_name_prefix="samples")  # training does not wait for the store
        self.trainer: Any = None

    def resume(self, checkpoint: Path) -> None:
        """Restore the state in a checkpoint's folder."""
        if (checkpoint / LOSSES).exists():
            stored = json.loads((checkpoint / LOSSES).read_text())
            self.losses = {int(step): float(loss) for step, loss in stored.items()}
            lines = (checkpoint / SAMPLES).read_text().splitlines()
            self.samples = [from_json(Sample, json.loads(line)) for line in lines]
            self.best = checkpoint / BEST if (checkpoint / BEST).exists() else None

    def put_into(self, checkpoint: Path) -> None:
        """Add the state to a checkpoint's folder. The best adapter is linked, not copied."""
        if self.losses:
            (checkpoint / LOSSES).parent.mkdir(parents=True, exist_ok=True)
            (checkpoint / LOSSES).write_text(json.dumps(self.losses))
            (checkpoint / SAMPLES).write_bytes(jsonl(self.samples))
        if self.best is not None:
            shutil.copytree(self.best, checkpoint / BEST, copy_function=_linked)

    @property
    def is_over(self) -> bool:
        """Whether none of the last `patience` measurements was better than an earlier one."""
        if self.spec.patience is None or not self.losses:
            return False
        return sum(step > self.best_step for step in self.losses) >= self.spec.patience

    @property
    def best_step(self) -> int:
        return lowest(self.losses)

    def is_due(self, last: int) -> bool:
        """Whether the last step has yet to be measured."""
        return self.spec.eval_steps is not None and len(self.rows) > 0 and last not in self.losses

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self._measure_if_due(state)  # skipped by the attempt that was stopped at this step
        self.ctx.preemption.check()
        if self.is_over or state.global_step == state.max_steps:
            raise NoneBetter  # upstream checks whether to stop only after the next step

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        self._measure_if_due(state)
        if self.ctx.preemption.requested:
            control.should_save = True  # of this step, so that the dropped measurement is due on resume
        if self.is_over and not control.should_training_stop:
            control.should_training_stop = control.should_save = True
            log.info(
                "train: stopping at step %d, because %s loss has not fallen below that of step %d for %d measurements",
                state.global_step,
                self.kind,
                self.best_step,
                self.spec.patience,
            )

    def finish(self, last: int) -> list[str]:
        """Load the best adapter into the model if the spec asks for it. Returns remarks, if any."""
        taken, said = last, list[str]()
        if self.losses:
            self._shown.shutdown()
            self._show_samples(jsonl(self.samples))
            if self.spec.take == "best" and self.best_step != last:
                if self.best is not None:
                    load_adapter(self.loaded.model, self.best)
                self.group.as_first(self.loaded.model)
                taken = self.best_step
            said = [f"step {taken} is chosen, with {self.kind} loss {self.losses[taken]:.4f}"]
            said.append(f"the lowest is {self.losses[self.best_step]:.4f} at step {self.best_step}")
        self.ctx.record.update(step=last, taken_step=taken)
        return said

    def _measure_if_due(self, state: Any) -> None:
        step, every = state.global_step, self.spec.eval_steps
        if every is None or not step or not self.is_due(step) or (step % every and step != state.max_steps):
            return
        began, states = time.monotonic(), random_states()
        self.loaded.model.eval()
        try:
            loss = self._mean()
            answers = self._answers(step)
        finally:
            to_training(self.loaded)
            restore_random_states(states)
            self.trainer.paused += time.monotonic() - began
        if not self.ctx.preemption.requested:
            self._note(step, loss, answers)

    def _mean(self) -> float:
        """Mean loss over answer tokens, weighted as in training; after a notice, over those so far. Each rank takes its share
        of the rows; with a sharded model, in rounds."""

        def loss_of(places: Sequence[int]) -> list[tuple[float, float]]:
            return [self.trainer.loss_of([self.rows[place] for place in places])]

        def measure(places: Sequence[int]) -> list[tuple[float, float]]:
            return [] if self.ctx.preemption.requested else loss_of(places)

        ranks, size = self.group.ranks, self.retry.micro_batch
        micro = self._micro_batches(size)
        if is_sharded(self.loaded.model):
            parts = [range(len(self.rows))[start : start + size] for start in range(0, len(self.rows), size)]
            measured = list[tuple[float, float]]()
            with suppress(Preempted):
                for part in self.group.rounds("held-out losses", parts, lambda part: micro.map(part, loss_of)):
                    measured += part
        else:
            measured = micro.map(range(ranks.rank, len(self.rows), ranks.world), measure)
        tokens = sum(count for _, count in measured)
        total = sum(loss * count for loss, count in measured)
        with suppress(Preempted):  # the step's metrics line has yet to be written
            total, tokens = self.group.sums(total, tokens)
        return total / tokens if tokens else math.nan

    def _answers(self, step: int) -> list[Sample]:
        rows = [self.rows[place] for place in range(min(len(self.rows), self.spec.eval_samples))]
        sharded = is_sharded(self.loaded.model)  # then all ranks generate them, and rank 0 keeps them
        if not rows or (not sharded and (self.ctx.preemption.requested or self.group.ranks.rank)):
            return []
        features = self.trainer.features
        micro = self._micro_batches(len(rows))
        try:
            if sharded:
                self.group.agree()
            to_generation(self.loaded)
            with torch.no_grad(), features.pixels() if features else nullcontext(), self.group.connected(sharded):
                said = micro.map(rows, lambda part: answer(self.loaded, list(part), self.spec.max_new_tokens))
        except Preempted:
            return []
        return [Sample(step, row["id"], row["reference"], text) for row, (text, _) in zip(rows, said, strict=True)]

    def _micro_batches(self, size: int) -> MicroBatches:
        cure = f"remove evaluation.eval_steps, shrink images with dataset.image_max_side, {last_cure(self.loaded.precision)}"
        whole = is_sharded(self.loaded.model)
        return MicroBatches(size, f"measuring on {self.kind} rows while training", cure, whole=whole)

    def _note(self, step: int, loss: float, answers: list[Sample]) -> None:
        self.losses[step] = round(loss, 6) if math.isfinite(loss) else math.inf
        self.samples += answers
        said = self.losses[step] if math.isfinite(loss) else None
        self.ctx.record.numbers(step=step, eval_loss=said)
        self.ctx.record.update(eval_loss=said, best_step=self.best_step)
        log.info("train: %s loss %.4f at step %d, lowest at step %d", self.kind, loss, step, self.best_step)
        self._shown.submit(self._show_samples, jsonl(self.samples))
        if self.best_step == step and self.spec.take == "best" and not self.group.ranks.rank:
            self.best = self.ctx.scratch / "best" / f"step-{step}"
            shutil.rmtree(self.best.parent, ignore_errors=True)
            self.loaded.model.save_pretrained(self.best)

    def _show_samples(self, samples: bytes) -> None:
        """Write the samples to the store; a failure is logged and stops nothing."""
        if self.group.ranks.rank:
            return
        try:
            self.ctx.store.write(SAMPLES_KEY, samples)
        except Preempted:
            raise
        except JobError as error:
            log.warning("cannot write the samples: %s", error)


def lowest(losses: Mapping[int, float]) -> int:
    """The step with the lowest loss; of several, the first."""
    return min(losses, key=lambda step: (losses[step], step))


def _linked(source: str, target: str) -> None:
    """Hard-link a file, which is never written again; copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
