"""Writes checkpoints from a copy of the state: training waits for the copy, another thread writes the files."""

from __future__ import annotations

import copy
import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from job.errors import Unavailable
from job.store.disk import disk


class Snapshot:
    """`unchanging` is a folder of files that every checkpoint contains unchanged: configuration, card, processor.

    States are nested dictionaries of tensors, by file name. One copy is kept in host memory and reused by every save, because
    touching fresh pages takes longer than copying into them. `written` completes when the last checkpoint is in its folder, or
    holds the error.
    """

    def __init__(self, unchanging: Path) -> None:
        self.unchanging = unchanging
        self.written: Future[None] = Future()
        self.written.set_result(None)
        self._copies: dict[str, Any] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot")

    def prepare(self, states: dict[str, Any]) -> None:
        """Allocate the memory for `states` before the first save. The data copied here are never read."""
        self.written = self._thread.submit(self._copy, states)

    def take(self, folder: Path, states: dict[str, Any]) -> None:
        """Copy `states` and return while they are written to `folder`. Waits for the disk only if the previous checkpoint is
        still being written."""
        wait([self.written])
        self._copy(states)
        self.written = self._thread.submit(self._write, folder)

    def _copy(self, states: dict[str, Any]) -> None:
        self._copies = {name: copied(state, self._copies.get(name)) for name, state in states.items()}

    def _write(self, folder: Path) -> None:
        try:
            with disk(folder):
                shutil.copytree(self.unchanging, folder, dirs_exist_ok=True)
                for name, state in self._copies.items():
                    if name.endswith(".safetensors"):
                        save_file(state, folder / name, metadata={"format": "pt"})
                    else:
                        torch.save(state, folder / name)
        except (RuntimeError, SafetensorError) as error:  # both raise these on a full disk
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise Unavailable(f"The checkpoint could not be written to {folder}; is its disk full? {reason}") from error


def copied(state: Any, before: Any) -> Any:
    """Copy `state` with its tensors to host memory, into the tensors of `before`, an earlier copy, where they fit."""
    if isinstance(state, torch.Tensor):
        fits = isinstance(before, torch.Tensor) and (before.shape, before.dtype) == (state.shape, state.dtype)
        return (before if fits else torch.empty(state.shape, dtype=state.dtype)).copy_(state.detach())
    if isinstance(state, dict):
        known = before if isinstance(before, dict) else {}
        return {key: copied(value, known.get(key)) for key, value in state.items()}
    return copy.deepcopy(state)
