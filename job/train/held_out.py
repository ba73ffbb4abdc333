"""Held-out loss while training, and what the model says by then: which step was the best, its adapter, and when to stop.

All of it travels in the checkpoints, so that a resumed run knows what a run that was never stopped would know. Nothing is
drawn from a random generator, and a notice is never kept waiting: what is half measured is dropped and measured again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from job.attempt import Attempt
from job.errors import JobError, Preempted
from job.evaluate import Rows, jsonl
from job.evaluate.generate import answer
from job.model import Loaded, to_generation, to_training
from job.model.memory import last_cure
from job.model.oom_retry import MicroBatches
from job.model.transformers_backend import load_adapter
from job.report import SAMPLES_KEY
from job.train.callbacks import random_states, restore_random_states
from job.train.ladder import Ladder
from job.train.together import Together

log = logging.getLogger("job")

LOSSES, SAMPLES, BEST = "held_out/losses.json", "held_out/samples.jsonl", "held_out/best"
"""In a checkpoint's folder. An adapter right below it would be loaded by transformers beside the one that is trained."""


class NoneBetter(Exception):
    """Training that is taken up was over already."""


class HeldOut(TrainerCallback):
    """`losses` are those measured so far, nats over answer tokens by step; `samples` what was said by then to the first
    `evaluation.eval_samples` rows; `best` is the folder with the best adapter.

    `rows` are all that were held out; at most `evaluation.eval_loss_rows` of them are looked at, always the same ones. All
    ranks know the losses; rank 0 alone has samples and the best adapter.
    """

    def __init__(self, attempt: Attempt, loaded: Loaded, rows: Any, ladder: Ladder, group: Together) -> None:
        self.attempt, self.loaded, self.ladder, self.group = attempt, loaded, ladder, group
        self.spec = attempt.spec.evaluation
        count = min(len(rows), self.spec.eval_loss_rows)
        self.rows = rows.select([index * len(rows) // count for index in range(count)]) if count else rows
        self.losses: dict[int, float] = {}
        self.samples: Rows = []
        self.best: Path | None = None
        self._shown = ThreadPoolExecutor(1, thread_name_prefix="samples")  # training waits for no store
        self.trainer: Any = None

    def resume(self, checkpoint: Path) -> None:
        """Take up what a checkpoint's folder holds."""
        if (checkpoint / LOSSES).exists():
            stored = json.loads((checkpoint / LOSSES).read_text())
            self.losses = {int(step): float(loss) for step, loss in stored.items()}
            self.samples = [json.loads(line) for line in (checkpoint / SAMPLES).read_text().splitlines()]
            self.best = checkpoint / BEST if (checkpoint / BEST).exists() else None

    def put_into(self, checkpoint: Path) -> None:
        """Add what is known so far to a checkpoint's folder. The best adapter is not copied but linked."""
        if self.losses:
            (checkpoint / LOSSES).parent.mkdir(parents=True, exist_ok=True)
            (checkpoint / LOSSES).write_text(json.dumps(self.losses))
            (checkpoint / SAMPLES).write_bytes(jsonl(self.samples))
        if self.best is not None:
            shutil.copytree(self.best, checkpoint / BEST, copy_function=_linked)

    @property
    def is_over(self) -> bool:
        """Whether the last `patience` measurements were all no better than one before them."""
        if self.spec.patience is None or not self.losses:
            return False
        return sum(step > self.best_step for step in self.losses) >= self.spec.patience

    @property
    def best_step(self) -> int:
        """The step with the lowest loss; of several, the first."""
        return min(self.losses, key=lambda step: (self.losses[step], step))

    def is_due(self, last: int) -> bool:
        """Whether the last step is still to be measured."""
        return self.spec.eval_steps is not None and len(self.rows) > 0 and last not in self.losses

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self._measure_if_due(state)  # left out by the attempt that was stopped at this step
        self.attempt.preemption.check()
        if self.is_over or state.global_step == state.max_steps:
            raise NoneBetter  # upstream asks whether to stop behind the next step only

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        self._measure_if_due(state)
        if self.attempt.preemption.requested:
            control.should_save = True  # of this very step, so that what was dropped is due when it is taken up
        if self.is_over and not control.should_training_stop:
            control.should_training_stop = control.should_save = True
            log.info(
                "train: stops at step %d, since held-out loss has not fallen below that of step %d for %d measurements",
                state.global_step,
                self.best_step,
                self.spec.patience,
            )

    def finish(self, last: int) -> list[str]:
        """Put the best adapter into the model where the spec asks for it. Returns what to say of it, if anything."""
        taken, said = last, list[str]()
        if self.losses:
            self._shown.shutdown()
            self._show_samples(jsonl(self.samples))
            if self.spec.take == "best" and self.best_step != last:
                if self.best is not None:
                    load_adapter(self.loaded.model, self.best)
                self.group.as_first(self.loaded.model)
                taken = self.best_step
            said = [f"step {taken} is taken, with held-out loss {self.losses[taken]:.4f}"]
            said.append(f"the lowest is {self.losses[self.best_step]:.4f} at step {self.best_step}")
        self.attempt.record.update(step=last, taken_step=taken)
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
        if not self.attempt.preemption.requested:
            self._note(step, loss, answers)

    def _mean(self) -> float:
        """Mean loss of all answer tokens, weighted as in training; of those so far when a notice comes. Each rank takes its
        share of the rows."""

        def measure(places: Sequence[int]) -> list[tuple[float, float]]:
            if self.attempt.preemption.requested:
                return []
            return [self.trainer.loss_of([self.rows[place] for place in places])]

        places = range(self.group.ranks.rank, len(self.rows), self.group.ranks.world)
        measured = self._micro_batches(self.ladder.rows_at_once).map(places, measure)
        tokens = sum(count for _, count in measured)
        total = sum(loss * count for loss, count in measured)
        with suppress(Preempted):  # the step's line of numbers is still to be written
            total, tokens = self.group.sums(total, tokens)
        return total / tokens if tokens else math.nan

    def _answers(self, step: int) -> Rows:
        rows = [self.rows[place] for place in range(min(len(self.rows), self.spec.eval_samples))]
        if not rows or self.attempt.preemption.requested or self.group.ranks.rank:
            return []
        to_generation(self.loaded)
        frozen = self.trainer.frozen
        micro = self._micro_batches(len(rows))
        with torch.no_grad(), frozen.pixels() if frozen else nullcontext():
            said = micro.map(rows, lambda part: answer(self.loaded, list(part), self.spec.max_new_tokens))
        return [
            {"step": step, "id": row["id"], "reference": row["reference"], "generated": text}
            for row, (text, _) in zip(rows, said, strict=True)
        ]

    def _micro_batches(self, size: int) -> MicroBatches:
        cure = f"remove evaluation.eval_steps, shrink images with dataset.image_max_side, {last_cure(self.loaded.precision)}"
        return MicroBatches(size, "measuring on held-out rows while training", cure)

    def _note(self, step: int, loss: float, answers: Rows) -> None:
        self.losses[step] = round(loss, 6) if math.isfinite(loss) else math.inf
        self.samples += answers
        said = self.losses[step] if math.isfinite(loss) else None
        self.attempt.record.numbers(step=step, eval_loss=said)
        self.attempt.record.update(eval_loss=said, best_step=self.best_step)
        log.info("train: held-out loss %.4f at step %d, lowest at step %d", loss, step, self.best_step)
        self._shown.submit(self._show_samples, jsonl(self.samples))
        if self.best_step == step and self.spec.take == "best" and not self.group.ranks.rank:
            self.best = self.attempt.scratch / "best" / f"step-{step}"
            shutil.rmtree(self.best.parent, ignore_errors=True)
            self.loaded.model.save_pretrained(self.best)

    def _show_samples(self, samples: bytes) -> None:
        """A store that does not take them is reported and stops nothing."""
        if self.group.ranks.rank:
            return
        try:
            self.attempt.store.write(SAMPLES_KEY, samples)
        except Preempted:
            raise
        except JobError as error:
            log.warning("samples are not written: %s", error)


def _linked(source: str, target: str) -> None:
    """A second name for a file, which is never written again; a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
