"""Turns conversations into tensors with a label mask that is correct for every family and both backends.

TRL's own collator leaves mllama's image token (outside the vocabulary) in the labels; Unsloth's trains on the prompt unless
given the template's markers. Here the template itself locates the answer: it is the tokens that the rendered conversation,
with images expanded as by the processor, has beyond the rendered prompt.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info
from transformers.image_processing_backends import TorchvisionBackend

from job.errors import DataError, SpecError
from job.model.families import FAMILIES
from job.model.image_runs import encode_runs, takes_runs
from job.model.patches.image_processors import written_in_place

if TYPE_CHECKING:
    from job.data import Row

IGNORE = -100
DATE = "26 Jul 2024"
"""Llama 3.2's default. Its template otherwise writes today's date into a system turn, so a run resumed tomorrow would differ."""
ENDING = 2
"""Tokens at the end of an answer that may change when more turns follow: only the last turn ends with the end of text."""
MOST_CHARACTERS = 10_000_000
"""Maximum characters of a conversation, about a hundred times what any model reads."""
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Collator:
    """Call with rows `{"id", "messages", "images"}`.

    Returns the processor's tensors, right-padded to shape (rows, tokens), and `labels` of the same shape: token ids where the
    loss applies, -100 elsewhere. Raises DataError for a row of more than `max_length` tokens; with `truncate`, cuts its last
    answer instead if images and prompt fit.
    """

    processor: Any
    max_length: int
    responses_only: bool = True
    truncate: bool = False

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        if get_worker_info() is not None:
            reuse_memory(os.getpid())
        texts = [finished(self.processor, row["messages"]) for row in rows]
        batch, expansions, bare = _encode(self.processor, texts, [row["images"] for row in rows], side="right")
        labels = torch.full_like(batch["input_ids"], IGNORE)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
            spans = [(0, lengths[index])]
            if self.responses_only:
                try:
                    known = expansions[index], lengths[index], bare[index]
                    spans = answer_spans(self.processor, row["messages"], text, *known)
                except DataError as error:
                    raise DataError(f"{row['id']}: {error}") from error
            if lengths[index] > self.max_length and not (self.truncate and spans[-1][0] < self.max_length):
                raise DataError(
                    f"{row['id']}: {lengths[index]} tokens, over training.max_length {self.max_length}; raise it, or "
                    "shrink images with dataset.image_max_side"
                )
            for start, end in spans:
                labels[index, start:end] = batch["input_ids"][index, start:end]
        labels[torch.isin(labels, torch.tensor(never_learned(self.processor)))] = IGNORE
        return cut(batch | {"labels": labels}, self.max_length)


@lru_cache(1)
def reuse_memory(_process: int) -> None:
    """Keep freed memory for the next batch in a loader process. glibc maps blocks over 32 MB anew each time, and the kernel
    clears every page: half of the time spent on images (benchmarks/loader.py)."""
    with suppress(AttributeError, OSError):  # another C library
        settings = ctypes.CDLL(None).mallopt
        settings(-4, 0)  # M_MMAP_MAX: no block gets its own mapping
        settings(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never give back the top of the heap


def cut(batch: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Cut every tensor with one entry per token to at most `length` of them."""
    shape = batch["input_ids"].shape
    if shape[1] <= length:
        return batch
    return {name: each[:, :length] if each.shape[:2] == shape else each for name, each in batch.items()}


