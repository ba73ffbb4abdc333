"""Generates greedy answers to held-out rows in batches, and measures the loss of the true answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from job.config.schema import JobSpec
from job.data import Row
from job.distributed.allreduce import AllReduce
from job.distributed.ranks import ONE, Ranks
from job.evaluate.records import Answer, from_json
from job.model.collator import IGNORE, Collator, encode, render
from job.model.decoding import generate
from job.model.load import to_generation
from job.model.loaded import Loaded, is_sharded, logits_at, without_gradients
from job.model.memory_model import last_cure
from job.model.oom_retry import MicroBatches

ANY_LENGTH = 1 << 20


def generations(
    loaded: Loaded,
    rows: Any,
    spec: JobSpec,
    *,
    tuned: bool,
    order: Sequence[int],
    known: Sequence[Answer] = (),
    each: Callable[[list[Answer]], None] = lambda batch: None,
    ranks: Ranks = ONE,
) -> list[Answer]:
    """Return the answer to each row, in the order of `rows`.

    `tuned` False disables the adapters, which gives the base model. Batches are cut from `order`, positions of all rows, even
    those in `known`: answers of an earlier attempt, which are not generated again. So a row has the same neighbours, and the
    same answer, however often the job was stopped and whichever of the `ranks` generates it. `each` is called with every
    finished batch.
    """
    finished = {answer.id: answer for answer in known}
    batches = _batches(rows, order, spec.evaluation.batch, finished)
    agree_on_batches(ranks, batches)
    for made in answers(loaded, rows, spec, tuned, batches, ranks):
        finished |= {answer.id: answer for answer in made}
        each(made)
    return [finished[identity] for identity in rows_ids(rows)]


def agree_on_batches(ranks: Ranks, missing: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """Return the batches that rank 0 finds `missing`, on every rank."""
    return ranks.shared("batches", missing)


def answers(
    loaded: Loaded, rows: Any, spec: JobSpec, tuned: bool, batches: Sequence[Sequence[int]], ranks: Ranks
) -> Iterator[list[Answer]]:
    """Yield the answers of each batch (positions in `rows`) as all ranks together finish them; on ranks other than 0, nothing."""
    if not batches:
        return
    to_generation(loaded)
    micro = micro_batches(loaded, spec.evaluation.batch, "evaluation")
    with base_or_tuned(loaded, tuned):
        spread = AllReduce(ranks).rounds if is_sharded(loaded.model) else ranks.spread
        yield from spread(
            "answers",
            batches,
            lambda batch: micro.map(
                _with_other_images([rows[n] for n in batch]), lambda part: _generate(loaded, list(part), spec)
            ),
        )


def micro_batches(loaded: Loaded, size: int, what: str) -> MicroBatches:
    """Create micro-batches of `size` rows; `what` names the work."""
    sharded = is_sharded(loaded.model)
    first = "lower evaluation.batch_size, " if sharded else ""
    cure = f"{first}shrink images with dataset.image_max_side, {last_cure(loaded.precision)}"
    return MicroBatches(size, what, cure, whole=sharded)


def rows_ids(rows: Any) -> list[str]:
    """Return row ids in order, without opening an image."""
    numbers = rows.with_format(None)["_row"]
    return [f"row-{number}" for number in numbers]


@contextmanager
def base_or_tuned(loaded: Loaded, tuned: bool) -> Iterator[None]:
    """Disable the adapters if `tuned` is False. Biases trained by lora.bias stay as they are."""
    with ExitStack() as stack:
        if not tuned:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias", UserWarning)
            stack.enter_context(loaded.model.disable_adapter())
        yield


def _batches(rows: Any, order: Sequence[int], size: int, finished: Container[str]) -> list[Sequence[int]]:
    """Return the positions of whole batches with any missing row."""
    ids = rows_ids(rows)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return [batch for batch in batches if any(ids[place] not in finished for place in batch)]


def _with_other_images(batch: list[Row]) -> list[tuple[Row, list[Any] | None]]:
    """Pair each row of a batch with the images of the next one that is of another unit and has as many; None if there is none."""
    found: list[tuple[Row, list[Any] | None]] = []
    for place, row in enumerate(batch):
        others = (*batch[place + 1 :], *batch[:place])
        fit = (
            other["images"]
            for other in others
            if len(other["images"]) == len(row["images"]) > 0 and other["unit"] != row["unit"]
        )
        found.append((row, next(fit, None)))
    return found


def _generate(loaded: Loaded, batch: list[tuple[Row, list[Any] | None]], spec: JobSpec) -> list[Answer]:
    rows = [row for row, _ in batch]
    length, truncate = spec.training.max_length, spec.dataset.over_length == "truncate"
    swapped = [Row({**row, "images": other}) for row, other in batch if other]
    swapped_length = length if truncate else ANY_LENGTH  # other images may take more tokens than the row's own
    with without_gradients(loaded.model):
        texts = answer(loaded, rows, spec.evaluation.max_new_tokens)
        losses = answer_losses(loaded, rows, length, truncate)
        with_others = iter(answer_losses(loaded, swapped, swapped_length, truncate) if swapped else ())
        if not swapped and is_sharded(loaded.model):
            answer_losses(loaded, rows, length, truncate)  # while other ranks look at other images
    return [
        from_json(
            Answer,
            row
            | {"generated": text, "tokens": count, "loss": loss, "answer_tokens": answer_tokens}
            | {"swapped_loss": next(with_others)[0] if other else None},
        )
        for (row, other), (text, count), (loss, answer_tokens) in zip(batch, texts, losses, strict=True)
    ]


def answer(loaded: Loaded, batch: list[Row], max_new_tokens: int) -> list[tuple[str, int]]:
    """Return greedy answers and their lengths in tokens, including the token that ends them."""
    processor = loaded.processor
    prompts = [render(processor, _prompt(row["messages"]), prompt=True) for row in batch]
    inputs = to_device(encode(processor, prompts, [row["images"] for row in batch], side="left"), loaded)
    tokenizer = processor.tokenizer
    # Unsloth uses its own padding token unless one is given. All else is in the model's generation config: see `greedy`.
    produced = generate(loaded, inputs, max_new_tokens, pad_token_id=tokenizer.pad_token_id)
    answers = produced[:, inputs["input_ids"].shape[1] :]
    ends = torch.isin(answers, torch.tensor(loaded.model.generation_config.eos_token_id, device=answers.device))
    lengths = [row.index(True) + 1 if True in row else len(row) for row in ends.tolist()]
    texts = tokenizer.batch_decode(answers.masked_fill(ends, tokenizer.pad_token_id), skip_special_tokens=True)
    return [(text.strip(), length) for text, length in zip(texts, lengths, strict=True)]


def _prompt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the conversation up to its last answer."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def answer_losses(loaded: Loaded, batch: list[Row], max_length: int, truncate: bool = False) -> list[tuple[float, int]]:
    """Return the mean cross-entropy (nats) and number of tokens of each row's true answer."""
    logits, targets, counts = answer_logits(loaded, batch, max_length, truncate)
    losses = cross_entropy(logits.float(), targets, reduction="none")
    means = [part.sum() / max(len(part), 1) for part in torch.split(losses, counts)]
    return [(round(float(mean), 6), count) for mean, count in zip(means, counts, strict=True)]


def answer_logits(
    loaded: Loaded, batch: list[Row], max_length: int, truncate: bool = False
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Return the logits (answer tokens, vocabulary) that predict the true answers, in the model's dtype on its device; the
    true tokens (answer tokens); and how many of them each row has, row after row.

    The model computes logits only at the columns of answer tokens: those of a whole batch, with a vocabulary of 128,000, take
    gigabytes.
    """
    inputs = Collator(loaded.processor, max_length, truncate=truncate)(batch)
    labels = inputs.pop("labels")[:, 1:].to(loaded.device)
    wanted = labels != IGNORE
    columns = wanted.any(dim=0).nonzero()[:, 0]
    logits = logits_at(loaded.model, to_device(inputs, loaded), columns)
    return logits[wanted[:, columns]], labels[wanted], wanted.sum(dim=1).tolist()


def to_device(batch: dict[str, torch.Tensor], loaded: Loaded) -> dict[str, torch.Tensor]:
    """Move tensors to the model's device, images in the model's dtype."""
    dtype = torch.float32 if loaded.precision == "32bit" else torch.bfloat16
    return {
        name: tensor.to(loaded.device, dtype if tensor.is_floating_point() else None) for name, tensor in batch.items()
    }
