"""A vision tower that is not trained says the same of a picture every time: asked once, without gradients, and kept.

Each picture goes through the tower by itself, so what is kept depends on nothing but the picture, and a run that finds
features on scratch cannot be told from one that makes them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from job.errors import Unavailable
from job.model import Loaded
from job.model.pictures import (
    FEATURES,
    LAYOUTS,
    Batch,
    Layout,
    number_of_pictures,
    picture,
    with_features,
    without_pixels,
)
from job.record import versions

log = logging.getLogger("job")

TOGETHER = 4
"""Pictures that a GPU looks at in one call."""
WAITING = 32
"""Features that may wait to be written; further ones are made again in the next epoch rather than slow this one."""


@dataclass
class Features:
    """Features on disk, one file a picture, `limit` bytes at most. Safe for several processes: files appear by rename.

    `model` tells whose features they are: see `fingerprint`.
    """

    folder: Path
    layout: Layout
    model: str
    limit: int
    held: int = 0
    _waiting: queue.Queue[tuple[str, torch.Tensor]] | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.held = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))

    def __getstate__(self) -> dict[str, Any]:
        """A loader's process reads only."""
        return self.__dict__ | {"_waiting": None}

    def recall(self, batch: Batch, images: Sequence[Sequence[Any]]) -> tuple[Batch, list[str]]:
        """For the loader: the batch without pixels when the features of all pictures are kept; and the pictures' keys.

        `images` are the rows' PIL images. No keys (then nothing is kept) where the processor made several pictures of
        one, or filled up rows that have fewer. The files are asked for here, so that they are in memory when needed;
        passing them on from the loader's process would take gigabytes of /dev/shm.
        """
        keys = [self.key(image) for row in images for image in row]
        if not keys or number_of_pictures(batch, self.layout) != len(keys):
            return batch, []
        if all(list(map(self._read_ahead, keys))):  # every one, so that all are read ahead
            batch = without_pixels(batch)
        return batch, keys

    def key(self, image: Any) -> str:
        """Digest of a PIL image and of the model that looks at it."""
        digest = hashlib.sha256(f"{self.model} {image.mode} {image.size}".encode())
        digest.update(image.tobytes())
        return digest.hexdigest()

    def load(self, key: str, device: torch.device) -> torch.Tensor:
        """The features kept under `key`. Raises Unavailable when the file is gone or broken since `recall`."""
        try:
            with safe_open(self._file(key), "pt", device=str(device)) as stream:
                return stream.get_tensor(FEATURES)  # type: ignore[no-any-return]
        except (OSError, SafetensorError) as error:
            raise Unavailable(f"scratch: {self._file(key)} cannot be read any more ({error}); run again") from error

    def _read_ahead(self, key: str) -> bool:
        """Whether there are whole features under `key`; if so, the kernel begins to read them."""
        try:
            with safe_open(self._file(key), "pt"):  # compares the length with the header
                pass
            with self._file(key).open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        except (OSError, SafetensorError):
            return False
        return True

    def keep(self, key: str, features: torch.Tensor) -> None:
        """Write in the background; left out when the limit is reached or the disk cannot follow."""
        size = features.numel() * features.element_size()
        if self.held + size > self.limit or self._file(key).exists():
            return
        if self._waiting is None:
            self._waiting = queue.Queue(WAITING)
            threading.Thread(target=self._write, args=(self._waiting,), name="features", daemon=True).start()
        if not self._waiting.full():
            self._waiting.put((key, features.detach().cpu()))
            self.held += size

    def settle(self) -> None:
        """Wait until all that was given is written."""
        if self._waiting is not None:
            self._waiting.join()

    def _write(self, waiting: queue.Queue[tuple[str, torch.Tensor]]) -> None:
        while True:
            key, features = waiting.get()
            part = self._file(key).with_suffix(f".part-{secrets.token_hex(6)}")
            try:
                save_file({FEATURES: features.contiguous()}, part)
                part.replace(self._file(key))
            except (OSError, SafetensorError) as error:
                part.unlink(missing_ok=True)
                self.limit = 0
                log.warning("vision features cannot be kept (%s); they are made anew for each sample", error)
            finally:
                waiting.task_done()

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


