"""Fetches only what a plan needs of a remote base model: its small files, and the headers of its weights.

The result looks like the model's own folder. Its weight files have their header and length, and a hole for the rest: a few
megabytes are fetched instead of many gigabytes.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

from job.config.schema import ModelSpec
from job.errors import SpecError, Unavailable
from job.model.base_model import (
    ADAPTER_FILES,
    BESIDE,
    refuse_unless_adapter,
    refuse_unless_hub_id,
    refuse_unless_model,
)
from job.model.header import HEADER_BYTES
from job.runtime.hub import hub_errors
from job.runtime.staging import name_on_scratch, remove_others
from job.store import open_store

GLIMPSES = "glimpses"
"""Their folder on scratch."""
SMALL_BYTES = 64 * 2**20
HUB_SECONDS = 10.0
"""Timeout of each request to the Hub, the same as in its library."""


def glimpse(spec: ModelSpec, scratch: Path) -> Path:
    """Returns the folder, on scratch. Raises SpecError if there is no such model, NotAllowed or Unavailable if it cannot be
    examined from here."""
    name = spec.name_or_path
    folder = _folder(scratch, f"{name}@{spec.revision or ''}")
    if name.startswith("s3://"):
        _of_prefix(name, folder, "model.name_or_path", BESIDE)
    else:
        _of_hub(spec, folder)
    refuse_unless_model(folder, name)
    return folder


def glimpse_adapter(name: str, scratch: Path) -> Path:
    """Does the same for the adapter under an `s3://` prefix."""
    folder = _folder(scratch, name)
    _of_prefix(name, folder, "lora.init_adapter", ADAPTER_FILES)
    refuse_unless_adapter(folder, name)
    return folder


def _folder(scratch: Path, name: str) -> Path:
    folder = scratch / GLIMPSES / name_on_scratch(name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _of_prefix(name: str, folder: Path, field: str, beside: tuple[str, ...]) -> None:
    """Fetches headers of the weights under a prefix, and its files that end like one of `beside`."""
    store = open_store(name)
    entries = [entry for entry in store.list() if "/" not in entry.key]
    if not entries:
        raise SpecError(f"{field}: there is nothing under {name}")
    remove_others(folder, {entry.key for entry in entries})
    for entry in entries:
        if entry.key.endswith(".safetensors"):
            length = min(int.from_bytes(store.read_piece(entry.key, 0, 8), "little"), HEADER_BYTES)
            _hollow(folder / entry.key, store.read_piece(entry.key, 8, length), entry.size)
        elif entry.key.endswith(beside) and entry.size <= SMALL_BYTES:
            (folder / entry.key).write_bytes(store.read(entry.key))


def _of_hub(spec: ModelSpec, folder: Path) -> None:
    name = spec.name_or_path
    if importlib.util.find_spec("huggingface_hub") is None:
        raise Unavailable(f"model.name_or_path: {name} is not here, and asking the hub needs the train extra")
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import SafetensorsParsingError

    if is_offline_mode():
        raise Unavailable(f"model.name_or_path: {name} is not here, and HF_HUB_OFFLINE is set")
    refuse_unless_hub_id(name)
    with hub_errors(name, "model.name_or_path", spec.revision):
        found = HfApi().model_info(name, revision=spec.revision, files_metadata=True, timeout=HUB_SECONDS)
        for file in found.siblings or []:
            path, size = file.rfilename, file.size or 0
            if "/" in path:
                continue
            if path.endswith(".safetensors"):
                try:
                    tensors = HfApi().parse_safetensors_file_metadata(name, path, revision=found.sha).tensors
                except SafetensorsParsingError as error:
                    raise SpecError(f"model.name_or_path: {path} of {name} is not a safetensors file") from error
                header = {
                    key: {"dtype": each.dtype, "shape": each.shape, "data_offsets": each.data_offsets}
                    for key, each in tensors.items()
                }
                # Rewritten, the header may be longer or shorter: the Hub does not return its metadata.
                end = max((each.data_offsets[1] for each in tensors.values()), default=0)
                head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size - 8 - end)
                _hollow(folder / path, head, max(size, 8 + len(head) + end))
            elif path.endswith(BESIDE) and size <= SMALL_BYTES:
                shutil.copyfile(hf_hub_download(name, path, revision=found.sha), folder / path)


def _hollow(file: Path, header: bytes, size: int) -> None:
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(max(size, stream.tell()))
