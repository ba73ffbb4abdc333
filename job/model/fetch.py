"""The base model's files: where they are, and what their headers tell without torch."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from job.errors import NotAllowed, SpecError, Unavailable
from job.model.lora import Linear
from job.spec import ModelSpec
from job.stage_in import check_room, local_path


def fetch_base(spec: ModelSpec, scratch: Path) -> Path:
    """A local folder with the base model: as named, or brought to scratch from `s3://` or the hub."""
    name = spec.name_or_path
    folder = local_path(name, scratch, "model.name_or_path", SpecError)
    if not folder.is_dir():
        if folder.exists() or "://" in name or name.startswith((".", "/", "~")):
            raise _not_a_model(name)
        folder = _from_hub(spec)
    refuse_unless_model(folder, name)
    return folder


def refuse_unless_model(folder: Path, name: str) -> None:
    if not (folder / "config.json").is_file():
        raise SpecError(f"model.name_or_path: {name} holds no config.json, so it is not a model")


def _not_a_model(name: str) -> SpecError:
    return SpecError(f"model.name_or_path: {name} is no folder; give a model folder, an s3:// prefix or a hub id")


def fetch_adapter(name: str, scratch: Path) -> Path:
    """A local folder with the adapter to start from. Raises SpecError when it holds none in PEFT's format."""
    folder = local_path(name, scratch, "lora.init_adapter", SpecError)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise SpecError(f"lora.init_adapter: {name} holds no {file}, so it is not an adapter in PEFT's format")
    return folder


def _from_hub(spec: ModelSpec) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import DryRunError

    with hub_errors(spec):
        left_out = ["original/*", "*.pth", "*.bin", "*.gguf"]
        which: dict[str, Any] = {"repo_id": spec.name_or_path, "revision": spec.revision, "ignore_patterns": left_out}
        # Nobody answers, or not to this token: the download itself says why, or finds all in its cache.
        with suppress(DryRunError):
            need = sum(file.file_size or 0 for file in snapshot_download(**which, dry_run=True) if file.will_download)
            check_room(need, Path(HF_HUB_CACHE), f"model.name_or_path: {spec.name_or_path}")
        return Path(snapshot_download(**which))


@contextmanager
def hub_errors(spec: ModelSpec) -> Iterator[None]:
    """What the hub's library raises in the block becomes SpecError, NotAllowed or Unavailable, naming the field."""
    from httpx import HTTPError
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    name = spec.name_or_path
    if name.count("/") != 1:
        raise _not_a_model(name)
    try:
        yield
    except GatedRepoError as error:
        page = f"https://huggingface.co/{name}"
        raise NotAllowed(f"model.name_or_path: {name} is gated; accept its terms at {page} and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise SpecError(f"model.name_or_path: the hub has no {name} that this token may see") from error
    except RevisionNotFoundError as error:
        raise SpecError(f"model.revision: {name} has no revision {spec.revision}") from error
    except (HfHubHTTPError, HTTPError, OSError) as error:  # not found on this disk, while offline, is an OSError too
        if is_offline_mode():
            raise SpecError(
                f"model.name_or_path: {name} is no folder here, and HF_HUB_OFFLINE is set; gather it with job prefetch"
            ) from error
        raise Unavailable(f"model.name_or_path: {name} is no folder, and the hub did not answer") from error


# Published checkpoints name layers as transformers did before 4.52; these are its modules' names today (its own
# conversion_mapping.py), in which the user writes lora.target_modules and the census is taken.
RENAMED = (
    (r"^language_model\.lm_head\b", "lm_head"),
    (r"^language_model\.(?:model\.)?", "model.language_model."),
    (r"^model\.(?=(?:layers|norm)\b)", "model.language_model."),
    (r"^(?=(?:vision_tower|vision_model|visual|multi_modal_projector)\b)", "model."),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)


BESIDE = (".json", ".jinja", ".model", ".txt")
"""Endings of the files beside the weights: configuration, tokenizer, processor, chat template."""


@dataclass(frozen=True)
class BaseFacts:
    """What the files of a base model say: `parameters` counts all weights, `linears` the layers by the module's name,
    `config` is config.json. `bytes` are those of all weight files, `largest` of the largest, `rest` of the files beside them."""

    model_type: str
    architecture: str
    parameters: int
    bytes: int
    linears: dict[str, Linear]
    config: dict[str, Any] = field(default_factory=dict)
    largest: int = 0
    rest: int = 0


def base_facts(folder: Path) -> BaseFacts:
    """Read `config.json` and the headers of the weight files; not one weight is loaded.

    Raises SpecError naming the file that is missing or broken.
    """
    config = _json(folder / "config.json")
    if "quantization_config" in config:
        raise SpecError(
            f"model.name_or_path: {folder} is stored quantised, and an adapter cannot be folded into such files; name the base "
            "in 16 bits (model.precision: 4bit holds it in 4 bits while training)"
        )
    files = weight_files(folder)
    if not files:
        raise SpecError(f"model.name_or_path: {folder} holds no .safetensors weights")
    count, linears = 0, dict[str, Linear]()
    for file in files:
        for name, tensor in read_header(file)[0].items():
            shape = tensor["shape"]
            count += math.prod(shape)
            layer = name.removesuffix(".weight")
            if layer != name and len(shape) == 2 and "embed" not in layer.rpartition(".")[2]:
                linears[module_name(layer)] = Linear(*shape)
    architectures = config.get("architectures") or ["unknown"]
    sizes = [file.stat().st_size for file in files]
    rest = [file for file in folder.iterdir() if file.is_file() and file.suffix in BESIDE]
    return BaseFacts(
        model_type=str(config.get("model_type", "unknown")),
        architecture=str(architectures[0]),
        parameters=count,
        bytes=sum(sizes),
        linears=linears,
        config=config,
        largest=max(sizes),
        rest=sum(file.stat().st_size for file in rest),
    )


def weight_files(folder: Path) -> list[Path]:
    """Those that transformers reads: the one file, or those that the index names. What some publishers add beside them
    (consolidated.safetensors) holds the same weights under other names, and a merge would leave it as it is."""
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if one.is_file():
        return [one]
    if index.is_file():
        return [folder / name for name in sorted(set(_json(index).get("weight_map", {}).values()))]
    return sorted(folder.glob("*.safetensors"))


def module_name(layer: str) -> str:
    """A layer's name in the loaded model, from its name in the checkpoint."""
    for old, new in RENAMED:
        layer = re.sub(old, new, layer)
    return layer


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise SpecError(f"model.name_or_path: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SpecError(f"model.name_or_path: {path} is not JSON") from error
    if not isinstance(tree, dict):
        raise SpecError(f"model.name_or_path: {path} is not a JSON object")
    return tree


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begin: 8 bytes of length, then JSON (the format's own
    specification)."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > 100_000_000:
                raise ValueError
            header: dict[str, Any] = json.loads(stream.read(length))
    except FileNotFoundError as error:
        raise SpecError(f"model.name_or_path: {file} is not there, though the index names it") from error
    except PermissionError as error:
        raise NotAllowed(f"model.name_or_path: {file} may not be read by user {os.geteuid()}") from error
    except (ValueError, struct.error, OSError) as error:
        raise SpecError(f"model.name_or_path: {file} is not a safetensors file") from error
    header.pop("__metadata__", None)
    return header, 8 + length
