"""What the model says to held-out rows: greedy, batched, and how surprised it is by the true answers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from job.evaluate.before import OWN
from job.model import Loaded, to_generation
from job.model.collator import IGNORE, Collator, encode, render
from job.model.memory import last_cure
from job.model.oom_retry import MicroBatches
from job.ranks import ONE, Ranks
from job.spec import JobSpec

Generation = dict[str, Any]

# All said outright, since a model's own generation config may sample, or punish repeats (and with them the padding).
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "use_cache": True,  # which trainers switch off in the model's config
}


def generations(
    loaded: Loaded,
    rows: Any,
    spec: JobSpec,
    *,
    tuned: bool,
    order: Sequence[int],
    known: Sequence[Generation] = (),
    each: Callable[[list[Generation]], None] = lambda batch: None,
    ranks: Ranks = ONE,
) -> list[Generation]:
    """One record a row, in the order of `rows`: `id, reference, generated, labels, groups, unit,
    tokens, loss, answer_tokens`.

    `tuned` False silences the adapters, which gives the base model. Batches are cut from `order`, places of all rows,
    whatever is `known`: records of an earlier attempt, which are not made again. So a row has the same neighbours, and the
    same answer, however often the job was stopped, and whichever of the `ranks` makes it. `each` is called with every
    finished batch. `loss` is the mean over the answer's tokens, nats.
    """
    finished = {record["id"]: record for record in known}
    batches = _batches(rows, order, spec.evaluation.batch, finished)
    ranks.ask("answer", tuned, batches)
    for made in answers(loaded, rows, spec, tuned, batches, ranks):
        finished |= {record["id"]: record for record in made}
        each(made)
    return [finished[identity] for identity in rows_ids(rows)]


def answers(
    loaded: Loaded, rows: Any, spec: JobSpec, tuned: bool, batches: Sequence[Sequence[int]], ranks: Ranks
) -> Iterator[list[Generation]]:
    """Records of each batch (places of `rows`), as they are made by all ranks together; nothing on others than rank 0."""
    to_generation(loaded)
    micro = micro_batches(loaded, spec.evaluation.batch, "evaluation")
    with base_or_tuned(loaded, tuned):
        yield from ranks.spread(
            "answers",
            batches,
            lambda batch: micro.map([rows[n] for n in batch], lambda part: _generate(loaded, list(part), spec)),
        )


def micro_batches(loaded: Loaded, size: int, what: str) -> MicroBatches:
    """Micro-batches of `size` rows; `what` names the work."""
    return MicroBatches(size, what, f"shrink images with dataset.image_max_side, {last_cure(loaded.precision)}")


def rows_ids(rows: Any) -> list[str]:
    """Ids of rows in order, without opening an image."""
    numbers = rows.with_format(None)["_row"]
    return [f"row-{number}" for number in numbers]


@contextmanager
def base_or_tuned(loaded: Loaded, tuned: bool) -> Iterator[None]:
    """With `tuned` False the adapters are silent. Biases, where lora.bias has them trained, stay as they are."""
    with ExitStack() as stack:
        if not tuned:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias", UserWarning)
            stack.enter_context(loaded.model.disable_adapter())
        yield


def _batches(rows: Any, order: Sequence[int], size: int, finished: dict[str, Generation]) -> list[Sequence[int]]:
    """Places of whole batches that miss any row."""
    ids = rows_ids(rows)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return [batch for batch in batches if any(ids[place] not in finished for place in batch)]


@torch.inference_mode()
def _generate(loaded: Loaded, batch: list[dict[str, Any]], spec: JobSpec) -> list[Generation]:
    texts = answer(loaded, batch, spec.evaluation.max_new_tokens)
    losses = answer_losses(loaded, batch, spec.training.max_length, spec.dataset.over_length == "truncate")
    return [
        {name: row[name] for name in OWN}
        | {"generated": text, "tokens": count, "loss": loss, "answer_tokens": answer_tokens}
        for row, (text, count), (loss, answer_tokens) in zip(batch, texts, losses, strict=True)
    ]


def answer(loaded: Loaded, batch: list[dict[str, Any]], max_new_tokens: int) -> list[tuple[str, int]]:
    """Greedy answers and their lengths in tokens."""
    processor = loaded.processor
    prompts = [render(processor, _prompt(row["messages"]), prompt=True) for row in batch]
    inputs = to_device(encode(processor, prompts, [row["images"] for row in batch], side="left"), loaded)
    tokenizer = processor.tokenizer
    produced = loaded.model.generate(
        **inputs, **GREEDY, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id
    )
    answers = produced[:, inputs["input_ids"].shape[1] :]
    lengths = [int((row != tokenizer.pad_token_id).sum()) for row in answers]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [(text.strip(), length) for text, length in zip(texts, lengths, strict=True)]


def _prompt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation up to its last answer."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def answer_losses(
    loaded: Loaded, batch: list[dict[str, Any]], max_length: int, truncate: bool = False
) -> list[tuple[float, int]]:
    """Mean cross-entropy (nats) of each row's true answer, and how many tokens it has."""
    logits, targets, counts = answer_logits(loaded, batch, max_length, truncate)
    losses = cross_entropy(logits.float(), targets, reduction="none")
    means = [part.sum() / max(len(part), 1) for part in torch.split(losses, counts)]
    return [(round(float(mean), 6), count) for mean, count in zip(means, counts, strict=True)]


def answer_logits(
    loaded: Loaded, batch: list[dict[str, Any]], max_length: int, truncate: bool = False
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Logits (answer tokens, vocabulary) at the places that predict the true answers, in the model's dtype on its device; the
    true tokens (answer tokens); and how many of them each row has, row after row.

    The model computes logits at the columns of answer tokens only: those of a whole batch, with a vocabulary of 128,000,
    take gigabytes.
    """
    inputs = Collator(loaded.processor, max_length, truncate=truncate)(batch)
    labels = inputs.pop("labels")[:, 1:].to(loaded.device)
    wanted = labels != IGNORE
    columns = wanted.any(dim=0).nonzero()[:, 0]
    keep = {"logits_to_keep": columns} if _keeps_logits(loaded.model) else {}
    logits = loaded.model(**to_device(inputs, loaded), **keep).logits
    if logits.shape[1] != len(columns):
        logits = logits[:, columns]
    return logits[wanted[:, columns]], labels[wanted], wanted.sum(dim=1).tolist()


def _keeps_logits(model: Any) -> bool:
    """Whether the forward of the base model takes `logits_to_keep`, as those of transformers' language models do."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(type(bare).forward).parameters


def to_device(batch: dict[str, torch.Tensor], loaded: Loaded) -> dict[str, torch.Tensor]:
    """Tensors on the model's device, pictures in the model's dtype."""
    dtype = torch.float32 if loaded.precision == "32bit" else torch.bfloat16
    return {
        name: tensor.to(loaded.device, dtype if tensor.is_floating_point() else None) for name, tensor in batch.items()
    }
