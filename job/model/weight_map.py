"""Maps the tensors of a base model's files to the names of the loaded model's weights.

Files name tensors as the publisher did, and transformers renames them on loading. So the files' names are passed through
transformers' own renaming, on a model without weights.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from job.model.base_model import weight_files
from job.model.header import read_header


@dataclass(frozen=True)
class Slot:
    """A tensor in a weight file: its bytes `start` to `end`. `dtype` is in the format's spelling: BF16, F32…"""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Base:
    """A base model's weight files: `slots` by the files' tensor names, `names` from those to the loaded model's.

    `tied` holds names of the loaded model that share their weights, each with the other.
    """

    folder: Path
    files: tuple[str, ...]
    slots: dict[str, Slot]
    names: dict[str, str]
    tied: dict[str, str]


def read_base(folder: Path, trust_remote_code: bool = False) -> Base:
    """Read headers and configuration, without any weight."""
    files = tuple(file.name for file in weight_files(folder))
    slots: dict[str, Slot] = {}
    for file in files:
        header, begin = read_header(folder / file)
        for key, entry in header.items():
            start, end = entry["data_offsets"]
            slots[key] = Slot(file, entry["dtype"], tuple(entry["shape"]), begin + start, begin + end)
    names, tied = loaded_names(folder, list(slots), trust_remote_code)
    return Base(folder, files, slots, names, tied)


def loaded_names(folder: Path, keys: list[str], trust_remote_code: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Return the loaded model's names by the files' names, and which of them are tied.

    Takes the same steps as transformers 5.17's loader. A tensor that the loader builds from several (fused experts) has no
    single place in the files and is left out.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    mapping = get_model_conversion_mapping(model)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    there, prefix = model.state_dict(), model.base_model_prefix
    names = {}
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters, prefix, there)
        if name not in there and key in there:
            name, converted = rename_source_key(key, [], [], prefix, there)
        if converted is None and name in there:
            names[key] = name
    tied = dict(model.all_tied_weights_keys)
    return names, tied | {source: name for name, source in tied.items()}
