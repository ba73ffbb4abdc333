"""SFTTrainer with deterministic sampling, token-normalised loss and preemption."""

from __future__ import annotations

import logging
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
from transformers.integrations import KubeflowCallback
from trl import SFTTrainer

from job.context import RunContext
from job.data import Row
from job.distributed.allreduce import AllReduce
from job.errors import DataError, OutOfMemory, Preempted
from job.model.collator import IGNORE, Collator
from job.model.families import Family, family_of
from job.model.image_layout import WEIGHTS, Uncuttable, cut
from job.model.load import to_generation, to_training
from job.model.loaded import Loaded, base, is_sharded
from job.model.memory_model import last_cure
from job.model.patches.compile_stance import compiled
from job.model.vision_cache import Features, VisionCache, vision_cache
from job.planning.plan import Plan
from job.runtime.preemption import Preemption
from job.runtime.scratch import free_bytes
from job.runtime.status import Record
from job.train.callbacks import Numbers, Safety, lost
from job.train.eval_callback import HeldOut, NoneBetter
from job.train.lengths import pass_tokens, unpadded_parts
from job.train.loss import count_tokens, token_loss
from job.train.oom_retry import StepRetry
from job.train.sampler import EpochOrder
from job.train.sft_config import arguments
from job.train.snapshot import Snapshot
from job.train.trackers import tracked

log = logging.getLogger("job")

ADAPTER = "adapter_model.safetensors"


