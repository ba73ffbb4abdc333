"""Locates the base model's files and reads their headers without torch."""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from job.config.schema import ModelSpec
from job.errors import SpecError
from job.model.header import read_header
from job.model.lora_targets import HEAD, Linear, is_fused
from job.runtime.hub import hub_errors, is_hub_id
from job.runtime.staging import check_room, local_path

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def fetch_base(spec: ModelSpec, scratch: Path) -> Path:
    """Return a local folder with the base model, fetching it from `s3://` or the hub to scratch if needed."""
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
    return SpecError(f"model.name_or_path: {name} is not a folder; name a model folder, an s3:// prefix or a hub id")


def fetch_adapter(name: str, scratch: Path) -> Path:
    """Return a local folder with the initial adapter. Raises SpecError when it is not in PEFT's format."""
    folder = local_path(name, scratch, "lora.init_adapter", SpecError)
    if not folder.is_dir():
        raise SpecError(f"lora.init_adapter: {name} is not a folder here; name an adapter's folder or an s3:// prefix")
    refuse_unless_adapter(folder, name)
    return folder


def refuse_unless_adapter(folder: Path, name: str) -> None:
    for file in ADAPTER_FILES:
        if not (folder / file).is_file():
            pickled = file.endswith(".safetensors") and (folder / "adapter_model.bin").is_file()
            why = "and adapter_model.bin is not opened, since a pickle can run code; save it again as safetensors"
            raise SpecError(
                f"lora.init_adapter: {name} holds no {file}, "
                + (why if pickled else "so it is not an adapter in PEFT's format")
            )


def _from_hub(spec: ModelSpec) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import DryRunError

    refuse_unless_hub_id(spec.name_or_path)
    with hub_errors(spec.name_or_path, "model.name_or_path", spec.revision):
        left_out = ["original/*", "*.pth", "*.bin", "*.gguf"]
        which: dict[str, Any] = {"repo_id": spec.name_or_path, "revision": spec.revision, "ignore_patterns": left_out}
        # If the hub is unreachable or refuses this token, the download below raises the cause or uses its cache.
        with suppress(DryRunError):
            need = sum(file.file_size or 0 for file in snapshot_download(**which, dry_run=True) if file.will_download)
            check_room(need, Path(HF_HUB_CACHE), f"model.name_or_path: {spec.name_or_path}")
        return Path(snapshot_download(**which))


def refuse_unless_hub_id(name: str) -> None:
    if not (is_hub_id(name) and "/" in name):
        raise _not_a_model(name)


# Published checkpoints use layer names from before transformers 4.52. These rules give today's module names (see its
# conversion_mapping.py), which users write in lora.target_modules and the census uses.
RENAMED = (
    (r"^language_model\.lm_head\b", "lm_head"),
    (r"^language_model\.(?:model\.)?", "model.language_model."),
    (r"^model\.(?=(?:layers|norm|embed_tokens)\b)", "model.language_model."),
    (r"^(?=(?:vision_tower|vision_model|visual|multi_modal_projector)\b)", "model."),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)


BESIDE = (".json", ".jinja", ".model", ".txt")
"""Suffixes of the files beside the weights: configuration, tokenizer, processor, chat template."""


@dataclass(frozen=True)
class BaseFacts:
    """Facts from a base model's files: `parameters` counts all weights, `linears` maps the names of linear layers to shapes,
    `matrices` those of all modules but embeddings and convolutions to sizes, `tables` names these two and a head that is tied to
    the embeddings, and `config` is config.json. `bytes` is the size of all weight files, `largest` of the largest, `rest` of the
    files beside them."""

    model_type: str
    architecture: str
    parameters: int
    bytes: int
    linears: dict[str, Linear]
    config: dict[str, Any] = field(default_factory=dict)
    largest: int = 0
    rest: int = 0
    matrices: dict[str, int] = field(default_factory=dict)
    tables: tuple[str, ...] = ()


