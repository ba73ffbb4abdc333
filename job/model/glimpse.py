"""A base model that is not here, as far as a plan needs it: its small files, and the headers of its weights.

What is made looks like the model's own folder. Its files of weights have their header and their length, and a hole for
the rest: some megabytes are fetched of many gigabytes.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

from job.errors import SpecError, Unavailable
from job.model.fetch import BESIDE, hub_errors, refuse_unless_model
from job.spec import ModelSpec
from job.store import open_store

GLIMPSES = "glimpses"
"""Their folder on scratch."""
SMALL_BYTES = 64 * 2**20
HUB_SECONDS = 10.0
"""For each question to the hub, as its own library has it for headers."""
HEADER_BYTES = 100_000_000
"""More than a header may have, by the format's own reader."""


def glimpse(spec: ModelSpec, scratch: Path) -> Path:
    """The folder, on scratch. Raises SpecError when there is no such model, NotAllowed or Unavailable when it cannot be
    looked at from here."""
    name = spec.name_or_path
    folder = scratch / GLIMPSES / re.sub(r"[^\w.-]+", "-", f"{name}@{spec.revision or ''}")
    folder.mkdir(parents=True, exist_ok=True)
    if name.startswith("s3://"):
        _of_prefix(name, folder)
    else:
        _of_hub(spec, folder)
    refuse_unless_model(folder, name)
    return folder


def _of_prefix(name: str, folder: Path) -> None:
    store = open_store(name)
    entries = [entry for entry in store.list() if "/" not in entry.key]
    if not entries:
        raise SpecError(f"model.name_or_path: there is nothing under {name}")
    for entry in entries:
        if entry.key.endswith(".safetensors"):
            length = min(int.from_bytes(store.read_piece(entry.key, 0, 8), "little"), HEADER_BYTES)
            _hollow(folder / entry.key, store.read_piece(entry.key, 8, length), entry.size)
        elif entry.key.endswith(BESIDE) and entry.size <= SMALL_BYTES:
            (folder / entry.key).write_bytes(store.read(entry.key))


def _of_hub(spec: ModelSpec, folder: Path) -> None:
    name = spec.name_or_path
    if importlib.util.find_spec("huggingface_hub") is None:
        raise Unavailable(f"model.name_or_path: no {name} is here, and without the train extra the hub is not asked")
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import SafetensorsParsingError

    if is_offline_mode():
        raise Unavailable(f"model.name_or_path: no {name} is here, and HF_HUB_OFFLINE is set")
    with hub_errors(spec):
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
                _hollow(folder / path, json.dumps(header).encode(), size)
            elif path.endswith(BESIDE) and size <= SMALL_BYTES:
                shutil.copyfile(hf_hub_download(name, path, revision=found.sha), folder / path)


def _hollow(file: Path, header: bytes, size: int) -> None:
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(max(size, stream.tell()))
