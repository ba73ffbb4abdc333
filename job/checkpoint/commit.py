"""Commit, restore and prune: the only code that decides what is a checkpoint and what is rubbish.

A key under `checkpoints/` is written once. A second writer, or a second try, uses a folder of its own inside that of
the step, so nothing that a manifest names is ever overwritten, and a writer back from the dead can spoil nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from job.checkpoint.manifest import (
    NAME,
    ROOT,
    File,
    Manifest,
    folder_of,
    read_manifest,
    step_of,
    steps,
    steps_in,
    to_json,
)
from job.checkpoint.pickles import refuse_pickles
from job.errors import DataError, Preempted
from job.store import Conflict, Entry, Missing, Store, files_of, inside, upload_files
from job.store.folders import together
from job.store.lease import Lease
from job.store.local import disk

LEFT_OUT = {"training_args.bin", NAME}  # the first is a pickle of code which nothing needs; the spec says it all


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
    """Make the files of `folder` the checkpoint of `step`. Nothing exists until the manifest does, which comes last.

    Raises Preempted when the lease was lost (nothing is committed then), else what the store raises.
    """
    there = {entry.key: entry for entry in store.list(f"{ROOT}/")}
    names = [name for name in files_of(folder) if name not in LEFT_OUT]
    files = _unchanged(store, folder, names, there)
    token = lease.token if lease else 0
    room = _fresh_folder(step, token, there)
    if lease:
        lease.confirm()  # had back, if it ran out while the store was away and nobody came
    sent = upload_files(store, folder, {name: f"{room}/{name}" for name in names if name not in files})
    files |= {name: File(size=size, sha256=sha256, key=f"{room}/{name}") for name, (size, sha256) in sent.items()}
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
    key = f"{folder_of(manifest.step)}/{NAME}"
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
            # This process slept through the end of its lease between the two: take the manifest back if it is ours.
            if store.version(key) == version:
                store.delete([key])
            raise


def _unchanged(store: Store, folder: Path, names: list[str], there: dict[str, Entry]) -> dict[str, File]:
    """The files that the newest checkpoint already holds, byte for byte: frozen weights, tokenizers, configurations.

    Where it shares files with an older one, what it does not share changes from step to step. That is not looked at: to
    hash weights and optimizer before they are sent, where they are hashed anyway, would be a second pass over them.
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
    """Where nothing is yet. The first writer of an output gets the folder of the step itself, with the plain names."""
    taken = set(there)
    room = folder_of(step) if token <= 1 else f"{folder_of(step)}/writer-{token}"
    number = 1
    name = room
    while any(key.startswith(name + "/") for key in taken):
        number += 1
        name = f"{room}/try-{number}"
    return name


def restore(store: Store, into: Path, *, on_skip: Callable[[int, str], None]) -> Restored | None:
    """Fetch the newest checkpoint whose every file verifies to `into/step-…`; None when there is none.

    One that does not verify is passed over and `on_skip(step, reason)` called. A store that fails is no reason to go
    back in time: Unavailable and NotAllowed are raised.
    """
    for step in steps(store):
        folder = into / folder_of(step).rpartition("/")[2]
        try:
            manifest = read_manifest(store, step)
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
            if not name.endswith(".part"):  # what a broken download left is continued
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


def prune(store: Store, *, keep: int, keep_every: int | None = None, verified: int | None = None) -> list[int]:
    """Remove all but the `keep` newest checkpoints and those at multiples of `keep_every`. Returns the steps removed.

    Manifests go first, then data, so that nothing ever looks like a checkpoint and is none. `verified` is the step that
    was just committed or restored: newer ones are then a past that did not verify, which neither counts nor goes.
    Without it, the newest whose files are all there with their sizes is taken for it. That one always stays.
    """
    there = {entry.key: entry for entry in store.list(f"{ROOT}/")}
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
    kept |= {step for step in whole if keep_every is not None and step % keep_every == 0}
    needed = {file.key for step in kept & set(manifests) for file in manifests[step].files.values()}
    dropped = [step for step in committed if step not in kept]
    store.delete([f"{folder_of(step)}/{NAME}" for step in reversed(dropped)])
    gone = {f"{folder_of(step)}/{NAME}" for step in dropped}
    needed |= {f"{folder_of(step)}/{NAME}" for step in kept}
    store.delete(key for key in there if _is_rubbish(key, newest) and key not in needed | gone)
    return dropped


def _is_whole(manifest: Manifest, there: dict[str, Entry]) -> bool:
    return all(file.key in there and there[file.key].size == file.size for file in manifest.files.values())


def _is_rubbish(key: str, newest: int) -> bool:
    """Data of steps up to the newest good one may go; beyond it, another upload may be under way."""
    step = step_of(key)
    return step is not None and step <= newest


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