class LoraTrainer(SFTTrainer):
    """SFTTrainer without model cards and the entropy pass, with an order unaffected by resuming, a vision cache for a frozen
    tower, and smaller micro-batches when one does not fit the GPU.

    Since the last metrics line: `rows_of_step` holds the rows seen, `tokens_of_step` counts their tokens, `waited` is the
    seconds spent waiting for the loader, `paused` those without training, `waits_of_step` those that each rank spent on the
    sum of gradients, one step earlier. `finite` records, without waiting for the GPU, whether every loss was finite.

    Upstream knows only one process. With more ranks, the order gives each its rows, and the step's last micro-batch ends with
    `_over_ranks`; only rank 0 saves, and only rank 0 knows the rows and tokens of all.
    """

    def __init__(
        self,
        *arguments: Any,
        record: Record,
        preemption: Preemption,
        retry: StepRetry,
        features: VisionCache | None,
        family: Family,
        group: AllReduce,
        compiles: bool,
        **named: Any,
    ) -> None:
        self.group, self.ranks, self.sharded = group, group.ranks, is_sharded(named["model"])
        super().__init__(*arguments, **named)
        self.record, self.preemption = record, preemption
        self.retry, self.features, self.compiles = retry, features, compiles
        self.layout, self.own_loss_divides = family.layout, family.loss_divides
        self.image_token = getattr(self.model.config, "image_token_id", None)
        self.pass_tokens = pass_tokens(self.args.device)
        # Upstream marks some families as unable to divide by the tokens of a step, and would give every micro-batch the same
        # weight, however few tokens it learns from. `compute_loss` divides for all.
        self.model_accepts_loss_kwargs = True
        self.rows_of_step: list[int] = []
        self.tokens_of_step = 0
        self.waited = 0.0
        self.paused = 0.0
        self.finite: torch.Tensor | bool = True
        self.own_rows, self.own_tokens, self.own_loss = list[int](), 0, torch.zeros(())
        self.waits_of_step: list[list[float]] = []
        self.snapshot = Snapshot(Path(str(self.args.output_dir)) / "unchanging")
        # Once, through upstream's code; it writes all but weights and states, which `snapshot` writes from copies.
        SFTTrainer._save(self, str(self.snapshot.unchanging), state_dict={})
        (self.snapshot.unchanging / ADAPTER).unlink()

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        rows = train_dataset if train_dataset is not None else self.train_dataset
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.ranks.world
        self.order = EpochOrder(len(rows), self.args.seed, batch, self.ranks.rank, self.ranks.world, even=self.sharded)
        return self.order

    def stop_loading(self) -> None:
        """End the loader's processes. The garbage collector would do so in the middle of a later stage, after the queues that
        tell them to end, and so wait 5 s for each (MP_STATUS_CHECK_INTERVAL of torch.utils.data)."""
        loader = self.callback_handler.train_dataloader.base_dataloader
        if (iterator := loader._iterator) is not None:
            iterator._shutdown_workers()

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Return the micro-batches of a step and its loss divisor. Unsloth's replacement ignores row weights."""
        began = time.monotonic()
        with self.preemption.leave_at_once():  # nothing of this step is done yet, and rows may take long
            batches = list(islice(epoch_iterator, num_batches))
        self.waited += time.monotonic() - began
        own = self.order.own(self.state.global_step)
        for batch in batches:  # the rows added to a short step teach nothing
            rows = batch["rows"]
            batch["rows"], batch["labels"][own:], own = rows[:own], IGNORE, max(own - len(rows), 0)
        items = count_tokens(batches).to(device) if batches else torch.zeros((), device=device)
        if self.ranks.world > 1:
            (total,) = self.group.sums(float(items))
            items = torch.tensor(total, device=self.args.device)
        if self.sharded:
            self.group.agree()
        return batches, items

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run forward and backward of one micro-batch, in parts of rows of like length. Returns the loss, detached."""
        numbers = inputs.pop("rows")
        tokens = int(inputs["attention_mask"][: len(numbers)].sum())
        loss = torch.zeros((), device=self.args.device)
        if numbers or self.sharded:
            # Whole if compiled, since every shape would be compiled anew, or sharded, since all ranks make the same passes.
            whole = self.compiles or self.sharded
            parts = [inputs] if whole else unpadded_parts(inputs, self.layout, self.image_token, self.pass_tokens)
            with self.group.connected(self.sharded):
                for part in parts:
                    loss = loss + self._part_step(model, part, num_items_in_batch)
        if self.ranks.world > 1:
            return self._over_ranks(loss, numbers, tokens)
        self.rows_of_step += numbers
        self.tokens_of_step += tokens
        self.finite = torch.isfinite(loss) & self.finite
        return loss

    def _part_step(self, model: Any, inputs: dict[str, Any], divisor: Any) -> torch.Tensor:
        """Run forward and backward of rows, in fewer at a time if the retry requires. Returns their loss, detached."""
        counts, keys = inputs.pop("pictures"), inputs.pop("picture_keys")

        def part(start: int, stop: int) -> torch.Tensor:
            cut_out = inputs
            if (start, stop) != (0, len(counts)):
                try:
                    cut_out = cut(inputs, self.layout, counts, range(start, stop), self.image_token)
                except Uncuttable as error:
                    raise OutOfMemory(self._too_large(len(counts), str(error))) from None
            named = keys[sum(counts[:start]) : sum(counts[:stop])]
            seen = self._seen(dict(cut_out), named)
            # Short batches and parts run eagerly: another number of rows would recompile everything, and how they run must not
            # depend on what was compiled before.
            with compiled(self.compiles and stop - start == self.args.per_device_train_batch_size):
                loss: torch.Tensor = Trainer.training_step(self, model, seen, divisor)
            return loss

        return self.retry.run(len(counts), model, part)

    def _over_ranks(self, loss: torch.Tensor, numbers: list[int], tokens: int) -> torch.Tensor:
        """Return 0 until the last micro-batch of a step, then the step's loss summed over all ranks; gradients are summed too."""
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
        """Return the model's inputs: with a frozen tower, features instead of pixels."""
        if self.features is None:
            return inputs
        inputs = self._prepare_inputs(inputs)
        with compiled(False), self.compute_loss_context_manager():
            return self.features.inputs(self.features.look(inputs, keys))

    @torch.no_grad()
    def loss_of(self, rows: list[Row]) -> tuple[float, float]:
        """Return the mean loss of rows without training on them, computed as in training, and its number of answer tokens
        (each multiplied by its row's weight)."""
        inputs = self.data_collator(rows)
        for name in ("rows", "pictures"):
            inputs.pop(name)
        keys = inputs.pop("picture_keys")
        count = float(count_tokens([inputs]))
        inputs = self._seen(self._prepare_inputs(inputs), keys)
        with self.compute_loss_context_manager():
            return float(self.compute_loss(self.model, inputs)), count

    def _too_large(self, rows: int, tensor: str) -> str:
        return (
            f"a micro-batch of {rows} rows does not fit the GPU, and its {tensor} cannot be split between them in a "
            f"{self.model.config.model_type} model; lower training.per_device_train_batch_size"
        )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs["use_cache"] = False
        if WEIGHTS in inputs or not self.own_loss_divides:
            return token_loss(model, inputs, num_items_in_batch)
        return Trainer.compute_loss(
            self, model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.ranks.rank:
            return
        if not self.finite:
            raise DataError(lost(self.state.global_step, "the loss is not a number", self.record))
        Trainer._save_checkpoint(self, model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        """Upstream's hook for weights and processor. It only makes the folder: the next hook copies all states at once."""
        Path(str(output_dir)).mkdir(parents=True, exist_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.snapshot.take(Path(output_dir), self.states())

    def states(self) -> dict[str, Any]:
        """Return the large states that change at every step, by upstream's file names."""
        weights = get_peft_model_state_dict(self.model)
        return {
            ADAPTER: weights,
            "optimizer.pt": self.optimizer.state_dict(),
            "scheduler.pt": self.lr_scheduler.state_dict(),
        }

    def save_state_now(self) -> None:
        """Save the trainer's own checkpoint of the last finished step, outside its schedule."""
        self._save_checkpoint(self.model, None)


@dataclass(frozen=True)
class NumberedRows:
    """Adds to the collator's batch what `LoraTrainer` takes out again: its row numbers, images per row and image keys. The
    batch has no pixels if the features of all images are cached."""

    collator: Collator
    features: Features | None

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
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
    """Tells the order which epoch begins, since upstream reaches the sampler only on some paths. Each rank draws its own
    dropout, the same whenever a step is repeated, so checkpoints need not hold each rank's state."""

    trainer: LoraTrainer
    begun = False

    def on_epoch_begin(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        if self.begun and args.dataloader_persistent_workers:
            torch.empty(
                (), dtype=torch.int64
            ).random_()  # draws the seed of a fresh loader, so that dropout continues identically
        self.begun = True
        self.trainer.order.set_epoch(state.global_step // self.trainer.order.steps)

    def on_step_begin(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        ranks = self.trainer.ranks
        if ranks.world > 1:
            torch.manual_seed((args.seed * 1_000_003 + state.global_step * ranks.world + ranks.rank) % 2**63)


def run_trainer(
    ctx: RunContext,
    plan: Plan,
    loaded: Loaded,
    rows: Any,
    safety: Safety,
    retry: StepRetry,
    held_out: HeldOut,
    group: AllReduce,
    resume_from: Path | None,
) -> int:
    """Train to the end and return the last step. `loaded.model` then holds the tuned adapters.

    Raises Preempted once the last finished step is safe, OutOfMemory when one row does not fit, DataError for an unusable row.
    """
    spec = ctx.spec
    truncate = spec.dataset.over_length == "truncate"
    collator = Collator(loaded.processor, spec.training.max_length, spec.training.train_on_responses_only, truncate)
    features = vision_kept(ctx, loaded, plan.features)
    numbers = Numbers(ctx.record, spec.training.effective_batch_size)
    epochs = _Epochs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = LoraTrainer(
            model=loaded.model,
            args=arguments(ctx, loaded, plan),
            train_dataset=rows,
            data_collator=NumberedRows(collator, features.features if features else None),
            processing_class=loaded.processor,
            callbacks=[numbers, safety, epochs, held_out],
            record=ctx.record,
            preemption=ctx.preemption,
            retry=retry,
            features=features,
            family=family_of(base(loaded.model).config.model_type),
            group=group,
            compiles=plan.compile,
        )
    # KubeflowCallback, which is there in a TrainJob, takes each rank for the first.
    for theirs in (PrinterCallback, ProgressCallback, *([KubeflowCallback] if group.ranks.rank else [])):
        trainer.remove_callback(theirs)
    safety.trainer = epochs.trainer = numbers.trainer = held_out.trainer = trainer
    to_training(loaded)
    group.as_first(loaded.model)
    with tracked(ctx):
        try:
            with features.given() if features else nullcontext(), suppress(NoneBetter):
                trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
            trainer.stop_loading()
        except Preempted:
            safety.leave()
            raise
        except torch.OutOfMemoryError as error:  # in the optimizer: the retry covers the rest
            smaller = "" if spec.training.optim == "adamw_8bit" else "set training.optim to adamw_8bit, "
            raise OutOfMemory(
                f"the optimizer's state does not fit the GPU; lower lora.r, {smaller}{last_cure(loaded.precision)}"
            ) from error
        finally:
            to_generation(loaded)
    return int(trainer.state.global_step)


def vision_kept(ctx: RunContext, loaded: Loaded, room: int | None) -> VisionCache | None:
    """Create the vision cache on scratch, which jobs on the same node share, limited to `room` bytes (None: half of the free
    space); None when the tower is trained."""
    free = free_bytes(ctx.scratch)
    room = free // 2 if room is None else min(room, free)
    room //= ctx.ranks.on_this_node()
    return vision_cache(loaded, ctx.scratch.parent / "features", room, ctx.spec.lora.bias)
