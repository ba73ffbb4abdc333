"""Everything that a spec names, in one folder or `s3://` prefix, so that the same spec runs where there is no network.

    bundle/
      model/            the base: weights in 16 bits, configuration, processor
      adapter/          lora.init_adapter, where the spec has one
      metrics/          the models of evaluation.extra_metrics
      dataset/          the rows to train on, and evaluation/ those held out by the user
      images/           what is behind URLs in rows
      BUNDLE.json       written last: what was asked for, and the size and SHA-256 of every file

A bundle is used by putting its folders where `stage_in.local_path` looks first. The spec and its digest stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from job.errors import SpecError
from job.record import bytes_text
from job.spec import JobSpec
from job.stage_in import BUNDLE, FOLDERS, local_path
from job.store import files_of, open_store, upload_files
from job.store.local import disk

log = logging.getLogger("job")

MANIFEST = "BUNDLE.json"


def asked_for(spec: JobSpec) -> dict[str, str]:
    """By field, what a bundle must hold for this spec, in words."""
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


def bundle_named(environment: MutableMapping[str, str]) -> str:
    """What `JOB_BUNDLE` says; with it, libraries are told to ask nothing of the network."""
    named = environment.get("JOB_BUNDLE", "").strip()
    if named:
        environment.update(dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1"))
    return named


def use_bundle(spec: JobSpec, environment: MutableMapping[str, str], scratch: Path) -> None:
    """Take from `JOB_BUNDLE` what the spec names, and nothing from the network; without the variable, nothing changes.

    Raises SpecError when the bundle was made for another spec or is not whole.
    """
    place = scratch / BUNDLE
    shutil.rmtree(place, ignore_errors=True)
    named = bundle_named(environment)
    if not named:
        return
    folder = local_path(named, scratch, "JOB_BUNDLE", SpecError)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        asked, files = dict(manifest["asked"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise SpecError(
            f"JOB_BUNDLE: {named} has no {MANIFEST}, so it is no whole bundle; make it with job prefetch"
        ) from None
    for field, wanted in asked_for(spec).items():
        if asked.get(field) != wanted:
            raise SpecError(
                f"JOB_BUNDLE: {named} was made for another {field} ({asked.get(field, 'none')}); this spec says {wanted}. "
                "Make it again with job prefetch"
            )
    for name, facts in files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != facts["size"]:
            raise SpecError(f"JOB_BUNDLE: {named}: {name} is missing or cut short; copy the bundle again")
    place.mkdir(parents=True)
    for field, inside in manifest["places"].items():
        (place / FOLDERS.get(field, field)).symlink_to((folder / inside).resolve())
    log.info("from the bundle %s: %s", named, ", ".join(sorted(asked)))


def prefetch(spec: JobSpec, target: str, scratch: Path) -> None:
    """Gather all that the spec names into `target`, a folder or an `s3://` prefix. Looks at every row on the way.

    Raises what fetching and looking raise; DataError for bad data.
    """
    from job.data.prepare import prepare
    from job.model.fetch import fetch_adapter, fetch_base

    remote = "://" in target and not target.startswith("file://")
    folder = scratch / "bundle-made" if remote else Path(target.removeprefix("file://"))
    (folder / MANIFEST).unlink(missing_ok=True)  # what is half renewed is no bundle
    folder.mkdir(parents=True, exist_ok=True)
    places = {"model.name_or_path": "model"}
    gather(fetch_base(spec.model, scratch), folder / "model")
    if spec.lora.init_adapter:
        places["lora.init_adapter"] = "adapter"
        gather(fetch_adapter(spec.lora.init_adapter, scratch), folder / "adapter")
    for metric, path in spec.evaluation.extra_metrics.items():
        field = f"evaluation.extra_metrics.{metric}"
        places[field] = f"metrics/{metric}"
        gather(local_path(path, scratch, field, SpecError), folder / places[field])
    data = prepare(spec, scratch)
    log.info("%d rows (%s), %d set aside", data.facts["rows"], data.facts["source"], len(data.quarantined))
    for field in asked_for(spec):
        if field.startswith("dataset."):
            places[field] = gather_rows(spec, field, scratch, folder)
    if (scratch / "fetched" / "images").is_dir():
        places["images"] = "images"
        gather(scratch / "fetched" / "images", folder / "images")
    files = {name: _facts(folder / name) for name in files_of(folder) if name != MANIFEST}
    manifest = {"asked": asked_for(spec), "places": places, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    if remote:
        store = open_store(target)
        upload_files(store, folder, {name: name for name in files})
        store.upload(folder / MANIFEST, MANIFEST)
        shutil.rmtree(folder)
    log.info("bundle %s: %d files, %s", target, len(files), bytes_text(sum(each["size"] for each in files.values())))


def gather_rows(spec: JobSpec, field: str, scratch: Path, folder: Path) -> str:
    """Put the rows that `field` names below `folder`; returns where, relative to it.

    A folder goes whole; a table with the files that its rows name; rows of the hub as parquet, images and all.
    """
    from datasets.table import embed_table_storage

    from job.data.sources import open_source
    from job.data.tables import from_hub

    dataset = spec.dataset
    split = dataset.eval_split if field == "dataset.eval_split" else dataset.split
    path = dataset.eval_path if field == "dataset.eval_path" else dataset.path
    into, here = folder / FOLDERS[field], local_path(str(path), scratch, field)
    if here.is_dir():
        gather(here, into)
        return into.name
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    if here.is_file():
        _link(here, into / here.name)
        source = open_source(dataset, str(path), str(split), scratch, field)
        for name in source.named_files(dataset, here.parent) - {here.name}:
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            _link(here.parent / name, into / name)
        return f"{into.name}/{here.name}"
    rows = from_hub(dataset, str(path), str(split), scratch / "cache" / "datasets", field).with_format("arrow")
    rows.map(embed_table_storage, batched=True, batch_size=100).to_parquet(
        into / f"{split}-00000.parquet", batch_size=100
    )
    return into.name


def gather(folder: Path, into: Path) -> None:
    """The files of a folder, linked where that is possible, else copied. What else is in `into` goes."""
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(folder, into, copy_function=_link, ignore=shutil.ignore_patterns(".*"))


def _link(file: str | Path, copy: str | Path) -> None:
    try:
        os.link(Path(file).resolve(), copy)
    except OSError:
        with disk(Path(copy)):
            shutil.copyfile(file, copy)


def _facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
