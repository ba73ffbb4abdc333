"""TRL's SFTTrainer, held to our order, our loss and our way of leaving."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from job.attempt import Attempt
from job.errors import DataError, OutOfMemory, Preempted, SpecError
from job.model import Loaded, to_generation, to_training
from job.model.collator import Collator
from job.model.compiling import compiled
from job.model.frozen import Features, Frozen, base, frozen_vision
from job.model.memory import last_cure
from job.model.pictures import LAYOUTS, Layout, cut
from job.plan import Plan
from job.preemption import Preemption
from job.record import Record
from job.scratch import free_bytes
from job.train.callbacks import Numbers, Safety, lost
from job.train.held_out import HeldOut, NoneBetter
from job.train.ladder import Ladder
from job.train.order import EpochOrder
from job.train.snapshot import Snapshot
from job.train.together import Together
from job.train.trackers import tracked
from job.train.weights import WEIGHTS, sum_of_weights, weighted_loss

log = logging.getLogger("job")

ADAPTER = "adapter_model.safetensors"
SHARED_BYTES = 500_000_000
"""Of /dev/shm for one loader: two batches of eight four-tile pictures in float32."""


class LoraTrainer(SFTTrainer):
    """SFTTrainer less its model cards and entropy pass; with an order that resume cannot disturb, a frozen vision tower
    that is asked once, and a way on when a micro-batch does not fit the card.

    Since the last line of numbers: `rows_of_step` holds the rows seen, `tokens_of_step` counts their tokens, `waited` the
    seconds spent waiting for the loader, `paused` those in which nothing was trained, `waits_of_step` those that each rank
    spent on the sum of gradients, a step earlier. `finite` tells, without waiting for the GPU, whether every loss was a
    number.

    Upstream knows of one process alone. With more ranks the order gives each its rows, and the step's last micro-batch ends
    with `_over_ranks`; only rank 0 saves, and only rank 0 knows the rows and tokens of all.
    """

    def __init__(
        self,
        *arguments: Any,
        record: Record,
        preemption: Preemption,
        ladder: Ladder,
        frozen: Frozen | None,
        layout: Layout | None,
        group: Together,
        compiles: bool,
        **named: Any,
    ) -> None:
        self.group, self.ranks = group, group.ranks
        super().__init__(*arguments, **named)
        self.record, self.preemption = record, preemption
        self.ladder, self.frozen, self.layout, self.compiles = ladder, frozen, layout, compiles
        if layout is not None:
            # Upstream calls some families unable to divide by the tokens of the whole step, though their forwards do it.
            # Without, each micro-batch has the same weight, however few tokens it learns from.
            self.model_accepts_loss_kwargs = True
            # Upstream asks whether the loss is its own, which Unsloth replaces, and would count first tokens as learned.
            self._loss_shifts_labels = True
        self.rows_of_step: list[int] = []
        self.tokens_of_step = 0
        self.waited = 0.0
        self.paused = 0.0
        self.finite: torch.Tensor | bool = True
        self.own_rows, self.own_tokens, self.own_loss = list[int](), 0, torch.zeros(())
        self.waits_of_step: list[list[float]] = []
        self.snapshot = Snapshot(Path(str(self.args.output_dir)) / "unchanging")
        # Once, and by upstream's own hand; it writes all but weights and states, which `snapshot` does from copies.
        SFTTrainer._save(self, str(self.snapshot.unchanging), state_dict={})
        (self.snapshot.unchanging / ADAPTER).unlink()

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        rows = train_dataset if train_dataset is not None else self.train_dataset
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.ranks.world
        self.order = EpochOrder(len(rows), self.args.seed, batch, self.ranks.rank, self.ranks.world)
        return self.order

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step, and what its loss is divided by. As upstream does it, which Unsloth replaces by a
        count that knows no weights."""
        began = time.monotonic()
        with self.preemption.leave_at_once():  # nothing of this step is made yet, and rows may be long in coming
            batches = list(islice(epoch_iterator, num_batches))
        self.waited += time.monotonic() - began
        items = self._get_num_items_in_batch(batches, device)
        if self.ranks.world > 1:
            if items is None:
                raise SpecError("model.name_or_path: this model's loss cannot be divided over several devices; use one")
            if self.order.idle(self.state.global_step):
                for batch in batches:
                    batch["rows"].clear()
                items = 0
            (total,) = self.group.sums(float(items))
            items = torch.tensor(total, device=self.args.device)
        return batches, items

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one micro-batch, in as many parts as the ladder says. Returns the loss, detached."""
        numbers, counts, keys = inputs.pop("rows"), inputs.pop("pictures"), inputs.pop("picture_keys")
        tokens = int(inputs["attention_mask"].sum())

        def part(start: int, stop: int) -> torch.Tensor:
            cut_out = inputs
            if (start, stop) != (0, len(counts)):
                if self.layout is None:
                    raise OutOfMemory(self._too_large(len(counts)))
                cut_out = cut(inputs, self.layout, counts, start, stop)
            named = keys[sum(counts[:start]) : sum(counts[:stop])]
            seen = self._seen(dict(cut_out), named)
            # Short batches and parts of one run eagerly: another number of rows would compile all anew, and what they ran
            # as must not depend on what was compiled before.
            with compiled(self.compiles and stop - start == self.args.per_device_train_batch_size):
                loss: torch.Tensor = Trainer.training_step(self, model, seen, num_items_in_batch)
            return loss

        if self.ranks.world > 1:
            loss = self.ladder.climb(len(counts), model, part) if numbers else torch.zeros((), device=self.args.device)
            return self._over_ranks(loss, numbers, tokens if numbers else 0)
        loss = self.ladder.climb(len(counts), model, part)
        self.rows_of_step += numbers
        self.tokens_of_step += tokens
        self.finite = torch.isfinite(loss) & self.finite
        return loss

    def _over_ranks(self, loss: torch.Tensor, numbers: list[int], tokens: int) -> torch.Tensor:
        """0 until the last micro-batch of a step; then the loss of all of them on all ranks, and gradients likewise."""
        self.own_rows, self.own_tokens = self.own_rows + numbers, self.own_tokens + tokens
        self.own_loss = self.own_loss.to(loss.device) + loss
        if not self.accelerator.gradient_state.sync_gradients:
            return torch.zeros_like(loss)
        shares = self.ranks.gathered("rows of a step", (self.own_rows, self.own_tokens, self.group.waited))
        total = self.group.add_up([weight for weight in self.model.parameters() if weight.requires_grad], self.own_loss)
        self.finite = torch.isfinite(total) & self.finite
        self.rows_of_step += [row for row in chain(*zip_longest(*(share[0] for share in shares))) if row is not None]
        self.tokens_of_step += sum(tokens for _, tokens, _ in shares)
        self.waits_of_step.append([waited for _, _, waited in shares])
        self.own_rows, self.own_tokens, self.own_loss = [], 0, torch.zeros(())
        return total

    def _seen(self, inputs: dict[str, torch.Tensor], keys: list[str]) -> dict[str, torch.Tensor]:
        """What the model takes: with a frozen tower, features instead of pixels."""
        if self.frozen is None:
            return inputs
        inputs = self._prepare_inputs(inputs)
        with compiled(False), self.compute_loss_context_manager():
            return self.frozen.inputs(self.frozen.look(inputs, keys))

    @torch.no_grad()
    def loss_of(self, rows: list[dict[str, Any]]) -> tuple[float, float]:
        """Mean loss of rows that are not trained on, as training takes it, and over how many answer tokens (each as often as
        its row's weight says)."""
        inputs = self.data_collator(rows)
        for name in ("rows", "pictures"):
            inputs.pop(name)
        keys = inputs.pop("picture_keys")
        weights = inputs.get(WEIGHTS, torch.ones(len(rows)))
        count = float(sum_of_weights([{WEIGHTS: weights, "labels": inputs["labels"]}]))
        inputs = self._seen(self._prepare_inputs(inputs), keys)
        with self.compute_loss_context_manager():
            return float(self.compute_loss(self.model, inputs)), count

    def _too_large(self, rows: int) -> str:
        return (
            f"a micro-batch of {rows} does not fit the GPU, and pictures of a {self.model.config.model_type} model cannot "
            "be taken apart here; lower training.per_device_train_batch_size"
        )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs["use_cache"] = False
        if WEIGHTS in inputs:
            return weighted_loss(model, inputs, num_items_in_batch)
        return Trainer.compute_loss(
            self, model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """What the loss of a step is divided by: its answer tokens, each as often as its row's weight says."""
        if not batch_samples or WEIGHTS not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        return sum_of_weights(batch_samples).to(device)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.ranks.rank:
            return
        if not self.finite:
            raise DataError(lost(self.state.global_step, "the loss is no number any more", self.record))
        Trainer._save_checkpoint(self, model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        """Upstream's hook for weights and processor. Here only the folder: the next hook copies all states at once."""
        Path(str(output_dir)).mkdir(parents=True, exist_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.snapshot.take(Path(output_dir), self.states())

    def states(self) -> dict[str, Any]:
        """What changes from step to step and is large, by upstream's file names."""
        weights = get_peft_model_state_dict(self.model)
        return {
            ADAPTER: weights,
            "optimizer.pt": self.optimizer.state_dict(),
            "scheduler.pt": self.lr_scheduler.state_dict(),
        }

    def save_state_now(self) -> None:
        """The trainer's own checkpoint of the last finished step, outside its schedule."""
        self._save_checkpoint(self.model, None)


@dataclass(frozen=True)
class NumberedRows:
    """The collator's batch with what `LoraTrainer` takes out again: the numbers of its rows, how many pictures each has,
    and the pictures' keys. Where the features of all pictures are kept, it has no pixels."""

    collator: Collator
    features: Features | None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, torch.Tensor] = self.collator(rows)
        images = [row["images"] for row in rows]
        keys = list[str]()
        if self.features is not None:
            batch, keys = self.features.recall(batch, images)
        numbers = [int(row["id"].removeprefix("row-")) for row in rows]
        if "weight" in rows[0]:
            batch[WEIGHTS] = torch.tensor([row["weight"] for row in rows], dtype=torch.float32)
        return {**batch, "rows": numbers, "pictures": [len(each) for each in images], "picture_keys": keys}


class _Epochs(TrainerCallback):
    """Tells the order which epoch begins; upstream reaches the sampler on some paths only. Ranks draw dropout of their own,
    the same whenever a step is made again: so no checkpoint need hold the state of each."""

    trainer: LoraTrainer
    begun = False

    def on_epoch_begin(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        if self.begun and args.dataloader_persistent_workers:
            torch.empty(
                (), dtype=torch.int64
            ).random_()  # the seed that a fresh loader draws, for dropout to go on alike
        self.begun = True
        self.trainer.order.set_epoch(state.global_step // self.trainer.order.steps)

    def on_step_begin(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        ranks = self.trainer.ranks
        if ranks.world > 1:
            torch.manual_seed((args.seed * 1_000_003 + state.global_step * ranks.world + ranks.rank) % 2**63)


def train(
    attempt: Attempt,
    plan: Plan,
    loaded: Loaded,
    rows: Any,
    safety: Safety,
    ladder: Ladder,
    held_out: HeldOut,
    group: Together,
    resume_from: Path | None,
) -> int:
    """Train to the end and return the last step. `loaded.model` then holds the tuned adapters.

    Raises Preempted once the last finished step is safe, OutOfMemory when one row does not fit, DataError for a row
    that cannot be used.
    """
    spec = attempt.spec
    truncate = spec.dataset.over_length == "truncate"
    collator = Collator(loaded.processor, spec.training.max_length, spec.training.train_on_responses_only, truncate)
    frozen = vision_kept(attempt, loaded, plan.features)
    numbers = Numbers(attempt.record, spec.training.effective_batch_size)
    epochs = _Epochs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = LoraTrainer(
            model=loaded.model,
            args=arguments(attempt, loaded, plan),
            train_dataset=rows,
            data_collator=NumberedRows(collator, frozen.features if frozen else None),
            processing_class=loaded.processor,
            callbacks=[numbers, safety, epochs, held_out],
            record=attempt.record,
            preemption=attempt.preemption,
            ladder=ladder,
            frozen=frozen,
            layout=LAYOUTS.get(base(loaded.model).config.model_type),
            group=group,
            compiles=plan.compile,
        )
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    safety.trainer = epochs.trainer = numbers.trainer = held_out.trainer = trainer
    to_training(loaded)
    group.as_first(loaded.model)
    with tracked([] if group.ranks.rank else spec.training.report_to, attempt) as trackers:
        for tracker in trackers:
            trainer.add_callback(tracker)
        try:
            with frozen.given() if frozen else nullcontext(), suppress(NoneBetter):
                trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        except Preempted:
            safety.leave()
            raise
        except torch.OutOfMemoryError as error:  # in the optimizer: the ladder has the rest
            smaller = "" if spec.training.optim == "adamw_8bit" else "set training.optim to adamw_8bit, "
            raise OutOfMemory(
                f"the optimizer's state does not fit the GPU; lower lora.r, {smaller}{last_cure(loaded.precision)}"
            ) from error
        finally:
            to_generation(loaded)
    return int(trainer.state.global_step)


def vision_kept(attempt: Attempt, loaded: Loaded, room: int | None) -> Frozen | None:
    """A frozen tower with its features on scratch, in `room` bytes of it (None: half of what is free), which jobs on the same
    node share; None when the tower is trained."""
    free = free_bytes(attempt.scratch)
    room = free // 2 if room is None else min(room, free)
    room //= attempt.ranks.on_this_node()
    return frozen_vision(loaded, attempt.scratch.parent / "features", room, attempt.spec.lora.bias)


def loader_workers(given: int | str, on_gpu: bool) -> int:
    """`auto` is none on a CPU, where they would take cores from training; else up to four, as many as there are cores and
    as /dev/shm, through which they hand on pixels, has room for."""
    if isinstance(given, int):
        return given
    shared = free_bytes(Path("/dev/shm"))
    return min(4, len(os.sched_getaffinity(0)) - 1, shared // SHARED_BYTES) if on_gpu else 0


def arguments(attempt: Attempt, loaded: Loaded, plan: Plan) -> SFTConfig:
    """Our spec in TRL's words."""
    spec = attempt.spec
    training, on_gpu = spec.training, loaded.device.type == "cuda"
    workers = loader_workers(training.dataloader_num_workers, on_gpu)
    checkpointing = plan.kept != "all"
    return SFTConfig(
        output_dir=str(attempt.scratch / "trainer"),
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
        report_to=[],  # `tracked` does
        run_name=spec.name,
        disable_tqdm=True,
    )
