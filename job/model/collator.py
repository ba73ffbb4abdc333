"""Conversations → tensors, with a label mask that is right for every family. One collator serves both backends.

TRL's own collator leaves mllama's image token (outside the vocabulary) in the labels; Unsloth's trains on the prompt
unless told the template's markers. Here the answer's place is found from the template itself: the tokens that the
rendered conversation, its images expanded as the processor expands them, has beyond the rendered prompt.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jinja2 import TemplateError
from torch.utils.data import get_worker_info

from job.errors import DataError

IGNORE = -100
DATE = "26 Jul 2024"
"""Llama 3.2's own default. Its template writes today's into a system turn, and a run resumed tomorrow would differ."""
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Collator:
    """Call with rows `{"id", "messages", "images"}`.

    Returns the processor's tensors, padded on the right, of shape (rows, tokens), and `labels` of the same shape:
    token ids where the loss is taken, -100 elsewhere. Raises DataError for a row of more than `max_length` tokens; with
    `truncate`, its last answer is cut there instead, if images and prompt fit.
    """

    processor: Any
    max_length: int
    responses_only: bool = True
    truncate: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if get_worker_info() is not None:
            reuse_memory(os.getpid())
        texts = [finished(self.processor, row["messages"]) for row in rows]
        batch, expansions = _encode(self.processor, texts, [row["images"] for row in rows], side="right")
        labels = torch.full_like(batch["input_ids"], IGNORE)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
            spans = self._spans(row["messages"], text, expansions[index], lengths[index])
            if lengths[index] > self.max_length and not (self.truncate and spans[-1][0] < self.max_length):
                raise DataError(
                    f"{row['id']}: {lengths[index]} tokens, over training.max_length {self.max_length}; raise it, or "
                    "shrink images with dataset.image_max_side"
                )
            for start, end in spans:
                labels[index, start:end] = batch["input_ids"][index, start:end]
        labels[torch.isin(labels, torch.tensor(never_learned(self.processor)))] = IGNORE
        return cut(batch | {"labels": labels}, self.max_length)

    def _spans(self, messages: Messages, text: str, expansions: list[str], length: int) -> list[tuple[int, int]]:
        """Half-open token ranges that the loss is taken over."""
        if not self.responses_only:
            return [(0, length)]
        answers = _answers(messages)
        if not any(part["type"] == "image" for message in messages[answers[0] :] for part in message["content"]):
            # Answers are counted from the end, so what comes before them need not be spelled out.
            expansions = [self.processor.image_token] * len(expansions)
        whole = tokens(self.processor, expand(self.processor, text, expansions))
        return [answer_span(self.processor, messages, turn, whole, expansions, length) for turn in answers]


@lru_cache(1)
def reuse_memory(_process: int) -> None:
    """In a loader's process: what is freed is kept for the next batch. glibc maps blocks of over 32 MB anew each time, and the
    kernel clears every page of them: half of the time that images take (benchmarks/loader.py)."""
    with suppress(AttributeError, OSError):  # another C library
        settings = ctypes.CDLL(None).mallopt
        settings(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
        settings(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the top of the heap is not given back


def cut(batch: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Everything that has one entry a token, at most `length` of them."""
    shape = batch["input_ids"].shape
    if shape[1] <= length:
        return batch
    return {name: each[:, :length] if each.shape[:2] == shape else each for name, each in batch.items()}


def _answers(messages: Messages) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def answer_span(
    processor: Any, messages: Messages, turn: int, whole: list[int], expansions: list[str], length: int
) -> tuple[int, int]:
    """Where the answer of `turn` and its end-of-turn token lie among the `length` tokens of the conversation.

    Counted from the end of `whole`, the ids of its text with `expansions` put for its images, which are what the processor puts
    for each if images stand behind an answer. Raises DataError for a template that rewrites earlier turns.
    """
    before = tokens(processor, expand(processor, render(processor, messages[:turn], prompt=True), expansions))
    said = finished(processor, messages[: turn + 1]).rstrip()
    after = tokens(processor, expand(processor, said, expansions))
    start, end = _common(whole, before), _common(whole, after)
    if start < len(before) - 1 or end <= start:
        raise DataError(
            "the model's chat template rewrites earlier turns, so the answer cannot be told from the prompt"
        )
    return length - len(whole) + start, length - len(whole) + end


