"""Encodes texts in which an image takes a run of one token, as Qwen's do, without tokenizing the runs, which takes longer than
all else that is done to a text (benchmarks/loader.py)."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image


def encode_runs(
    processor: Any, texts: list[str], *, side: str, **given: Any
) -> tuple[dict[str, Any], list[list[int]], list[list[int]]]:
    """Return what `processor` makes of texts and images, arrays of shape (rows, tokens) padded on `side` beside its tensors; for
    each row, how many tokens each image takes; and each row's tokens with one for each image."""
    taken: list[int] = []

    def once(inputs: Any, image_idx: int, **named: Any) -> str:
        put = processor.replace_image_token(inputs, image_idx=image_idx, **named)
        taken.append(put.count(processor.image_token))
        return str(processor.image_token)

    short = copy.copy(processor)
    short.replace_image_token = once
    batch = dict(short(text=texts, **given))
    bare, image, left = (
        batch["input_ids"],
        processor.tokenizer.convert_tokens_to_ids(processor.image_token),
        iter(taken),
    )
    runs = [[next(left, 1) for token in row if token == image] for row in bare]
    times = []
    for row, own in zip(bare, runs, strict=True):
        times.append(np.ones(len(row), dtype=np.int64))
        times[-1][np.array(row) == image] = own
    longest = max(int(each.sum()) for each in times)
    for name in [name for name, each in batch.items() if not torch.is_tensor(each)]:
        made = np.full((len(texts), longest), processor.tokenizer.pad_token_id if name == "input_ids" else 0)
        for place, row, each in zip(made, batch[name], times, strict=True):
            whole = np.repeat(row, each)
            place[slice(len(whole)) if side == "right" else slice(longest - len(whole), None)] = whole
        batch[name] = made
    return batch, runs, bare


@lru_cache(8)
def takes_runs(processor: Any) -> bool:
    """Whether `encode_runs` makes what `processor` makes, tried on a large and a small image and a row without any."""
    images = [[Image.new("RGB", (1024, 900)), Image.new("RGB", (100, 120))], []]
    text, given = f"a {processor.image_token} b\n{processor.image_token}\n", {"images_kwargs": {"return_tensors": "pt"}}
    try:
        own = processor(text=[text, "c"], images=images, padding=True, padding_side="left", **given)
        made, runs, _ = encode_runs(processor, [text, "c"], side="left", images=images, **given)
    except Exception:  # processors differ in what they call, and some take no row without images
        return False
    asked = all(length > 1 for row in runs for length in row)  # a processor may spell images out in another way
    return asked and made.keys() == own.keys() and all(np.array_equal(made[name], own[name]) for name in made)
