"""TRL's SFTTrainer, held to our order, our loss and our way of leaving."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from job.attempt import Attempt
from job.errors import DataError, JobError, OutOfMemory
from job.model import Loaded, to_generation, to_training
from job.model.collator import Collator
from job.plan import Plan
from job.spec import JobSpec
from job.train.callbacks import Numbers, Safety
from job.train.order import EpochOrder

log = logging.getLogger("job")


class LoraTrainer(SFTTrainer):
    """SFTTrainer less its model cards and entropy pass; with an order that resume cannot disturb.

    `rows_of_step` holds the numbers of the rows seen since the last line of numbers, one tensor a micro-batch.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.rows_of_step: list[torch.Tensor] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        rows = train_dataset if train_dataset is not None else self.train_dataset
        self.order = EpochOrder(len(rows), self.args.seed)
        return self.order

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs["use_cache"] = False
        return Trainer.compute_loss(
            self, model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        Trainer._save_checkpoint(self, model, trial)

    def save_state_now(self) -> None:
        """The trainer's own checkpoint of the last finished step, outside its schedule."""
        self._save_checkpoint(self.model, None)


@dataclass(frozen=True)
class NumberedRows:
    """The collator's batch with the numbers of its rows, which `LoraTrainer` notes and takes out again."""

    collator: Collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        numbers = [int(row["id"].removeprefix("row-")) for row in rows]
        return self.collator(rows) | {"rows": torch.tensor(numbers)}


class _Epochs(TrainerCallback):
    """Tells the order which epoch begins; upstream reaches the sampler on some paths only."""

    trainer: LoraTrainer

    def on_epoch_begin(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        self.trainer.order.set_epoch(state.global_step // steps_per_epoch(len(self.trainer.order), args))


def steps_per_epoch(rows: int, args: Any) -> int:
    """Optimizer steps in one pass: the last one may be short."""
    micro = -(-rows // args.per_device_train_batch_size)
    return int(-(-micro // args.gradient_accumulation_steps))


def train(attempt: Attempt, plan: Plan, loaded: Loaded, rows: Any, safety: Safety, resume_from: Path | None) -> int:
    """Train to the end and return the last step. `loaded.model` then holds the tuned adapters.

    Raises Preempted once the last finished step is safe, OutOfMemory when a micro-batch does not fit, DataError for
    a row that cannot be used.
    """
    spec = attempt.spec
    truncate = spec.dataset.over_length == "truncate"
    collator = Collator(loaded.processor, spec.training.max_length, spec.training.train_on_responses_only, truncate)
    numbers = Numbers(attempt.record, spec.training.effective_batch_size)
    epochs = _Epochs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = LoraTrainer(
            model=loaded.model,
            args=arguments(spec, loaded, plan, attempt.scratch),
            train_dataset=rows,
            data_collator=NumberedRows(collator),
            processing_class=loaded.processor,
            callbacks=[numbers, safety, epochs],
        )
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    safety.trainer = epochs.trainer = numbers.trainer = trainer
    to_training(loaded)
    try:
        result = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"a micro-batch of {plan.micro_batch} does not fit the GPU; lower training.per_device_train_batch_size, "
            "set model.precision to 4bit, or shrink images with dataset.image_max_side"
        ) from error
    except JobError:
        raise
    finally:
        to_generation(loaded)
    if not torch.isfinite(torch.tensor(result.training_loss)):
        raise DataError("the loss became NaN or infinite; lower training.learning_rate, or look for empty answers")
    return int(trainer.state.global_step)


def arguments(spec: JobSpec, loaded: Loaded, plan: Plan, scratch: Path) -> SFTConfig:
    """Our spec in TRL's words."""
    training, on_gpu = spec.training, loaded.device.type == "cuda"
    checkpointing = on_gpu if training.gradient_checkpointing == "auto" else training.gradient_checkpointing
    return SFTConfig(
        output_dir=str(scratch / "trainer"),
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
        dataloader_num_workers=training.dataloader_num_workers,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=spec.checkpoint.save_steps,
        report_to=[],
        disable_tqdm=True,
    )
