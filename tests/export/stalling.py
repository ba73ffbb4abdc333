"""A merge that stops at the last weight of its second file and waits there to be killed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from job.export.fold import Change, Whole
from job.export.merge import Recipe, merge_to_folder, merge_to_store
from job.model.header import read_header
from job.model.weight_map import Base, Slot
from job.store import open_store


def recipe(folder: Path, seconds: float) -> Recipe:
    """One weight is changed, and its change takes so long to be had."""
    slots: dict[str, Slot] = {}
    for file in sorted(folder.glob("*.safetensors")):
        header, begin = read_header(file)
        for key, entry in header.items():
            start, end = entry["data_offsets"]
            slots[key] = Slot(file.name, entry["dtype"], tuple(entry["shape"]), begin + start, begin + end)
    base = Base(folder, tuple(sorted({slot.file for slot in slots.values()})), slots, {}, {})
    last = max((slot.start, key) for key, slot in slots.items() if slot.file == base.files[1])[1]
    change = Whole(torch.full(slots[last].shape, 2.0))
    return Recipe(base, Stalling({last: change}, seconds), torch.device("cpu"), "one")


class Stalling(dict[str, Change]):
    """Changes that take so long to be had."""

    def __init__(self, changes: dict[str, Change], seconds: float) -> None:
        super().__init__(changes)
        self.seconds = seconds

    def __getitem__(self, key: str) -> Change:
        if self.seconds:
            print("stalled", flush=True)
            time.sleep(self.seconds)
        return super().__getitem__(key)


def merge(todo: Recipe, into: Path, way: str) -> list[str]:
    """Names of the files that were made now, and not by an earlier call."""
    if way == "folder":
        return merge_to_folder(todo, into / "merged")
    store = open_store(str(into))
    before = {entry.key: entry.modified for entry in store.list("merged/")}
    merge_to_store(todo, store, "merged")
    now = [entry for entry in store.list("merged/") if entry.modified != before.get(entry.key)]
    return [entry.key.removeprefix("merged/") for entry in now]


if __name__ == "__main__":
    merge(recipe(Path(sys.argv[1]), 60.0), Path(sys.argv[2]), sys.argv[3])