def answer_spans(
    processor: Any, messages: Messages, text: str, expansions: list[str], length: int, bare: list[int] | None = None
) -> list[tuple[int, int]]:
    """Locate a conversation's answers with their end-of-turn tokens, as half-open ranges over its `length` tokens.

    `text` is the conversation as the chat template renders it (see `finished`), `expansions` the processor's replacement for
    each image, and `bare` the tokens of `text`, if known. Raises DataError when the template renders an answer differently
    once more turns follow, or not as a continuation of its prompt.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    plain = not any(part["type"] == "image" for message in messages[answers[0] :] for part in message["content"])
    if plain:  # spans are counted from the end, so images before the answers need no expansion
        expansions = [processor.image_token] * len(expansions)
    whole = bare if plain and bare is not None else tokens(processor, expand(processor, text, expansions))
    spans = list[tuple[int, int]]()
    for turn in answers:
        said = text if turn == len(messages) - 1 else finished(processor, messages[: turn + 1])
        before = tokens(processor, expand(processor, render(processor, messages[:turn], prompt=True), expansions))
        after = without_end(processor, text, whole) if said is text else None
        if after is None:
            after = tokens(processor, expand(processor, said.rstrip(), expansions))
        start, end = _common(whole, before), _common(whole, after)
        if start < len(before) - 1 or end <= start or end < len(after) - ENDING:
            raise DataError(_rewritten(len(answers)))
        spans.append((length - len(whole) + start, length - len(whole) + end))
    return spans


def without_end(processor: Any, text: str, whole: list[int]) -> list[int] | None:
    """Return the tokens of `text.rstrip()` out of those of `text`, if a special token precedes the stripped part, else None.
    Special tokens never merge with what follows."""
    bare = text.rstrip()
    end = processor.tokenizer(text[len(bare) :], add_special_tokens=False)["input_ids"] if bare != text else []
    parted = len(whole) - len(end)
    return whole[:parted] if bare.endswith(special_tokens(processor)) and whole[parted:] == end else None


def _rewritten(answers: int) -> str:
    cure = "give each answer its own row, or name" if answers > 1 else "name"
    return (
        "the model's chat template rewrites earlier turns, so the answer cannot be told from the prompt; "
        f"{cure} a base model whose template keeps them"
    )


def expand(processor: Any, text: str, expansions: list[str]) -> str:
    """Replace the text's image placeholders, in order, with the processor's expansions."""
    first, *rest = text.split(processor.image_token)
    return first + "".join(put + piece for put, piece in zip(expansions, rest, strict=False))


def _common(a: list[int], b: list[int]) -> int:
    """Return the length of the common prefix."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def render(processor: Any, messages: Messages, *, prompt: bool = False) -> str:
    """Render the chat template; with `prompt`, up to where the model answers. Raises DataError when the template fails."""
    system = messages[0] if messages[0]["role"] == "system" else None
    text = _apply(processor, messages, prompt)
    if system is not None and str(system["content"]) in text:
        # Llama 3.2's template takes the system turn as one string, and prints a list of parts as a Python literal.
        plain = "".join(part["text"] for part in system["content"])
        text = _apply(processor, [{"role": "system", "content": plain}, *messages[1:]], prompt)
    return text


def _apply(processor: Any, messages: Messages, prompt: bool) -> str:
    try:
        text = _filled(processor, messages, prompt)
    except Exception as error:  # a template is a program and can fail in any way
        said = _said_of_any(processor, messages, prompt)
        raise DataError(f"the model's chat template refuses the conversation{said}") from error
    if len(text) > MOST_CHARACTERS:
        raise DataError(f"the model's chat template renders the conversation to {len(text):,} characters")
    return text


def _filled(processor: Any, messages: Messages, prompt: bool) -> str:
    dated = {"date_string": DATE} if "date_string" in str(processor.chat_template) else {}
    text: str = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **dated)
    return text


def _said_of_any(processor: Any, messages: Messages, prompt: bool) -> str:
    """Return the template's error for the same turns without their text, because the original error may quote a row."""
    try:
        _filled(processor, [message | {"content": _unsaid(message["content"])} for message in messages], prompt)
    except Exception as error:
        return f": {error}"
    return ""


def _unsaid(content: Any) -> Any:
    if isinstance(content, str):
        return "…"
    return [part | {"text": "…"} if "text" in part else part for part in content]


def finished(processor: Any, messages: Messages) -> str:
    """Render whole turns. If the template ends no turn (LLaVA 1.5's), append the end of text: a model that never sees where an
    answer ends does not stop."""
    text = render(processor, messages)
    ended = text.rstrip().endswith(special_tokens(processor))
    return text if ended else text.rstrip() + (processor.tokenizer.eos_token or "")


@lru_cache(8)
def special_tokens(processor: Any) -> tuple[str, ...]:
    return tuple(token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special)


def tokens(processor: Any, text: str) -> list[int]:
    """Return the token ids of a text, without expanding images."""
    ids: list[int] = processor.tokenizer(text, add_special_tokens=adds_bos(processor, text))["input_ids"]
    return ids


