"""Writes merged weights: the base's files, byte for byte except for the tensors that the adapter changes.

So names, dtypes, order, sharding and index are the base's own, and a server that reads the base reads the result. A file is
made in pieces, a few of them ahead of writing, into scratch or straight into the output. Neither the model nor a file is ever
entirely in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from job.errors import JobError, Preempted
from job.export.fold import Change, changed
from job.export.tensor_map import DTYPES
from job.layout import MERGING_KEY
from job.model.weight_map import Base
from job.store import Digest, Store
from job.store.disk import disk
from job.store.folders import together

PIECE = 16 * 2**20
WORKERS = 3
AHEAD = 6
"""Pieces being read and folded, or waiting to be written."""
FILES = 2
"""Files sent at once: the store confirms the end of one while another is folded."""
FOLDING = threading.Lock()
"""Folds one tensor at a time: it uses the whole device, and the precision of products is a process-wide setting."""
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
LEFT_OUT = {"README.md", "pytorch_model.bin.index.json"}


@dataclass(frozen=True)
class Recipe:
    """The inputs of a merge. `changes` is keyed by the files' tensor names; `identity` tells whether an earlier attempt's
    files belong to the same merge."""

    base: Base
    changes: Mapping[str, Change]
    device: torch.device
    identity: str


def recipe(base: Base, adapter: Path, changes: Mapping[str, Change], device: torch.device) -> Recipe:
    """`adapter` is the folder that `changes` were read from."""
    made_of = hashlib.sha256()
    for file in base.files:
        made_of.update(f"{file} {(base.folder / file).stat().st_size}\n".encode())
    made_of.update(repr(sorted(base.slots.items())).encode())
    config = json.loads((adapter / "adapter_config.json").read_text())
    deciding = {name: config.get(name) for name in ("lora_alpha", "use_rslora")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    made_of.update(json.dumps([deciding, name], sort_keys=True).encode())
    with (adapter / "adapter_model.safetensors").open("rb") as weights:
        made_of.update(hashlib.file_digest(weights, "sha256").digest())
    return Recipe(base, changes, device, made_of.hexdigest())


def merge_to_folder(recipe: Recipe, into: Path) -> list[str]:
    """Write all weight files to a folder, keeping those that an earlier attempt finished. Returns the files written now."""
    mark = into.with_name(f"{into.name}.identity")
    if not (mark.exists() and mark.read_text() == recipe.identity):
        shutil.rmtree(into, ignore_errors=True)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(recipe.identity)
    into.mkdir(exist_ok=True)
    written = []
    for file in recipe.base.files:
        if not (into / file).exists():
            part = into.with_name(f"{file}.part")
            with disk(part), part.open("wb") as target, closing(pieces(recipe, file)) as made:
                for piece in made:
                    target.write(piece)
            part.replace(into / file)
            written.append(file)
    return written


def merge_to_store(recipe: Recipe, store: Store, prefix: str) -> dict[str, Digest]:
    """Send all weight files to `prefix/`, without using scratch and keeping those that an earlier attempt finished.

    Returns digests by file name.
    """
    done, noting = _progress(store, recipe.identity), threading.Lock()
    there = {entry.key: entry.version for entry in store.list(f"{prefix}/")}

    def send(file: str) -> None:
        size = (recipe.base.folder / file).stat().st_size
        digest = store.upload_pieces(lambda: pieces(recipe, file), size, f"{prefix}/{file}")
        with noting:
            done[file] = digest
            store.write(MERGING_KEY, json.dumps({"identity": recipe.identity, "files": done}).encode())

    left = [
        name for name in recipe.base.files if name not in done or there.get(f"{prefix}/{name}") != done[name].version
    ]
    together({file: partial(send, file) for file in left}, FILES)
    return {file: done[file] for file in recipe.base.files}


def _progress(store: Store, identity: str) -> dict[str, Digest]:
    """Return the files that an earlier attempt at the same merge finished."""
    try:
        found: dict[str, Any] = json.loads(store.read(MERGING_KEY))
    except Preempted:
        raise
    except JobError:
        return {}
    if found["identity"] != identity:
        return {}
    return {file: Digest(*digest) for file, digest in found["files"].items()}


def copy_rest(base: Path, into: Path) -> None:
    """Copy unchanged everything that a server reads besides weights: configuration, index, processor, chat template, licence."""
    into.mkdir(parents=True, exist_ok=True)
    for file in sorted(base.iterdir()):
        if file.is_dir() and file.name == "additional_chat_templates":
            shutil.copytree(file, into / file.name, dirs_exist_ok=True)
        elif file.is_file() and file.suffix not in WEIGHTS and file.name not in LEFT_OUT and file.name[0] != ".":
            shutil.copyfile(file, into / file.name)


def pieces(recipe: Recipe, file: str) -> Generator[memoryview]:
    """Yield the bytes of a merged weight file in order, in pieces of at most 16 MiB or one changed tensor.

    Threads make them ahead of the consumer. At most AHEAD pieces and those already taken are in memory, and one tensor with
    its change is on the device. Closing ends the threads.
    """
    path = recipe.base.folder / file
    made: deque[Future[memoryview]] = deque()
    with disk(path), path.open("rb") as source, ThreadPoolExecutor(WORKERS, thread_name_prefix="merge") as pool:
        try:
            for make in _parts(recipe, file, source.fileno()):
                made.append(pool.submit(make))
                if len(made) == AHEAD:
                    yield made.popleft().result()
            while made:
                yield made.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _parts(recipe: Recipe, file: str, source: int) -> Iterator[Callable[[], memoryview]]:
    """Yield the functions that make a file's pieces; the file is open as the descriptor `source`."""
    slots = {key: slot for key, slot in recipe.base.slots.items() if slot.file == file}
    touched = [key for key in slots if key in recipe.changes]
    done = 0
    for key in sorted(touched, key=lambda key: slots[key].start):
        yield from _plain(recipe, source, done, slots[key].start)
        yield partial(_folded, recipe, source, key)
        done = slots[key].end
    yield from _plain(recipe, source, done, os.fstat(source).st_size)


def _plain(recipe: Recipe, source: int, start: int, end: int) -> Iterator[Callable[[], memoryview]]:
    for at in range(start, end, PIECE):
        yield lambda at=at: _read(recipe, source, at, min(at + PIECE, end)).numpy().data  # type: ignore[misc]


def _folded(recipe: Recipe, source: int, key: str) -> memoryview:
    """Return a changed tensor, in the memory that it was read into."""
    slot = recipe.base.slots[key]
    raw = _read(recipe, source, slot.start, slot.end)
    there = raw.view(DTYPES[slot.dtype]).view(slot.shape)
    with FOLDING:
        there.copy_(changed(there.to(recipe.device), recipe.changes[key]))
    return raw.numpy().data


def _read(recipe: Recipe, source: int, start: int, end: int) -> Tensor:
    """Read bytes `start` to `end`. Raises OSError when the file ends before. A GPU copies from pinned memory far faster, and
    torch reuses it for later pieces."""
    raw = torch.empty(end - start, dtype=torch.uint8, pin_memory=recipe.device.type == "cuda")
    view, got = raw.numpy().data, 0
    while got < len(view):
        count = os.preadv(source, [view[got:]], start + got)
        if not count:
            raise OSError("it ends before the tensors that its header names")
        got += count
    return raw
