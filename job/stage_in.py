"""What a spec names, as a local path: folders stay where they are, `s3://` prefixes are brought to scratch once."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from job.errors import DataError, JobError, SpecError
from job.peaks import used_bytes
from job.planning.limits import disk, scratch_disk
from job.record import bytes_text
from job.scratch import scratch_folder
from job.store import Missing, download_folder, open_store

HERE = ".listing.json"
BUNDLE = "bundle"
FOLDERS = {
    "model.name_or_path": "model",
    "lora.init_adapter": "adapter",
    "dataset.path": "dataset",
    "dataset.eval_path": "evaluation",
    "dataset.eval_split": "evaluation",
}
"""Where a bundle in use (see `job.bundle`) has what a field names, below `BUNDLE` on scratch."""


def is_there(name: str) -> bool:
    """Whether an `s3://` url names an object, or a prefix of any."""
    parent, _, key = name.rpartition("/")
    return any(open_store(name).list()) or any(entry.key == key for entry in open_store(parent).list(key))


def check_room(need: int, folder: Path, what: str) -> None:
    """Raises SpecError when `need` more bytes do not fit the disk of `folder`, or what `JOB_SCRATCH_GB` leaves of it: whoever
    tried again would fetch as much again."""
    root = scratch_folder(os.environ)
    there = scratch_disk(root, os.environ) if folder.is_relative_to(root) else disk(folder)
    if there is not None and need > there.room:
        raise SpecError(
            f"{what} takes {bytes_text(need)} of {folder}, and {bytes_text(there.room)} are free; point JOB_SCRATCH at a larger "
            "disk, or remove what is not needed there"
        )


def local_path(name: str, scratch: Path, field: str, error: type[JobError] = DataError) -> Path:
    """A path for `name`: itself, what a `file://` URL says, or a folder below `scratch` that holds the `s3://` prefix (a file,
    where that is an object).

    What a bundle in use holds comes before all that. A prefix whose listing has not changed since it was fetched to this
    scratch is not fetched again. Raises `error`, naming `field`, when there is nothing under the prefix.
    """
    bundled = scratch / BUNDLE / FOLDERS.get(field, field)
    if bundled.exists():
        return bundled.resolve()
    if not name.startswith("s3://"):
        return Path(name.removeprefix("file://")).expanduser()
    store = open_store(name)
    entries = list(store.list())
    listing = [[entry.key, entry.size, entry.modified] for entry in entries]
    folder = scratch / "fetched" / re.sub(r"[^\w.-]+", "-", name.removeprefix("s3://"))
    folder.mkdir(parents=True, exist_ok=True)
    mark, sizes = folder / HERE, sum(entry.size for entry in entries)
    if not listing:
        parent, _, key = name.rpartition("/")
        try:
            open_store(parent).download(key, folder / key)
        except Missing:
            raise error(f"{field}: there is nothing under {name}") from None
        return folder / key
    if not mark.exists() or json.loads(mark.read_text()) != listing:
        mark.unlink(missing_ok=True)
        check_room(sizes - used_bytes(folder), folder, f"{field}: {name}")
        download_folder(store, "", folder)
        mark.write_text(json.dumps(listing))
    return folder
