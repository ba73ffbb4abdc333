"""Commits, restores and prunes checkpoints: the only code that decides what is a checkpoint and what is rubbish.

A key under `checkpoints/` is written once. A second writer, or a second try, uses a separate folder inside that of the step, so
nothing that a manifest names is ever overwritten, and a writer that wakes up late can spoil nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from job.checkpoint.manifest import File, Manifest, folder_of, read_manifest, step_of, steps, steps_in, to_json
from job.checkpoint.pickles import refuse_pickles
from job.errors import DataError, Preempted
from job.layout import CHECKPOINTS, MANIFEST
from job.store import Conflict, Entry, Missing, Store, files_of, inside, take_back, upload_files
from job.store.disk import disk
from job.store.folders import together
from job.store.lease import Lease

LEFT_OUT = {"training_args.bin", MANIFEST}  # the first is a pickle of code that nothing needs: the spec says it all


class Restored(NamedTuple):
    """A checkpoint whose every byte was verified, and the local folder that now holds it."""

    manifest: Manifest
    folder: Path


def commit(
    store: Store,
    folder: Path,
    *,
    step: int,
    epoch: float,
    spec_digest: str,
    attempt: int,
    extra: dict[str, Any] | None = None,
    versions: dict[str, str] | None = None,
    lease: Lease | None = None,
) -> Manifest:
    """Make the files of `folder` the checkpoint of `step`. It exists only once its manifest does, which is written last.

    Raises Preempted if the lease was lost (nothing is committed then), and whatever the store raises.
    """
    there = {entry.key: entry for entry in store.list(f"{CHECKPOINTS}/")}
    names = [name for name in files_of(folder) if name not in LEFT_OUT]
    files = _unchanged(store, folder, names, there)
    token = lease.token if lease else 0
    room = _fresh_folder(step, token, there)
    if lease:
        lease.confirm()  # regained, if it expired while the store was away and nobody took it
    sent = upload_files(store, folder, {name: f"{room}/{name}" for name in names if name not in files})
    files |= {name: File(size=made.size, sha256=made.sha256, key=f"{room}/{name}") for name, made in sent.items()}
    manifest = Manifest(
        step=step,
        epoch=epoch,
        spec_digest=spec_digest,
        attempt=attempt,
        token=token,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions or {},
        files=dict(sorted(files.items())),
        extra=extra or {},
    )
    _publish(store, manifest, lease)
    return manifest


def _publish(store: Store, manifest: Manifest, lease: Lease | None) -> None:
    key = f"{folder_of(manifest.step)}/{MANIFEST}"
    try:
        before: str | None = store.version(key)
    except Missing:
        before = None
    if lease:
        lease.confirm()
    version = store.write(key, to_json(manifest), if_absent=before is None, if_match=before)
    if lease:
        try:
            lease.check()
        except Preempted:
            # This process slept past the end of its lease between the two: take the manifest back if it is ours.
            take_back(store, key, version)
            raise


def _unchanged(store: Store, folder: Path, names: list[str], there: dict[str, Entry]) -> dict[str, File]:
    """Find the files that the newest checkpoint already holds, byte for byte: frozen weights, tokenizers, configurations.

    If it shares files with an older one, only those are compared, since its other files change from step to step: weights and
    optimizer are hashed as they are sent, and hashing them here would be a second pass.
    """
    for step in steps_in(list(there)):
        try:
            newest = read_manifest(store, step)
        except DataError:
            continue
        shared = {name: file for name, file in newest.files.items() if step_of(file.key) != step}
        with disk(folder):
            return {
                name: old
                for name in names
                if (old := (shared or newest.files).get(name)) is not None
                and old.key in there
                and (folder / name).stat().st_size == old.size == there[old.key].size
                and sha256_of(folder / name) == old.sha256
            }
    return {}


def _fresh_folder(step: int, token: int, there: Iterable[str]) -> str:
    """Find a folder that is still empty. The first writer of an output gets the folder of the step itself, with the plain
    names."""
    taken = set(there)
    room = folder_of(step) if token <= 1 else f"{folder_of(step)}/writer-{token}"
    number = 1
    name = room
    while any(key.startswith(name + "/") for key in taken):
        number += 1
        name = f"{room}/try-{number}"
    return name


def restore(
    store: Store, into: Path, *, on_skip: Callable[[int, str], None], spec_digest: str | None = None
) -> Restored | None:
    """Fetch the newest checkpoint whose every file verifies (of this spec, if one is given) to `into/step-…`; None if there is
    none.

    A checkpoint that does not verify is skipped, and `on_skip(step, reason)` called. A failing store is no reason to go back in
    time: Unavailable and NotAllowed are raised.
    """
    for step in steps(store):
        folder = into / folder_of(step).rpartition("/")[2]
        try:
            manifest = read_manifest(store, step)
            if spec_digest not in (None, manifest.spec_digest):
                raise DataError("it belongs to another spec")
            _fetch(store, manifest, folder)
            refuse_pickles(folder)
            return Restored(manifest, folder)
        except (DataError, Conflict) as error:
            on_skip(step, str(error))
    return None


def _fetch(store: Store, manifest: Manifest, folder: Path) -> None:
    wanted = {name: file for name, file in manifest.files.items() if name not in LEFT_OUT}
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in set(files_of(folder)) - set(wanted):
            if not name.endswith(".part"):  # broken downloads are resumed
                (folder / name).unlink()
    for name in wanted:
        if not inside(folder, name):
            raise DataError(f"The file {name!r} of step {manifest.step} would be written outside its folder.")
    together({name: lambda name=name: _fetch_one(store, wanted[name], folder / name) for name in wanted})  # type: ignore[misc]


def _fetch_one(store: Store, file: File, path: Path) -> None:
    with disk(path):
        if path.is_file() and path.stat().st_size == file.size and sha256_of(path) == file.sha256:
            return
    found = store.download(file.key, path, sha256=file.sha256)
    if found.size != file.size:
        raise DataError(f"{file.key} has {found.size} bytes, not {file.size} as its manifest says.")


def prune(store: Store, *, keep: int, verified: int | None = None) -> list[int]:
    """Remove all but the `keep` newest checkpoints. Returns the removed steps.

    Manifests are deleted before data, so that nothing ever looks like a checkpoint that is not one. `verified` is the step that
    was just committed or restored: newer ones then did not verify, and are neither counted nor removed. Without it, the newest
    checkpoint whose files are all there with their sizes takes its place. That one always stays.
    """
    there = {entry.key: entry for entry in store.list(f"{CHECKPOINTS}/")}
    committed = steps_in(list(there))
    manifests: dict[int, Manifest] = {}
    for step in committed:
        try:
            manifests[step] = read_manifest(store, step)
        except DataError:
            continue
    whole = [step for step in manifests if verified is None or step <= verified]
    whole = [step for step in whole if _is_whole(manifests[step], there)]
    if not whole:
        return []
    newest = whole[0]
    kept = set(whole[: max(keep, 1)]) | {step for step in committed if step > newest}
    needed = {file.key for step in kept & set(manifests) for file in manifests[step].files.values()}
    dropped = [step for step in committed if step not in kept]
    store.delete([f"{folder_of(step)}/{MANIFEST}" for step in reversed(dropped)])
    gone = {f"{folder_of(step)}/{MANIFEST}" for step in dropped}
    needed |= {f"{folder_of(step)}/{MANIFEST}" for step in kept}
    store.delete(key for key in there if _is_rubbish(key, newest) and key not in needed | gone)
    return dropped


def _is_whole(manifest: Manifest, there: dict[str, Entry]) -> bool:
    return all(file.key in there and there[file.key].size == file.size for file in manifest.files.values())


def _is_rubbish(key: str, newest: int) -> bool:
    """Data of steps up to the newest good one may be deleted; beyond it, another upload may be under way."""
    step = step_of(key)
    return step is not None and step <= newest


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def known_sha256(file: Path) -> str:
    """Like `sha256_of`, but computed once per process while the file's size and time stay the same."""
    stat = file.stat()
    return _known_sha256(file, stat.st_size, stat.st_mtime_ns)


@cache
def _known_sha256(file: Path, _size: int, _changed: int) -> str:
    return sha256_of(file)