def expand(processor: Any, text: str, expansions: list[str]) -> str:
    """The text with what the processor puts for its first image in place of its first placeholder, and so on."""
    first, *rest = text.split(processor.image_token)
    return first + "".join(put + piece for put, piece in zip(expansions, rest, strict=False))


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def render(processor: Any, messages: Messages, *, prompt: bool = False) -> str:
    """The chat template's text; with `prompt`, up to where the model answers. Raises DataError when it refuses."""
    system = messages[0] if messages[0]["role"] == "system" else None
    text = _apply(processor, messages, prompt)
    if system is not None and str(system["content"]) in text:
        # Llama 3.2's template takes the system turn as one string, and prints a list of parts as Python would.
        plain = "".join(part["text"] for part in system["content"])
        text = _apply(processor, [{"role": "system", "content": plain}, *messages[1:]], prompt)
    return text


def _apply(processor: Any, messages: Messages, prompt: bool) -> str:
    dated = {"date_string": DATE} if "date_string" in str(processor.chat_template) else {}
    try:
        text: str = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **dated)
    except TemplateError as error:
        raise DataError(f"the model's chat template refuses the conversation: {error}") from error
    return text


def finished(processor: Any, messages: Messages) -> str:
    """The text of whole turns. Where the template ends no turn (LLaVA 1.5's), the end of text is put behind the last:
    a model that is never shown where an answer ends does not stop."""
    text = render(processor, messages)
    ended = text.rstrip().endswith(special_tokens(processor))
    return text if ended else text.rstrip() + str(processor.tokenizer.eos_token)


@lru_cache(8)
def special_tokens(processor: Any) -> tuple[str, ...]:
    return tuple(token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special)


def tokens(processor: Any, text: str) -> list[int]:
    """Ids of a text, images not expanded."""
    ids: list[int] = processor.tokenizer(text, add_special_tokens=adds_bos(processor, text))["input_ids"]
    return ids


def adds_bos(processor: Any, text: str) -> bool:
    """Whether the tokenizer shall add its own special tokens: not when the template wrote the first already."""
    bos = processor.tokenizer.bos_token
    return bos is None or not text.startswith(bos)


def encode(processor: Any, texts: list[str], images: list[list[Any]], *, side: str) -> dict[str, torch.Tensor]:
    """Batched tensors of texts with their images, padded on `side`."""
    return _encode(processor, texts, images, side=side)[0]


def replacement(processor: Any, image: Any) -> str:
    """What the processor puts into the text for an image of this size."""
    (text,) = _encode(processor, [processor.image_token], [[image]], side="right")[1][0]
    return text


def _encode(
    processor: Any, texts: list[str], images: list[list[Any]], *, side: str
) -> tuple[dict[str, torch.Tensor], list[list[str]]]:
    """The tensors, and for each text what was put for each of its images."""
    expands = "cross_attention_mask" not in processor.model_input_names  # mllama's images take one token each
    if not expands and any(images) and not all(images):
        raise DataError(
            "rows with and without images cannot share a batch of this model: set training.per_device_train_batch_size and "
            "evaluation.batch_size to 1"
        )
    batch = dict(
        processor(
            text=texts,
            images=images if any(images) else None,
            padding=True,
            padding_side=side,
            add_special_tokens=adds_bos(processor, texts[0]),
            return_tensors="pt",
            **({"return_text_replacement_offsets": True} if expands else {}),
        )
    )
    replaced = batch.pop("text_replacement_offsets", None)
    if replaced is None:
        return batch, [[processor.image_token] * len(each) for each in images]
    return batch, [[each["replacement"] for each in row] for row in replaced]


@lru_cache(8)  # a vocabulary of 200,000 takes a tenth of a second to list
def never_learned(processor: Any) -> list[int]:
    """Ids of image placeholders and their fences, which no model shall learn to write. mllama's lies outside the vocabulary,
    and Gemma 3's processor calls by its name the fence only, so the tokenizer is asked too."""
    names = ("image_token", "video_token", "boi_token", "eoi_token")
    found = {getattr(owner, name, None) for owner in (processor, processor.tokenizer) for name in names}
    known = processor.tokenizer.get_vocab()
    return sorted(known[token] for token in found | {"<|vision_start|>", "<|vision_end|>"} if token in known)
