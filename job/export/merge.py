"""Merged weights: the base's files again, byte for byte but for the tensors that the adapter changes.

So names, dtypes, order, sharding and index are the base's own, and what a server could read it can read again. A file is
made as a stream, piece by piece: into scratch, or straight into the output. Neither the model nor a file is ever whole
in memory; the largest thing held is one changed tensor.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from job.errors import JobError, Preempted
from job.export.fold import Change, changed
from job.export.places import DTYPES, Base
from job.stage_in import HERE
from job.store import Digest, Store
from job.store.local import disk

PIECE = 16 * 2**20
AHEAD = 3
"""Pieces that are read and folded while others are written."""
PROGRESS = "logs/merging.json"
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
LEFT_OUT = {"README.md", "pytorch_model.bin.index.json", HERE}


@dataclass(frozen=True)
class Recipe:
    """What merged weights are made of. `changes` and `held` go by the files' names of tensors.

    `held` gives weights to fold onto in place of the files': those that were dequantised. `identity` tells whether what an
    earlier attempt made is a part of the same.
    """

    base: Base
    changes: Mapping[str, Change]
    held: Mapping[str, Callable[[], Tensor]]
    device: torch.device
    identity: str


def recipe(
    base: Base,
    adapter: Path,
    changes: Mapping[str, Change],
    held: Mapping[str, Callable[[], Tensor]],
    device: torch.device,
) -> Recipe:
    """`adapter` is the folder that `changes` were read from."""
    made_of = hashlib.sha256()
    for file in base.files:
        made_of.update(f"{file} {(base.folder / file).stat().st_size}\n".encode())
    made_of.update(repr(sorted(base.slots.items())).encode())
    config = json.loads((adapter / "adapter_config.json").read_text())
    deciding = {name: config.get(name) for name in ("lora_alpha", "alpha_pattern", "use_rslora", "use_dora")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    made_of.update(json.dumps([deciding, sorted(held), name], sort_keys=True).encode())
    with (adapter / "adapter_model.safetensors").open("rb") as weights:
        made_of.update(hashlib.file_digest(weights, "sha256").digest())
    return Recipe(base, changes, held, device, made_of.hexdigest())


def merge_to_folder(recipe: Recipe, into: Path) -> list[str]:
    """Write all weight files into a folder; those that an earlier attempt finished stay. Returns what was written now."""
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
            with disk(part), part.open("wb", buffering=0) as target:
                for piece in ahead(pieces(recipe, file)):
                    _write(target, piece)
            part.replace(into / file)
            written.append(file)
    return written


def merge_to_store(recipe: Recipe, store: Store, prefix: str, check: Callable[[], None]) -> dict[str, Digest]:
    """Send all weight files to `prefix/`, none of them over scratch; those that an earlier attempt finished stay.

    `check` is called before each file and may raise. Returns the digests by the files' names.
    """
    done = _progress(store, recipe.identity)
    there = {entry.key: entry.size for entry in store.list(f"{prefix}/")}
    for file in recipe.base.files:
        key = f"{prefix}/{file}"
        if file not in done or there.get(key) != done[file].size:
            check()
            size = (recipe.base.folder / file).stat().st_size
            done[file] = store.upload_stream(Stream(ahead(pieces(recipe, file))), size, key)
            store.write(PROGRESS, json.dumps({"identity": recipe.identity, "files": done}).encode())
    return done


def _progress(store: Store, identity: str) -> dict[str, Digest]:
    """What an earlier attempt at the same merge finished."""
    try:
        found: dict[str, Any] = json.loads(store.read(PROGRESS))
    except Preempted:
        raise
    except JobError:
        return {}
    if found["identity"] != identity:
        return {}
    return {file: Digest(*digest) for file, digest in found["files"].items()}


def copy_rest(base: Path, into: Path) -> None:
    """All that a server reads besides weights: configuration, index, processor, chat template, licence. As they are."""
    into.mkdir(parents=True, exist_ok=True)
    for file in sorted(base.iterdir()):
        if file.is_dir() and file.name == "additional_chat_templates":
            shutil.copytree(file, into / file.name, dirs_exist_ok=True)
        elif file.is_file() and file.suffix not in WEIGHTS and file.name not in LEFT_OUT and file.name[0] != ".":
            shutil.copyfile(file, into / file.name)


def pieces(recipe: Recipe, file: str) -> Iterator[memoryview]:
    """The bytes of a merged weight file in order, in pieces of at most 16 MiB or one changed tensor."""
    path = recipe.base.folder / file
    slots = {key: slot for key, slot in recipe.base.slots.items() if slot.file == file}
    touched = [key for key in slots if key in recipe.changes or key in recipe.held]
    with disk(path), path.open("rb", buffering=0) as source:
        for key in sorted(touched, key=lambda key: slots[key].start):
            slot = slots[key]
            while source.tell() < slot.start:
                yield memoryview(_read(source, min(PIECE, slot.start - source.tell())))
            raw = _read(source, slot.end - slot.start)
            weight = torch.frombuffer(raw, dtype=DTYPES[slot.dtype]).view(slot.shape).to(recipe.device)
            if key in recipe.held:
                weight = recipe.held[key]().to(weight)
            if key in recipe.changes:
                weight = changed(weight, recipe.changes[key])
            yield weight.contiguous().cpu().view(-1).view(torch.uint8).numpy().data
        while piece := source.read(PIECE):
            yield memoryview(piece)


def _read(source: io.FileIO, size: int) -> bytearray:
    """Exactly `size` bytes. Raises OSError when the file ends before."""
    buffer = bytearray(size)
    view, got = memoryview(buffer), 0
    while got < size:
        count = source.readinto(view[got:])
        if not count:
            raise OSError("it ends before the tensors that its header names")
        got += count
    return buffer


def _write(target: io.FileIO, piece: memoryview) -> None:
    while len(piece):
        piece = piece[target.write(piece) :]


def ahead(items: Iterator[memoryview]) -> Iterator[memoryview]:
    """The same items, made by a thread of their own a little ahead of whoever takes them."""
    with ThreadPoolExecutor(1, thread_name_prefix="merge") as pool:
        made: deque[Future[memoryview | None]] = deque(pool.submit(next, items, None) for _ in range(AHEAD))
        while (item := made.popleft().result()) is not None:
            made.append(pool.submit(next, items, None))
            yield item


class Stream(io.RawIOBase):
    """Pieces as a file that is read once, from its beginning to its end."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer, unless the end comes before."""
        target = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(target):
            if not len(self._left):
                piece = next(self._pieces, None)
                if piece is None:
                    break
                self._left = piece.cast("B")
            count = min(len(self._left), len(target) - filled)
            target[filled : filled + count] = self._left[:count]
            self._left = self._left[count:]
            filled += count
        return filled
