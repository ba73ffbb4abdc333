"""Uploads and downloads whole folders, several files at a time."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from job.errors import DataError
from job.store.disk import disk
from job.store.owned import OwnedStore
from job.store.protocol import Digest, Missing, Store, checked_key

FILES = 4  # at a time; their parts share the store's workers and buffers
T = TypeVar("T")


def files_of(folder: Path) -> list[str]:
    """List the files below a folder by relative name, with slashes, sorted."""
    with disk(folder):
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def upload_folder(store: Store, folder: Path, prefix: str) -> dict[str, Digest]:
    """Upload every file below `folder` to `prefix/its/name`. Returns digests by relative name."""
    return upload_files(store, folder, {name: f"{prefix}/{name}" for name in files_of(folder)})


def upload_files(store: Store, folder: Path, keys: dict[str, str]) -> dict[str, Digest]:
    """Upload the named files (relative to `folder`) to their keys, largest first."""
    for key in keys.values():
        checked_key(key)
    if isinstance(store, OwnedStore):
        store.claim(keys.values())  # all at once: each claim rewrites the record
    names = sorted(keys, key=lambda name: -(folder / name).stat().st_size)
    return together({name: lambda name=name: store.upload(folder / name, keys[name]) for name in names})  # type: ignore[misc]


def download_files(store: Store, keys: Iterable[str], folder: Path) -> Iterator[tuple[str, Digest | None]]:
    """Download objects to `folder/key`, a few at a time, and yield their digests in order; None for an object that is gone. A
    file that is already there is fetched again. Keys are taken as they are needed: there may be millions."""

    def one(key: str) -> tuple[str, Digest | None]:
        if not inside(folder, key):
            raise DataError(f"The key {key!r} in {store.url} would be written outside {folder}.")
        try:
            return key, store.download(key, folder / key)
        except Missing:
            return key, None

    waiting = deque[Future[tuple[str, Digest | None]]]()
    with ThreadPoolExecutor(FILES, thread_name_prefix="files") as pool:
        try:
            for key in keys:
                waiting.append(pool.submit(one, key))
                if len(waiting) > 4 * FILES:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()


def inside(folder: Path, name: str) -> bool:
    """Return whether a foreign name stays in the folder: no `..`, no absolute path, no symbolic link that leads out."""
    try:
        checked_key(name)
    except DataError:
        return False
    with contextlib.suppress(OSError, RuntimeError):
        return (folder / name).resolve().is_relative_to(folder.resolve())
    return False


def together(work: dict[str, Callable[[], T]], at_once: int = FILES) -> dict[str, T]:
    """Run the tasks a few at a time. The first failure cancels those not yet started and is raised."""
    with ThreadPoolExecutor(at_once, thread_name_prefix="files") as pool:
        futures: dict[str, Future[T]] = {name: pool.submit(piece) for name, piece in work.items()}
        wait(futures.values(), return_when=FIRST_EXCEPTION)
        for future in futures.values():
            if future.done() and not future.cancelled() and future.exception() is not None:
                pool.shutdown(wait=True, cancel_futures=True)
                future.result()
        return {name: future.result() for name, future in futures.items()}