@dataclass(frozen=True)
class Frozen:
    """The frozen tower of `model` (PEFT around the base), with the features it has given so far."""

    model: Any
    features: Features

    def look(self, batch: Batch, keys: Sequence[str]) -> Batch:
        """The batch, on the model's device, with features: those kept, else the tower is asked."""
        layout = self.features.layout
        if "pixel_values" not in batch:
            rows, device = len(batch["input_ids"]), batch["input_ids"].device
            return (
                with_features(batch, layout, rows, [self.features.load(key, device) for key in keys]) if keys else batch
            )
        tower(self.model).eval()  # or it would keep activations to recompute from, for a backward that never comes
        pictures = [picture(batch, layout, index) for index in range(number_of_pictures(batch, layout))]
        with torch.no_grad():
            made = see(self.model, layout, pictures)
        for key, features in zip(keys, made, strict=False):
            self.features.keep(key, features)
        return with_features(batch, layout, len(batch["input_ids"]), made)

    @contextmanager
    def given(self) -> Iterator[None]:
        """Inside, the model takes what `inputs` makes: features where it would take pixels."""
        if self.features.layout == "rows":
            yield
            return
        inner = base(self.model).model
        inner.get_image_features = _given_whole if self.features.layout == "pictures" else _given
        try:
            yield
        finally:
            del inner.get_image_features

    @contextmanager
    def pixels(self) -> Iterator[None]:
        """Inside `given`, the model takes pixels for a while, as generation gives them."""
        inner = base(self.model).model
        features = vars(inner).pop("get_image_features", None)
        try:
            yield
        finally:
            if features is not None:
                inner.get_image_features = features

    def inputs(self, batch: Batch) -> Batch:
        """A batch with features in the words of the model's forward."""
        if FEATURES not in batch:
            return batch
        rest = dict(batch)
        features = rest.pop(FEATURES)
        if self.features.layout == "rows":
            return rest | {"cross_attention_states": features.flatten(0, 2)}
        return rest | {"pixel_values": features}


def frozen_vision(loaded: Loaded, folder: Path, limit: int, bias: str) -> Frozen | None:
    """None when something of the vision side is trained, or when the family is not known here."""
    layout = LAYOUTS.get(base(loaded.model).config.model_type)
    trained = any(not group.startswith("language/") for group in loaded.groups)
    if layout is None or trained or bias == "all":
        return None
    return Frozen(loaded.model, Features(folder, layout, fingerprint(loaded), limit))


def base(model: Any) -> Any:
    """The model inside PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def tower(model: Any) -> Any:
    """The vision tower of a known family."""
    inner = base(model).model
    return next(getattr(inner, name) for name in ("vision_model", "visual", "vision_tower") if hasattr(inner, name))


def fingerprint(loaded: Loaded) -> str:
    """Digest of what decides a picture's features but the picture: weight files, precision, processor, backend, versions."""
    files = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(loaded.folder.glob("*.safetensors"))
    ]
    processor = loaded.processor.image_processor.to_json_string()
    decides = [str(loaded.folder), files, processor, loaded.precision, loaded.backend, versions()]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def see(model: Any, layout: Layout, pictures: Sequence[Batch]) -> list[torch.Tensor]:
    """Each picture's features, projected to the language model's width, as `FEATURES` holds them.

    On a GPU, where small calls leave the card waiting, `TOGETHER` pictures of one shape share a call. There are always
    as many in it, the last ones repeated, so that every picture meets the same kernels whoever its neighbours are.
    """
    size = TOGETHER if layout != "patches" and pictures[0]["pixel_values"].is_cuda else 1
    seen = list[torch.Tensor]()
    for start in range(0, len(pictures), size):
        group = list(pictures[start : start + size])
        filled = group + [group[-1]] * (size - len(group))
        inputs = {name: torch.cat([each[name] for each in filled]) for name in filled[0]}
        seen += _see(model, layout, inputs, size)[: len(group)]
    return seen


def _see(model: Any, layout: Layout, inputs: Batch, pictures: int) -> list[torch.Tensor]:
    inner = base(model).model
    if layout == "rows":
        said = inner.vision_model(**inputs).last_hidden_state
        return list(torch.split(inner.multi_modal_projector(said), 1))
    found = type(inner).get_image_features(inner, **inputs, return_dict=True)
    first = found.pooler_output
    first = first.flatten(0, 1) if isinstance(first, torch.Tensor) else torch.cat(list(first))
    levels = torch.stack([first, *(getattr(found, "deepstack_features", None) or ())], dim=1)
    return list(torch.split(levels, len(levels) // pictures))


def _given(pixel_values: torch.Tensor, *_: Any, **__: Any) -> Any:
    first, *deeper = pixel_values.unbind(1)
    return SimpleNamespace(pooler_output=(first,), deepstack_features=deeper)


def _given_whole(pixel_values: torch.Tensor, *_: Any, **__: Any) -> Any:
    return SimpleNamespace(pooler_output=pixel_values.transpose(0, 1))
