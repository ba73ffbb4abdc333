"""Reads what README.md (its YAML header) and dataset_infos.json say of a data set: the files of each split, the types of columns.

A clone of a Hub repository has both; `datasets` reads them the same way.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from job.errors import DataError, SpecError

if TYPE_CHECKING:
    from job.data.classes import Kind

README = "README.md"
INFOS = "dataset_infos.json"


def files_by_split(folder: Path, name: str | None) -> dict[str, list[Path]]:
    """Returns the files of configuration `name` by split; empty if README.md names none, or none of them exist.

    Raises SpecError if README.md names several configurations and none is chosen.
    """
    configurations = {
        str(each.get("config_name", "default")): each
        for each in _listed(_head(folder).get("configs"))
        if isinstance(each, dict) and each.get("data_files")
    }
    if not configurations:
        return {}
    from datasets.data_files import resolve_pattern, sanitize_patterns

    chosen = configurations[_choose(configurations, name, folder)]
    base = folder / str(chosen.get("data_dir") or "")
    try:
        patterns = sanitize_patterns(chosen["data_files"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder / README}: cannot read its data_files: {str(error).splitlines()[0]}") from error
    found, whole = dict[str, set[Path]](), str(folder.resolve())
    for split, those in patterns.items():
        for pattern in (str(each) for each in those if "://" not in str(each)):
            with suppress(FileNotFoundError):  # the card may be older than the files
                inside = (os.path.relpath(file, whole) for file in resolve_pattern(pattern, str(base.resolve())))
                found.setdefault(split, set()).update(folder / file for file in inside if not file.startswith(".."))
    return {split: sorted(files) for split, files in found.items()}


def classes_noted(folder: Path, name: str | None) -> dict[str, Kind]:
    """Returns the kinds of class columns, for files that do not record them."""
    if not (_head(folder).get("dataset_info") or (folder / INFOS).is_file()):
        return {}
    from datasets.info import DatasetInfosDict

    from job.data.classes import with_classes

    try:
        infos = DatasetInfosDict.from_directory(str(folder))
    except Exception as error:  # it may raise anything on input it does not understand
        raise DataError(f"{folder}: cannot read the columns in {README} or {INFOS}: {error}") from error
    info = infos.get(name or "default") or (next(iter(infos.values())) if len(infos) == 1 else None)
    return with_classes(info.features.to_dict()) if info and info.features else {}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _choose(configurations: dict[str, dict[str, Any]], name: str | None, folder: Path) -> str:
    defaults = [each for each, said in configurations.items() if said.get("default") is True or each == "default"]
    chosen = name or (defaults[0] if defaults else "")
    if not chosen and len(configurations) == 1:
        chosen = next(iter(configurations))
    if chosen not in configurations:
        raise SpecError(
            f"dataset.name: {folder / README} names the configurations {', '.join(configurations)}, and the spec "
            f"{f'says {name}' if name else 'none of them'}; choose one"
        )
    return chosen


def _head(folder: Path) -> dict[str, Any]:
    """Returns the YAML between the first two lines of dashes; {} for any other README.md."""
    try:
        lines = (folder / README).read_text(encoding="utf-8", errors="replace").splitlines()
        if lines[:1] != ["---"]:
            return {}
        head = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except (OSError, ValueError, LookupError, AttributeError, RecursionError, yaml.YAMLError):  # PyYAML's own too
        return {}
    return head if isinstance(head, dict) else {}