def base_facts(folder: Path) -> BaseFacts:
    """Read `config.json` and the headers of the weight files without loading any weight.

    Raises SpecError naming the missing or broken file.
    """
    config = _checked(json_object(folder / "config.json"), folder)
    if "quantization_config" in config:
        raise SpecError(
            f"model.name_or_path: {folder} is quantised, and an adapter cannot be merged into quantised files; name the 16-bit "
            "base model (model.precision: 4bit loads it in 4 bits for training)"
        )
    files = weight_files(folder)
    if not files:
        raise SpecError(f"model.name_or_path: {folder} holds no .safetensors weights")
    count, linears, matrices, tables = 0, dict[str, Linear](), dict[str, int](), list[str]()
    for file in files:
        for name, tensor in read_header(file)[0].items():
            shape = tensor["shape"]
            count += math.prod(shape)
            layer = name.removesuffix(".weight")
            experts = len(shape) == 3 and is_fused(layer)
            module, table = module_name(layer), re.search(r"embed[^.]*(?<!_projection)$", layer)
            if (len(shape) == 2 or experts) and not table and not _unread(module, config):
                matrices[module] = math.prod(shape)
                if layer != name and len(shape) == 2 and not is_fused(layer):
                    linears[module] = Linear(*shape)
            elif layer != name and len(shape) > 1 and not _unread(module, config):
                tables.append(module)
    sizes = [file.stat().st_size for file in files]
    rest = [file for file in folder.iterdir() if file.is_file() and file.suffix in BESIDE]
    return BaseFacts(
        model_type=str(config.get("model_type", "unknown")),
        architecture=str((config.get("architectures") or ["unknown"])[0]),
        parameters=count,
        bytes=sum(sizes),
        linears=linears,
        matrices=matrices,
        tables=(*tables, *({HEAD} - linears.keys())),
        config=config,
        largest=max(sizes),
        rest=sum(file.stat().st_size for file in rest),
    )


def weight_files(folder: Path, named_by: str = "model.name_or_path") -> list[Path]:
    """List the weight files that transformers reads: the single file, or those in the index. Extra files of some publishers
    (consolidated.safetensors) hold the same weights under other names, and a merge would leave them unchanged."""
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if one.is_file():
        return [one]
    if index.is_file():
        return [folder / name for name in _named(json_object(index, named_by), index, named_by)]
    return sorted(folder.glob("*.safetensors"))


def _named(tree: dict[str, Any], index: Path, named_by: str) -> list[str]:
    """List the weight files in an index. Raises SpecError unless each is a file beside it."""
    names = tree.get("weight_map")
    names = [*names.values()] if isinstance(names, dict) else [None]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[^/\0]+\.safetensors", name):
            raise SpecError(
                f"{named_by}: {index} does not name a .safetensors file beside it for each weight (weight_map); fetch it again"
            )
    return sorted(set(names))


NUMBERS = {
    "vision_config": ("image_size", "patch_size", "max_num_tiles"),
    "text_config": ("vocab_size", "num_hidden_layers"),
}
"""Fields of config.json that the plan computes with."""


def _checked(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Drop null fields from the configuration, and take the largest of numbers that it lists (height and width). Raises SpecError
    when the plan could not compute with it."""
    config = {name: value for name, value in config.items() if value is not None}
    wrong = [] if isinstance(config.get("architectures", []), list) else ["architectures"]
    for section, fields in NUMBERS.items():
        inner = config.get(section, {})
        if not isinstance(inner, dict):
            wrong.append(section)
            continue
        inner = {name: value for name, value in inner.items() if value is not None}
        for name in inner.keys() & set(fields):
            listed = inner[name] if isinstance(inner[name], list) else [inner[name]]
            if listed and all(type(each) is int and 0 < each < 2**31 for each in listed):
                inner[name] = max(listed)
            else:
                wrong.append(f"{section}.{name}")
        config |= {section: inner} if inner else {}
    if wrong:
        raise SpecError(
            f"model.name_or_path: {folder / 'config.json'} has no usable {', '.join(wrong)}; use the published file"
        )
    return config


def _unread(module: str, config: dict[str, Any]) -> bool:
    """Tell whether transformers leaves a layer of the files out: those that predict further tokens (`mtp`, or beyond the last
    layer), and keys and values of layers that share an earlier layer's (Gemma 3n and 4)."""
    text = config.get("text_config", {})
    found = re.match(r"model\.language_model\.layers\.(\d+)\.(self_attn\.[kv]_proj$)?", module)
    if found is None or "num_hidden_layers" not in text:
        return module.startswith("mtp.")
    shared = text.get("num_kv_shared_layers") if found[2] else 0
    return bool(int(found[1]) >= text["num_hidden_layers"] - (shared if type(shared) is int else 0))


def module_name(layer: str) -> str:
    """Return the loaded model's name for a layer of the checkpoint."""
    for old, new in RENAMED:
        layer = re.sub(old, new, layer)
    return layer


def json_object(path: Path, named_by: str = "model.name_or_path") -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise SpecError(f"{named_by}: {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{named_by}: {path} is not JSON") from error
    if not isinstance(tree, dict):
        raise SpecError(f"{named_by}: {path} is not a JSON object")
    return tree
