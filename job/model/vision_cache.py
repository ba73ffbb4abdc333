"""Caches the features of a frozen vision tower: each image is computed once, without gradients.

Each image goes through the tower separately, so its features depend only on the image, and a run that finds features on
scratch is indistinguishable from one that computes them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import secrets
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from job.errors import Unavailable
from job.model.families import Layout, family_of
from job.model.image_layout import FEATURES, Batch, number_of_pictures, picture, with_features, without_pixels
from job.model.loaded import Loaded, base
from job.model.patches.image_features import features_for_pixels, pixels_again
from job.runtime.status import own_code, versions

log = logging.getLogger("job")

TOGETHER = 4
"""Images per call of the vision tower on a GPU."""
WAITING = 32
"""Features that may wait to be written; further ones are computed again in the next epoch rather than slow this one."""


@dataclass
class Features:
    """Features on disk, one file per image, at most `limit` bytes. Safe for several processes: files appear by rename.

    `model` identifies the model that made them: see `fingerprint`.
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
        """A loader's process only reads."""
        return self.__dict__ | {"_waiting": None}

    def recall(self, batch: Batch, images: Sequence[Sequence[Any]]) -> tuple[Batch, list[str]]:
        """For the loader: return the batch and the images' keys; without pixels if the features of all images are cached.

        `images` are the rows' PIL images. Keys are empty (and nothing is cached) where the processor split an image into
        several or padded rows that have fewer. The files are requested here, so that they are in memory when needed; passing
        them on from the loader's process would take gigabytes of /dev/shm.
        """
        keys = [self.key(image) for row in images for image in row]
        if not keys or number_of_pictures(batch, self.layout) != len(keys):
            return batch, []
        if all(list(map(self._read_ahead, keys))):  # a list, so that all are read ahead
            batch = without_pixels(batch)
        return batch, keys

    def key(self, image: Any) -> str:
        """Return the digest of a PIL image and of the model that encodes it."""
        digest = hashlib.sha256(f"{self.model} {image.mode} {image.size}".encode())
        digest.update(image.tobytes())
        return digest.hexdigest()

    def load(self, key: str, device: torch.device) -> torch.Tensor:
        """Load the features cached under `key`. Raises Unavailable when the file has vanished or broken since `recall`."""
        try:
            with safe_open(self._file(key), "pt", device=str(device)) as stream:
                return stream.get_tensor(FEATURES)  # type: ignore[no-any-return]
        except (OSError, SafetensorError) as error:
            raise Unavailable(f"scratch: {self._file(key)} cannot be read any more ({error}); run again") from error

    def _read_ahead(self, key: str) -> bool:
        """Whether complete features exist under `key`; if so, the kernel starts to read them."""
        try:
            with safe_open(self._file(key), "pt"):  # compares the length with the header
                pass
            with self._file(key).open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        except (OSError, SafetensorError):
            return False
        return True

    def keep(self, key: str, features: torch.Tensor) -> None:
        """Write the features in the background; skip them when the limit is reached or the disk cannot keep up."""
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
        """Wait until everything submitted is written."""
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
                log.warning("vision features cannot be cached (%s); they are computed for each sample", error)
            finally:
                waiting.task_done()

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


@dataclass(frozen=True)
class VisionCache:
    """The frozen tower of `model` (PEFT around the base) and its cached features."""

    model: Any
    features: Features

    def look(self, batch: Batch, keys: Sequence[str]) -> Batch:
        """Return the batch, on the model's device, with features from the cache or else from the tower."""
        layout = self.features.layout
        if "pixel_values" not in batch:
            rows, device = len(batch["input_ids"]), batch["input_ids"].device
            return (
                with_features(batch, layout, rows, [self.features.load(key, device) for key in keys]) if keys else batch
            )
        tower(self.model).eval()  # else it keeps activations to recompute from, for a backward that never comes
        pictures = [picture(batch, layout, index) for index in range(number_of_pictures(batch, layout))]
        with torch.no_grad():
            made = see(self.model, layout, pictures)
        for key, features in zip(keys, made, strict=False):
            self.features.keep(key, features)
        return with_features(batch, layout, len(batch["input_ids"]), made)

    def given(self) -> AbstractContextManager[None]:
        """Inside, the model accepts the output of `inputs`: features where it would take pixels."""
        inner, layout = base(self.model).model, self.features.layout
        return nullcontext() if layout == "rows" else features_for_pixels(inner, whole=layout == "pictures")

    def pixels(self) -> AbstractContextManager[None]:
        """Inside `given`, the model accepts pixels again, as generation passes them."""
        return pixels_again(base(self.model).model)

    def inputs(self, batch: Batch) -> Batch:
        """Rename a batch's features to arguments of the model's forward."""
        if FEATURES not in batch:
            return batch
        rest = dict(batch)
        features = rest.pop(FEATURES)
        if self.features.layout == "rows":
            return rest | {"cross_attention_states": features.flatten(0, 2)}
        return rest | {"pixel_values": features}


def vision_cache(loaded: Loaded, folder: Path, limit: int, bias: str) -> VisionCache | None:
    """Return None when any part of the vision side is trained or the family's layout is unknown."""
    layout = family_of(base(loaded.model).config.model_type).layout
    trained = any(not group.startswith("language/") for group in loaded.groups)
    if layout is None or trained or bias == "all":
        return None
    return VisionCache(loaded.model, Features(folder, layout, fingerprint(loaded), limit))


def tower(model: Any) -> Any:
    """Return the vision tower of a known family."""
    inner = base(model).model
    return next(getattr(inner, name) for name in ("vision_model", "visual", "vision_tower") if hasattr(inner, name))


def fingerprint(loaded: Loaded) -> str:
    """Return a digest of everything but the image that decides its features: weight files, precision, processor, backend,
    versions, and our own code."""
    files = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(loaded.folder.glob("*.safetensors"))
    ]
    processor = loaded.processor.image_processor.to_json_string()
    decides = [str(loaded.folder), files, processor, loaded.precision, loaded.backend, versions(), own_code()]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def see(model: Any, layout: Layout, pictures: Sequence[Batch]) -> list[torch.Tensor]:
    """Return each image's features, projected to the language model's width, in the shape of `FEATURES`.

    On a GPU, which small calls leave idle, `TOGETHER` images of one shape share a call. The last image is repeated to fill
    every call, so that each image meets the same kernels whatever its neighbours.
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
