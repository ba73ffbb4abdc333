"""Gathers everything that a spec names in one folder or `s3://` prefix, so that the same spec runs without a network.

    bundle/
      model/            the base model: weights in 16 bits, configuration, processor
      adapter/          lora.init_adapter, where the spec has one
      metrics/          the models of evaluation.extra_metrics
      dataset/          the training rows, and in evaluation/ those held out by the user
      images/           images behind URLs in rows
      BUNDLE.json       written last: what was asked for, and the size and SHA-256 of every file

To use a bundle, the job compares its files with `BUNDLE.json` and puts its folders where `stage_in.local_path` looks first. The
spec and its digest stay the same.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from job.checkpoint.commit import known_sha256
from job.config.environment import Environment
from job.config.schema import JobSpec
from job.errors import DataError, SpecError
from job.output.overlap import apart, outside, read_by
from job.runtime.staging import BUNDLE, FOLDERS, local_path
from job.runtime.status import bytes_text
from job.store import Digest, LocalStore, OwnedStore, open_store, upload_files
from job.store.disk import disk
from job.store.folders import together
from job.store.owned import BUNDLES

if TYPE_CHECKING:
    from job.data.sources import Source

log = logging.getLogger("job")

MANIFEST = "BUNDLE.json"
MADE = ".bundle-made"
"""Folder on scratch where a bundle for a remote store is assembled."""


def asked_for(spec: JobSpec) -> dict[str, str]:
    """Describe in words, by field, what a bundle must hold for this spec."""
    data, model = spec.dataset, spec.model

    def rows(path: str, split: str) -> str:
        return _words(path=path, name=data.name, revision=data.revision, split=split)

    asked = {"model.name_or_path": _words(path=model.name_or_path, revision=model.revision)}
    asked |= {"dataset.path": rows(data.path, data.split)}
    for metric, given in spec.evaluation.extra_metrics.items():
        asked[f"evaluation.extra_metrics.{metric}"] = _words(path=given)
    asked |= {"lora.init_adapter": _words(path=spec.lora.init_adapter)} if spec.lora.init_adapter else {}
    asked |= {"dataset.eval_path": rows(data.eval_path, data.split)} if data.eval_path else {}
    return asked | ({"dataset.eval_split": rows(data.path, data.eval_split)} if data.eval_split else {})


def _words(**named: str | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in named.items() if value)


@dataclass(frozen=True)
class Contents:
    """Contents of `BUNDLE.json`: what was asked for and where it is, by field; the size and SHA-256 of every file, by name."""

    asked: dict[str, str]
    places: dict[str, str]
    files: dict[str, Digest]


def use_bundle(spec: JobSpec, named: str, scratch: Path, *, hashed: bool = True) -> None:
    """Take what the spec names from the bundle that `JOB_BUNDLE` named; an empty name changes nothing.

    Raises SpecError if the bundle was made for another spec, or if the files in use are not those gathered: by name and size, and
    with `hashed` by every byte.
    """
    place = scratch / BUNDLE
    _clear(place)
    if not named:
        return
    folder = local_path(named, scratch, "JOB_BUNDLE", SpecError).resolve()
    there = _read_contents(folder, named)
    for field, wanted in asked_for(spec).items():
        if there.asked.get(field) != wanted:
            raise SpecError(
                f"JOB_BUNDLE: {named} was made for another {field} ({there.asked.get(field, 'none')}); this spec says {wanted}. "
                "Make it again with job prefetch"
            )
    fields = [*asked_for(spec), *(["images"] if "images" in there.places else [])]
    used = {field: _place_of(field, there.places.get(field, ""), folder, named) for field in fields}
    names = _whole(used.values(), there, folder, named)
    if hashed:
        _refuse_damaged(names, there, folder, named)
    place.mkdir(parents=True)
    for field, inner in used.items():
        (place / FOLDERS.get(field, field)).symlink_to(inner)
    log.info("from the bundle %s: %s", named, ", ".join(sorted(there.asked)))


def _read_contents(folder: Path, named: str) -> Contents:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = {name: Digest(int(facts["size"]), str(facts["sha256"])) for name, facts in manifest["files"].items()}
        return Contents(dict(manifest["asked"]), {key: str(value) for key, value in manifest["places"].items()}, files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise SpecError(
            f"JOB_BUNDLE: {named} has no {MANIFEST}, so it is not a complete bundle; make it again with job prefetch"
        ) from None


def _place_of(field: str, inner: str, folder: Path, named: str) -> Path:
    """Locate what a field names in the bundle `folder`. Raises SpecError for a path that is not in it, or is behind a link."""
    place = folder / inner
    with suppress(OSError, ValueError, RuntimeError):
        if place.exists() and place.resolve() == place and folder in place.parents:
            return place
    raise SpecError(f"JOB_BUNDLE: {named}: this bundle has nothing for {field}; make it again with job prefetch")


def _whole(places: Iterable[Path], there: Contents, folder: Path, named: str) -> list[str]:
    """List the names of all files at these places. Raises SpecError for a file that is missing, has the wrong size, is a link,
    or is not named in `BUNDLE.json`: one of a patient who was withdrawn before the bundle was renewed, say."""
    tops = {place if place.is_dir() else place.parent for place in places}
    found = dict[str, int]()
    for top in tops:
        for here, inner, names in os.walk(top):
            for path in (Path(here) / name for name in (*inner, *names)):
                name = path.relative_to(folder).as_posix()
                if path.is_symlink():
                    raise SpecError(
                        f"JOB_BUNDLE: {named}: {name} is a link; copy the bundle again, with files in place of links"
                    )
                if path.is_file():
                    found[name] = path.stat().st_size
    starts = tuple(f"{top.relative_to(folder).as_posix()}/" for top in tops)
    wanted = [name for name in there.files if name.startswith(starts)]
    for name in wanted:
        if found.get(name) != there.files[name].size:
            raise SpecError(f"JOB_BUNDLE: {named}: {name} is missing or cut short; copy the bundle again")
    for name in sorted(set(found) - set(wanted)):
        if not any(part.startswith(".") for part in name.split("/")):  # nothing reads hidden files
            raise SpecError(f"JOB_BUNDLE: {named}: {name} is not listed in {MANIFEST}; remove it from the bundle")
    return wanted


def _refuse_damaged(names: Iterable[str], there: Contents, folder: Path, named: str) -> None:
    """Verify the SHA-256 of all files, a few at a time. Base files are not read again later for their digest; see
    `known_sha256`."""
    began = time.monotonic()
    digests = together({name: lambda name=name: known_sha256(folder / name) for name in names})  # type: ignore[misc]
    for name, digest in digests.items():
        if digest != there.files[name].sha256:
            raise SpecError(f"JOB_BUNDLE: {named}: {name} is damaged (its SHA-256 differs); copy the bundle again")
    size = bytes_text(sum(there.files[name].size for name in digests))
    log.info("verified the SHA-256 of %d files (%s) in %.1f s", len(digests), size, time.monotonic() - began)


def _clear(place: Path) -> None:
    """Remove the links left by an earlier bundle. Raises SpecError for anything else in the folder."""
    if not place.is_dir():
        return
    for link in place.iterdir():
        if not link.is_symlink():
            raise SpecError(
                f"JOB_SCRATCH: {link} is not a link to a bundle; move it away, or point JOB_SCRATCH elsewhere"
            )
        link.unlink()
    place.rmdir()


def prefetch(spec: JobSpec, target: str, scratch: Path) -> None:
    """Gather everything that the spec names into `target`, a folder or `s3://` prefix, and check every row on the way.

    Renews an existing bundle. Raises SpecError if the target is not empty and holds no bundle, or overlaps what the spec names;
    DataError for bad data; and whatever fetching and checking raise.
    """
    from job.data.prepare import prepare
    from job.model.base_model import base_facts, fetch_adapter, fetch_base
    from job.model.init_adapter import read_init_adapter

    apart("FOLDER", target, read_by(spec, Environment()))
    outside("JOB_SCRATCH", str(scratch.absolute()), read_by(spec, Environment()))
    remote = urlsplit(target).scheme == "s3"
    store = OwnedStore(open_store(target), BUNDLES)
    if store.read_record() is None and (there := next(iter(store.list()), None)) is not None:
        raise SpecError(f"FOLDER: {target} is not empty ({there.key}) and holds no bundle; choose an empty one")
    made = OwnedStore(open_store(str(scratch / MADE)), BUNDLES) if remote else store
    assert isinstance(made.inner, LocalStore)
    folder = made.inner.root
    for each in (store, made):
        each.delete([MANIFEST])  # a half-renewed bundle is not a bundle
    made.delete(made.read_record() or ())
    places = {"model.name_or_path": "model"}
    base_facts(base := fetch_base(spec.model, scratch))
    gather(base, made, folder, "model")
    if start := spec.lora.init_adapter:
        places["lora.init_adapter"] = "adapter"
        read_init_adapter(start, adapter := fetch_adapter(start, scratch))
        gather(adapter, made, folder, "adapter")
    for metric, path in spec.evaluation.extra_metrics.items():
        field = f"evaluation.extra_metrics.{metric}"
        places[field] = f"metrics/{metric}"
        gather(local_path(path, scratch, field, SpecError), made, folder, places[field])
    data = prepare(spec, scratch)
    log.info("%d rows (%s), %d set aside", data.facts.rows, data.facts.source, len(data.quarantined))
    if count := data.facts.absolute:
        raise DataError(
            f"dataset: {count} rows name images by absolute paths, which do not exist where the bundle is used; "
            "write paths relative to the folder of their table"
        )
    images = set[str]()
    for field, source in data.sources.items():
        places[field], fetched = gather_rows(spec, source, scratch, made, folder)
        images |= fetched
    if images:
        places["images"] = "images"
        _link_files(scratch / "fetched" / "images", sorted(images), made, folder, "images")
    files = {name: _facts(folder / name) for name in sorted(made.read_record() or ())}
    manifest = json.dumps({"asked": asked_for(spec), "places": places, "files": files}, indent=1)
    if remote:
        upload_files(store, folder, {name: name for name in files})
        store.delete((store.read_record() or frozenset()) - set(files))
        shutil.rmtree(folder)
    store.write(MANIFEST, manifest.encode())
    log.info("bundle %s: %d files, %s", target, len(files), bytes_text(sum(each["size"] for each in files.values())))


def _rows_named(spec: JobSpec, field: str) -> tuple[str, str]:
    """Path and split of the rows that `field` names."""
    dataset = spec.dataset
    split = dataset.eval_split if field == "dataset.eval_split" else dataset.split
    return str(dataset.eval_path if field == "dataset.eval_path" else dataset.path), str(split)


def gather_rows(spec: JobSpec, source: Source, scratch: Path, made: OwnedStore, folder: Path) -> tuple[str, set[str]]:
    """Put the rows of a source below `folder`, which `made` records. Returns their path relative to it, and which images on
    scratch these rows name: scratch also holds those of other jobs.

    A folder is taken whole, a table with the files that its rows name, and hub rows as parquet with their images.
    """
    from datasets.table import embed_table_storage

    from job.data.hub import from_hub

    dataset, field, (path, split) = spec.dataset, source.field, _rows_named(spec, source.field)
    into, here, fetched = FOLDERS[field], local_path(path, scratch, field), scratch / "fetched" / "images"
    folders = [fetched] if fetched.is_dir() else []
    if here.is_dir():
        gather(here, made, folder, into)
        return into, set().union(*source.named_files(dataset, *folders) if folders else ())
    if here.is_file():
        base = source.files.base if isinstance(source.files.base, Path) else here.parent
        table = here.relative_to(base).as_posix()
        named, *behind_urls = source.named_files(dataset, base, *folders)
        _link_files(base, sorted(named | {table}), made, folder, into)
        return f"{into}/{table}", set().union(*behind_urls)
    rows = from_hub(dataset, path, split, scratch / "cache" / "datasets", field).with_format("arrow")
    file = f"{into}/{split}-00000.parquet"
    made.claim([file])
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    rows.map(embed_table_storage, batched=True, batch_size=100).to_parquet(folder / file, batch_size=100)
    return into, set().union(*source.named_files(dataset, *folders) if folders else ())


def gather(source: Path, made: OwnedStore, folder: Path, into: str) -> None:
    """Put the files of a folder, except hidden ones, below `folder/into`: linked where possible, else copied."""
    names = []
    for there, inner, files in os.walk(source, followlinks=True):
        inner[:] = [name for name in inner if name[0] != "."]
        names += [(Path(there) / name).relative_to(source).as_posix() for name in files if name[0] != "."]
    _link_files(source, sorted(names), made, folder, into)


def _link_files(source: Path, names: list[str], made: OwnedStore, folder: Path, into: str) -> None:
    made.claim(f"{into}/{name}" for name in names)
    for name in names:
        (folder / into / name).parent.mkdir(parents=True, exist_ok=True)
        _link(source / name, folder / into / name)


def _link(file: str | Path, copy: str | Path) -> None:
    try:
        os.link(Path(file).resolve(), copy)
    except OSError:
        with disk(Path(copy)):
            shutil.copyfile(file, copy)


def _facts(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": known_sha256(file)}
