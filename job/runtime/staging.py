"""Provides what a spec names as a local path: folders stay where they are, `s3://` prefixes are fetched to scratch once."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from job.config.environment import Environment
from job.errors import JobError, SpecError
from job.runtime.peaks import used_bytes
from job.runtime.prefixes import Fetched, fetch_listed, write_listing
from job.runtime.progress import growing
from job.runtime.scratch import disk_of
from job.runtime.status import bytes_text
from job.store import Missing, open_store
from job.store.disk import disk as disk_errors

log = logging.getLogger("job")

PARTLY = re.compile(r"(.*/)?\.([^/]+)\.[0-9a-f]{12}\.part", re.DOTALL)
"""See `job.store.disk.partial_name`."""
WORDS = 80
"""Characters of a URL to show in the name of its folder on scratch."""
BUNDLE = ".bundle"
FOLDERS = {
    "model.name_or_path": "model",
    "lora.init_adapter": "adapter",
    "dataset.path": "dataset",
    "dataset.eval_path": "evaluation",
    "dataset.eval_split": "evaluation",
}
"""Where a bundle in use (see `job.prefetch`) has what a field names, below `BUNDLE` on scratch."""


def is_there(name: str) -> bool:
    """Return whether an `s3://` URL names an object, or a prefix of one."""
    parent, _, key = name.rpartition("/")
    return any(open_store(name).list()) or any(entry.key == key for entry in open_store(parent).list(key))


def exists(path: Path) -> bool:
    """Return whether a path exists. Raises NotAllowed or SpecError if that cannot be determined."""
    with disk_errors(path):
        return path.exists()


def check_room(need: int, folder: Path, what: str) -> None:
    """Raises SpecError if `need` more bytes do not fit on the disk of `folder`, or in what `JOB_SCRATCH_GB` leaves of it: a
    retry would fetch as much again."""
    free = room_at(folder)
    if free is not None and need > free:
        raise SpecError(
            f"{what} needs {bytes_text(need)} in {folder}, and {bytes_text(free)} are free; point JOB_SCRATCH at a larger "
            "disk, or free some space there"
        )


def room_at(folder: Path) -> int | None:
    """Bytes that may still be written to `folder`: what is free on its disk and, below scratch, what `JOB_SCRATCH_GB` leaves.
    None if unknown."""
    there = disk_of(folder, Environment.read(os.environ))  # no layer between here and `run` needs it
    return None if there is None else there.room


def local_path(name: str, scratch: Path, field: str, error: type[JobError] = SpecError) -> Path:
    """Return a path for `name`: itself, that of a `file://` URL, or a folder below `scratch` that holds the `s3://` prefix (a
    file, if that is an object).

    A bundle in use takes precedence. A prefix whose listing has not changed since it was fetched to this scratch is not fetched
    again; objects that left it are removed. Raises `error`, naming `field`, if there is nothing under the prefix.
    """
    bundled = scratch / BUNDLE / FOLDERS.get(field, field)
    if bundled.exists():
        return bundled.resolve()
    if not name.startswith("s3://"):
        try:
            return Path(name.removeprefix("file://")).expanduser()
        except RuntimeError as unknown:
            raise error(f"{field}: {name} starts with the home of a user that this machine does not have") from unknown
    return _fetched(name, scratch, field, error)


def _fetched(name: str, scratch: Path, field: str, error: type[JobError]) -> Path:
    """Return the folder or the file that holds exactly what is under the `s3://` prefix `name` now. One job on the node at a
    time writes to it."""
    folder = scratch / "fetched" / name_on_scratch(name.rstrip("/"))
    folder.mkdir(parents=True, exist_ok=True)
    fetched = Fetched(folder.with_name(f"{folder.name}.json"), folder.with_name(f"{folder.name}.part"))
    with only_one(folder.with_name(f".{folder.name}.lock"), f"{field}: {name}"):
        store = open_store(name)
        listing = write_listing(store, folder.with_name(f"{folder.name}.listing"))
        if listing.keys and fetched.is_as(listing):
            listing.file.unlink()
            return folder
        fetched.begin()
        parent, _, last = name.rpartition("/")
        if remove_others(folder, listing.keys or {last}):
            _remove_copies(scratch, field)
        if not listing.keys:
            try:
                open_store(parent).download(last, folder / last)
            except Missing:
                remove_others(folder, ())
                raise error(f"{field}: there is nothing under {name}") from None
            return folder / last
        check_room(listing.size - used_bytes(folder), folder, f"{field}: {name}")
        with growing(f"fetch {field}", folder, listing.size):
            gone = fetch_listed(store, listing, fetched, folder)
        if gone:
            remove_others(folder, listing.keys - gone)
        fetched.complete(listing)
    return folder


@contextmanager
def only_one(lock: Path, what: str) -> Iterator[None]:
    """Wait until no other job on this node holds the lock. The kernel releases it when its holder dies."""
    with lock.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another job, which fetches %s to scratch", what)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:  # Lustre mounted without `flock` refuses
            pass
        try:
            yield
        finally:
            # Closing does not release it while a process forked meanwhile has the file open too.
            with suppress(OSError):
                fcntl.flock(stream, fcntl.LOCK_UN)


def name_on_scratch(url: str) -> str:
    """The name of the folder for this URL and no other: its last characters, to recognise it, and a digest of the whole."""
    words = re.sub(r"[^\w.-]+", "-", url.removeprefix("s3://"), flags=re.ASCII)[-WORDS:]
    return f"{words}-{hashlib.sha256(url.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def remove_others(folder: Path, keys: Collection[str]) -> bool:
    """Remove everything that was fetched to `folder` except these keys, and return whether there was any: an object that left
    its prefix, such as a withdrawn patient's, is neither read again nor kept. A partly fetched file stays while its object
    exists."""
    removed = False
    for here, inner, names in os.walk(folder, topdown=False):
        for name in (*names, *inner):
            path = Path(here) / name
            key = path.relative_to(folder).as_posix()
            partly = PARTLY.fullmatch(key)
            if name in inner and not path.is_symlink():
                with suppress(OSError):  # not empty
                    path.rmdir()
            elif key not in keys and not (partly and f"{partly[1] or ''}{partly[2]}" in keys):
                path.unlink(missing_ok=True)
                removed = True
    return removed


def _remove_copies(scratch: Path, field: str) -> None:
    """Remove shrunken images and unpacked tables, which are made again when needed. Tables are removed for `dataset.path`
    only: it is fetched before any table is open."""
    for cache in ("pictures", "datasets") if field == "dataset.path" else ("pictures",):
        shutil.rmtree(scratch / "cache" / cache, ignore_errors=True)