def adds_bos(processor: Any, text: str) -> bool:
    """Whether the tokenizer should add its special tokens: not when the template already wrote the first."""
    bos = processor.tokenizer.bos_token
    return bos is None or not text.startswith(bos)


def adds_first_token(processor: Any) -> bool:
    """Whether the tokenizer puts a first token before a conversation that the template does not write. A server then adds it
    only if a request asks for special tokens."""
    question = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    text = render(processor, question, prompt=True)
    ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens(processor, text) != ids


def image_token(processor: Any) -> int:
    """Return the id of the token that images are expanded to."""
    return int(processor.tokenizer.convert_tokens_to_ids(processor.image_token))


def encode(processor: Any, texts: list[str], images: list[list[Any]], *, side: str) -> dict[str, torch.Tensor]:
    """Encode texts with their images as batched tensors, padded on `side`."""
    return _encode(processor, texts, images, side=side)[0]


def replacement(processor: Any, image: Any, images: int = 1) -> str:
    """Return the text that the processor substitutes for an image of this size, one of a row's `images`."""
    return _encode(processor, [processor.image_token * images], [[image] * images], side="right")[1][0][0]


def _encode(
    processor: Any, texts: list[str], images: list[list[Any]], *, side: str
) -> tuple[dict[str, torch.Tensor], list[list[str]], Sequence[list[int] | None]]:
    """Return the tensors; for each text, the replacement of each of its images, and its tokens with one for each image, if
    known."""
    expands = "cross_attention_mask" not in processor.model_input_names  # mllama's images take one token each
    if any(images) and not all(images) and not expands:
        raise DataError(
            "rows with and without images cannot share a batch of this model: set training.per_device_train_batch_size and "
            "evaluation.batch_size to 1"
        )
    given = {
        "images": [[_planes(processor, image) for image in row] for row in images] if any(images) else None,
        "padding_side": side,
        "add_special_tokens": adds_bos(processor, texts[0]),
        # Tokens become tensors below: upstream's way there takes half as long again as the tokenizer itself.
        "images_kwargs": {"return_tensors": "pt"},
    }
    fast = written_in_place(processor)
    bare: Sequence[list[int] | None] = [None] * len(texts)
    if expands and takes_runs(processor):
        batch, runs, bare = encode_runs(fast, texts, side=side, **given)
        replaced = [[processor.image_token * length for length in row] for row in runs]
    else:
        batch = dict(
            fast(text=texts, padding=True, **given, **({"return_text_replacement_offsets": True} if expands else {}))
        )
        told = batch.pop("text_replacement_offsets", None)
        if told is None and expands and any(images):
            raise SpecError(
                "model.name_or_path: the processor does not report the text that it puts in the place of an image"
            )
        replaced = [[processor.image_token] * len(each) for each in images]
        if told is not None:
            replaced = [[each["replacement"] for each in row] for row in told]
    batch = {name: each if torch.is_tensor(each) else torch.from_numpy(np.array(each)) for name, each in batch.items()}
    batch |= {name: each.float() for name, each in batch.items() if each.is_floating_point()}
    return batch, replaced, bare


def _planes(processor: Any, image: Any) -> Any:
    """Return an image as a tensor of shape (3, height, width). Processors that compute with torch make one too, but leave its
    colours side by side, and then take half as long again."""
    if not isinstance(processor.image_processor, TorchvisionBackend):
        return image
    return torch.from_numpy(np.stack([np.asarray(colour) for colour in image.split()]))


@lru_cache(8)  # listing a vocabulary of 200,000 takes a tenth of a second
def never_learned(processor: Any) -> list[int]:
    """Ids of image placeholders, delimiters and tile separators (Llama 4), which no model should learn to write. mllama's image
    token is outside the vocabulary, and Gemma 3's processor gives the delimiter that name, so the tokenizer is queried too."""
    names = ("image_token", "video_token", "boi_token", "eoi_token")
    found = {getattr(owner, name, None) for owner in (processor, processor.tokenizer) for name in names}
    found.update(*(family.fences for family in FAMILIES.values()))
    put = replacement(processor, Image.new("RGB", (1024, 1024)))
    found.update(token for token in special_tokens(processor) if token in put)
    known = processor.tokenizer.get_vocab()
    return sorted(known[token] for token in found if token in known)
