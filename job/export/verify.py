"""Compares merged weight files, number by number, with the base's files and the adapter in memory.

`job.export.gate` samples each weight as transformers loads it, which shows that every tensor is where it belongs. But a sample
misses one zeroed row of an embedding. So every file is also read back whole, beside the file that it must be: the base's
bytes, with the adapters of the trained model folded in anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from job.export.fold import Change, Whole
from job.export.merge import Recipe, pieces
from job.export.tensor_map import DTYPES, place
from job.export.unmerged import adapters_of, trained_weights
from job.model.weight_map import Base
from job.store.disk import disk

MOST_ROUNDED = 0.01
"""Share of an adapted tensor's numbers that may be the neighbour of the right one: float32 sums on another kind of device
occasionally round differently."""
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def from_memory(base: Base, model: Any, device: torch.device) -> Recipe:
    """Return what must be in the merged files, from the adapters of the trained PEFT model, which are copied to the CPU."""
    found: dict[str, Change] = {}
    for name, lora in adapters_of(model).items():
        found[place(base, f"{name}.weight", lora.b.shape[0] * lora.a[0].numel())] = lora
    for name, weight in trained_weights(model).items():
        found[place(base, name, weight.numel())] = Whole(weight)
    return Recipe(base, found, device, identity="")


def wrong_tensors(right: Recipe, file: str, path: Path) -> list[str]:
    """Return the tensors of the merged file at `path` that are not as in `right`, by their names in the files; `file` itself if
    its header or its length is wrong."""
    slots = {key: slot for key, slot in right.base.slots.items() if slot.file == file}
    parts = {file: (0, min((slot.start for slot in slots.values()), default=0))}  # the header
    parts |= {key: (slot.start, slot.end) for key, slot in slots.items()}
    wrong, done = dict[str, None](), 0
    with disk(path), path.open("rb") as stream, closing(pieces(right, file)) as made:
        for piece in made:
            found = stream.read(len(piece))
            if len(found) < len(piece):
                wrong[file] = None
                break
            if found != piece.tobytes():
                wrong |= dict.fromkeys(_wrong(right, parts, done, found, piece))
            done += len(piece)
        if stream.read(1):
            wrong[file] = None
    return [right.base.names.get(name, name) for name in wrong]


def _wrong(
    right: Recipe, parts: Mapping[str, tuple[int, int]], done: int, found: bytes, piece: memoryview
) -> Iterator[str]:
    """Yield the parts of a file that are wrong in one piece, which begins at byte `done`: a changed tensor, or bytes between."""
    own, wanted = (torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in (found, piece))
    for name, (start, end) in parts.items():
        begin, finish = max(start - done, 0), min(end - done, len(piece))
        if begin >= finish or torch.equal(own[begin:finish], wanted[begin:finish]):
            continue
        dtype = DTYPES.get(right.base.slots[name].dtype) if name in right.changes else None
        if dtype is None or not _rounded(own.view(dtype), wanted.view(dtype)):
            yield name


def _rounded(found: Tensor, right: Tensor) -> bool:
    """Whether numbers differ by no more than other sums in float32 would make them."""
    gap = (_place(found) - _place(right)).abs()
    return bool(gap.max() <= 1) and float((gap > 0).float().mean()) <= MOST_ROUNDED


def _place(numbers: Tensor) -> Tensor:
    """Return each number's place among all numbers of its dtype, so that neighbours differ by 1."""
    bits = numbers.view(INTEGERS[numbers.element_size()]).to(torch.int64)
    return torch.where(bits < 0, -(bits & (1 << (8 * numbers.element_size() - 1)) - 1), bits)
