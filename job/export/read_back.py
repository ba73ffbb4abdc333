"""Reads merged weights back from where they were written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from job.config.schema import ModelSpec
from job.model.transformers_backend import DTYPES, Offload, load_weights, patched, placement
from job.model.weight_map import Base
from job.store import Digest, Store

Check = Callable[[str, Path], None]
"""Looks at a weight file, given its name and where it is, before it is loaded."""


def read_folder(
    spec: ModelSpec,
    folder: Path,
    base: Base,
    device: torch.device,
    precision: str,
    check: Check,
    offload: Offload | None = None,
) -> Any:
    """Load the model from a folder, each of its weight files checked before."""
    for file in base.files:
        check(file, folder / file)
    return load_weights(spec, folder, device, precision, offload)


def read_back(
    spec: ModelSpec,
    rest: Path,
    base: Base,
    store: Store,
    prefix: str,
    files: Mapping[str, Digest],
    device: torch.device,
    precision: str,
    check: Check,
    offload: Offload | None = None,
) -> Any:
    """Load the model from the weight files under `prefix/`, each checked, and compared with its digest. Scratch holds one file
    at a time, and memory one copy of the weights.

    The folder `rest` holds the configuration.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(rest, trust_remote_code=spec.trust_remote_code)
    how = {"dtype": DTYPES[precision], "attn_implementation": spec.attn_implementation}
    tensors = _tensors(rest, store, prefix, files, check)
    if offload is None and base.names.keys() == base.slots.keys():
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=spec.trust_remote_code, **how)
        state = model.state_dict()
        for key, tensor in tensors:
            state[base.names[key]].copy_(tensor)
    else:  # the loader handles weights made of several tensors or kept outside the GPU
        with torch.device("meta"):  # the automatic class takes weights only from a folder
            made = type(AutoModelForImageTextToText.from_config(config, trust_remote_code=spec.trust_remote_code))
        state = {key: tensor.clone() for key, tensor in tensors}
        model = made.from_pretrained(None, config=config, state_dict=state, **how, **placement(device, offload))
    return patched(spec, model).eval()  # as base + adapter is


def _tensors(
    rest: Path, store: Store, prefix: str, files: Mapping[str, Digest], check: Check
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of all files by their names there, on the CPU, each a view of a file that is deleted when the next one
    comes."""
    for file, digest in files.items():
        with tempfile.TemporaryDirectory(dir=rest.parent) as folder:
            part = Path(folder) / file
            store.download(f"{prefix}/{file}", part, sha256=digest.sha256)
            check(file, part)
            with safe_open(part, "pt") as stream:
                for key in stream.keys():  # noqa: SIM118 - it is no mapping
                    yield key, stream.get_tensor(key)
