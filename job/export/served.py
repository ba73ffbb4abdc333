"""Merged weights that lie in a store, read back from it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from job.model import tiles
from job.model.transformers_backend import DTYPES
from job.spec import ModelSpec
from job.store import Digest, Store


def read_back(
    spec: ModelSpec,
    rest: Path,
    store: Store,
    prefix: str,
    files: Mapping[str, Digest],
    device: torch.device,
    precision: str,
) -> Any:
    """The model of the weight files under `prefix/`, each checked against its digest. One at a time is on scratch.

    The folder `rest` holds the configuration.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    state: dict[str, torch.Tensor] = {}
    for file, digest in files.items():
        with tempfile.TemporaryDirectory(dir=rest.parent) as folder:
            part = Path(folder) / file
            store.download(f"{prefix}/{file}", part, sha256=digest.sha256)
            weights = load_file(part, device=str(device))
            # On a CPU these are views of the file, which would then stay on scratch.
            state |= {name: weight.clone() if device.type == "cpu" else weight for name, weight in weights.items()}
    config = AutoConfig.from_pretrained(rest, trust_remote_code=spec.trust_remote_code)
    with torch.device("meta"):  # the automatic class takes weights from a folder only
        made = type(AutoModelForImageTextToText.from_config(config, trust_remote_code=spec.trust_remote_code))
    model = made.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=DTYPES[precision],
        attn_implementation=spec.attn_implementation,
        device_map={"": device},
    )
    if spec.attn_implementation == "sdpa":
        tiles.install(model)  # as on base + adapter
    return model.eval()
