"""Checks that the output is separate from everything that the job reads. Opens nothing and contacts no store."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from job.config.environment import Environment
from job.config.schema import JobSpec
from job.errors import SpecError
from job.runtime.scratch import scratch_folder


def refuse_overlap(spec: JobSpec, environment: Environment) -> None:
    """Raises SpecError if `output.url` is, holds or lies in what the job reads, its bundle or its scratch folder; or if
    scratch or `evaluation.cache` is or lies in what it reads, where their files would be taken for rows."""
    read, scratch = read_by(spec, environment), str(scratch_folder(environment).absolute())
    apart("output.url", spec.output.url, read | {"JOB_SCRATCH": scratch})
    outside("JOB_SCRATCH", scratch, read)
    if spec.evaluation.cache:
        outside("evaluation.cache", spec.evaluation.cache, read)


def read_by(spec: JobSpec, environment: Environment) -> dict[str, str]:
    """By field or variable, each folder, file and `s3://` prefix that the job reads. Hub ids are left out."""
    named = {
        "dataset.path": spec.dataset.path,
        "dataset.eval_path": spec.dataset.eval_path,
        "model.name_or_path": spec.model.name_or_path,
        "lora.init_adapter": spec.lora.init_adapter,
        "JOB_BUNDLE": environment.bundle,
    }
    named |= {f"evaluation.extra_metrics.{name}": path for name, path in spec.evaluation.extra_metrics.items()}
    return {field: place for field, place in named.items() if place and _is_place(place)}


def apart(field: str, url: str, places: Mapping[str, str], ways: Collection[str] = ("is", "lies in", "holds")) -> None:
    """Raises SpecError if `url`, which `field` names and where files will be written, overlaps any of the places in one of the
    ways."""
    found = [f"{said} {other} ({place})" for other, place in places.items() if (said := _overlap(url, place)) in ways]
    if found:
        raise SpecError(f"{field}: {url} {' and '.join(found)}; choose one apart from everything that the job reads")


def outside(field: str, url: str, places: Mapping[str, str]) -> None:
    """Like `apart`, for a folder that may hold the places: data on the node's disk may lie below its scratch, for example."""
    apart(field, url, places, ("is", "lies in"))


def _overlap(mine: str, theirs: str) -> str:
    """How the first place relates to the second: `is`, `lies in`, `holds`, or an empty string if they are separate."""
    remote = [_is_remote(place) for place in (mine, theirs)]
    if all(remote):
        bucket, other = _prefix(mine), _prefix(theirs)
        inside, around = bucket.startswith(other), other.startswith(bucket)
    elif any(remote):
        return ""
    else:
        ours, others = _path(mine, quoted=True), _path(theirs, quoted=False)
        inside, around = _within(ours, others), _within(others, ours)
    return "is" if inside and around else "lies in" if inside else "holds" if around else ""


def _is_remote(place: str) -> bool:
    return urlsplit(place).scheme == "s3"


def _is_place(name: str) -> bool:
    """Whether a name that may be a hub id is a place on this machine or in a store."""
    with suppress(OSError):
        return "://" in name or name[:1] in "/.~" or Path(name).exists()
    return False


def _prefix(url: str) -> str:
    """An `s3://` URL as bucket and prefix, with a slash at the end."""
    parts = urlsplit(url)
    return "/".join([parts.netloc, *filter(None, parts.path.split("/")), ""])


def _path(place: str, *, quoted: bool) -> Path:
    """A folder or file as the job opens it: in a `file://` URL of the output, `%20` is a space."""
    if place.startswith("file://"):
        return Path(unquote(urlsplit(place).path) if quoted else place.removeprefix("file://"))
    with suppress(RuntimeError):  # a user who does not exist
        return Path(place).expanduser().absolute()
    return Path(place).absolute()


def _within(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or lies in it: by their names, by where their links lead, or by what the file system says of
    two names (it may ignore case, or be mounted twice)."""
    if ".." not in (*path.parts, *folder.parts) and path.is_relative_to(folder):
        return True
    path, folder = path.resolve(), folder.resolve()
    there = folder
    while not _same(there, there):
        there = there.parent
    rest = folder.relative_to(there).parts
    for above in (path, *path.parents):
        if _same(above, there):
            tail = path.relative_to(above).parts[: len(rest)]
            return tail == rest or (_knows_no_case(there) and _folded(tail) == _folded(rest))
    return False


def _same(one: Path, other: Path) -> bool:
    with suppress(OSError):  # one of them is missing, or may not be looked at
        return one.samefile(other)
    return False


def _folded(parts: tuple[str, ...]) -> list[str]:
    return [part.casefold() for part in parts]


def _knows_no_case(folder: Path) -> bool:
    """Whether the file system ignores case here, as far as a name in the folder, or the folder's own name, can tell."""
    inner = folder.iterdir() if os.access(folder, os.R_OK) and folder.is_dir() else ()
    name = next((name for name in (*inner, folder) if name.name.swapcase() != name.name), None)
    return name is not None and _same(name, name.with_name(name.name.swapcase()))
