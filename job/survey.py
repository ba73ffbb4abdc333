"""The facts that a plan is made from: one listing of the output, one look at the data, the headers of the weights."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.checkpoint import steps
from job.data.shards import shards_to_stream
from job.errors import DataError, JobError, NotAllowed, SpecError, Unavailable
from job.evaluate.extra import model_folders
from job.export import check_export
from job.facts import Device, Facts
from job.model import choose_backend
from job.model.fetch import base_facts, fetch_adapter, fetch_base
from job.model.glimpse import GLIMPSES, glimpse
from job.output import read_json
from job.packages import check_packages, uncompiled
from job.peaks import used_bytes
from job.planning.limits import Limits, cores, disk, host_memory, scratch_disk
from job.preemption import grace_seconds, positive
from job.record import STATUS_KEY
from job.scratch import job_folder, scratch_folder
from job.spec import JobSpec
from job.stage_in import BUNDLE, is_there, local_path
from job.store import Store, open_store
from job.store.local import LocalStore

if TYPE_CHECKING:
    import torch

    from job.data import Data


@dataclass(frozen=True)
class Survey:
    """Facts for the plan, and what was opened to learn them. None where `facts.notes` says why."""

    facts: Facts
    data: Data | None
    base: Path | None
    adapter: Path | None


DEFAULT_GB = 1e6
"""Of GPU memory: all that there is."""
QUICK_ROWS = 1000
"""Rows that a quick look takes of a large dataset."""


def survey(
    spec: JobSpec,
    store: Store,
    scratch: Path,
    *,
    fetch: bool,
    all_data: bool = False,
    world: int = 1,
    on_this_node: int = 1,
) -> Survey:
    """Look at everything. With `fetch`, remote models and data are brought to scratch; without, of a remote model only the
    headers are, remote data stay unknown, and of data that is here only `QUICK_ROWS` rows are looked at, unless `all_data`
    wants them fetched and looked at all.

    Raises SpecError and DataError for what is wrong with model and data.
    """
    notes = [slow] if (slow := uncompiled()) else []
    has_torch = importlib.util.find_spec("torch") is not None
    device = find_device(has_torch)
    check_packages(spec, device.kind == "cuda")
    backend = None
    if fetch or device.kind == "cuda" or spec.model.backend != "unsloth":
        backend = choose_backend(spec.model, device.kind == "cuda")
    if spec.evaluation.cache:
        open_store(spec.evaluation.cache)
    data = example = None
    bundled = (scratch / BUNDLE).exists()
    base = _base(spec, scratch, notes, here=fetch or bundled)
    if spec.model.revision is None and not (bundled or is_local(name := spec.model.name_or_path) or "://" in name):
        notes.append("model.revision is not set: another attempt may find other weights on the hub; pin a commit")
    extra = spec.evaluation.extra_metrics.values()
    if extra and (fetch or bundled or all(map(is_local, extra))):
        model_folders(spec, scratch)
    adapter = _adapter(spec, scratch, notes, here=fetch or bundled)
    if importlib.util.find_spec("datasets") is None:
        notes.append("the data was not looked at: install the train extra to do so")
    elif fetch or bundled or all_data or is_local(spec.dataset.path):
        most = None if fetch or all_data else QUICK_ROWS
        data, example = _rows(spec, scratch, base if has_torch else None, most)
    else:
        rows = elsewhere(spec.dataset.path, "dataset.path", DataError)
        notes.append(f"{rows}: rows are counted after stage in, or by check --data")
    entries, known = list(store.list()), base_facts(base) if base else None
    facts = Facts(
        keys=frozenset(entry.key for entry in entries if not entry.key.startswith("checkpoints/")),
        checkpoints=tuple(steps(store)),
        data=data.facts if data else None,
        base=known,
        device=device,
        backend=backend,
        world=world,
        on_this_node=on_this_node,
        limits=find_limits(store, scratch),
        written=sizes((entry.key.partition("/")[0], entry.size) for entry in entries),
        left=left_by_attempts(scratch if fetch else job_folder(scratch, spec, make=False)),
        to_fetch=known.bytes + known.rest if known and base and GLIMPSES in base.parts else 0,
        example=example,
        notes=tuple(notes),
        checkpoint_seconds=(read_json(store, STATUS_KEY) or {}).get("checkpoint_seconds"),
        grace_seconds=grace_seconds(os.environ),
    )
    return Survey(facts, data, base, adapter)


def find_limits(store: Store, scratch: Path) -> Limits:
    """What this process may use. Of the output only where it is a folder. Raises SpecError for a wrong `JOB_SCRATCH_GB`."""
    whole = scratch_folder(os.environ)
    scratch = whole if scratch.is_relative_to(whole) else scratch
    return Limits(
        host_memory(),
        scratch_disk(scratch, os.environ),
        disk(store.root) if isinstance(store, LocalStore) else None,
    )


def left_by_attempts(scratch: Path) -> dict[str, int]:
    """Bytes of what a later attempt uses again or removes, by folder: see `Facts.left`."""
    folders = [scratch / "trainer", *(scratch / "export").glob("*")]
    return {str(folder.relative_to(scratch)): used_bytes(folder) for folder in folders if folder.is_dir()}


def sizes(counted: Iterable[tuple[str, int]]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for name, size in counted:
        found[name] += size
    return dict(found)


def _base(spec: JobSpec, scratch: Path, notes: list[str], *, here: bool) -> Path | None:
    """The base's folder, or what its headers make of one; None when it cannot be looked at from here."""
    if here or is_local(spec.model.name_or_path):
        base = fetch_base(spec.model, scratch)
    else:
        try:
            base = glimpse(spec.model, scratch)
        except (NotAllowed, Unavailable) as error:
            notes.append(f"{error}; sizes are known after stage in")
            return None
    check_export(spec.export, base_facts(base))
    return base


def _rows(spec: JobSpec, scratch: Path, base: Path | None, most: int | None) -> tuple[Data, str | None]:
    """The rows, `most` of them looked at, and one as the model sees it; of `base` None, nothing is counted in tokens."""
    from job.data.images import Bounds
    from job.data.prepare import prepare

    if base is None:
        return prepare(spec, scratch, None, most), None
    from job.model.lengths import Ruler
    from job.model.transformers_backend import load_processor

    measure = Ruler(load_processor(spec.model, base))
    bounds = Bounds(**measure.room(spec.training.max_length * 3 // 4))
    data = prepare(spec, scratch, measure, most, bounds)
    return data, rendered(spec, measure.processor, data)


def _adapter(spec: JobSpec, scratch: Path, notes: list[str], *, here: bool) -> Path | None:
    start = spec.lora.init_adapter
    if start and start.startswith("s3://") and not here:
        notes.append(elsewhere(start, "lora.init_adapter", SpecError))
        return None
    return fetch_adapter(start, scratch) if start else None


@contextmanager
def arriving(spec: JobSpec, scratch: Path) -> Iterator[None]:
    """Model and data come from afar while the block runs (it imports the libraries). What they raise is raised behind it."""
    failed = list[BaseException]()

    def fetch() -> None:
        try:
            fetch_base(spec.model, scratch)
            if spec.dataset.path.startswith("s3://") and not shards_to_stream(spec.dataset, spec.dataset.path):
                local_path(spec.dataset.path, scratch, "dataset.path")
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=fetch, name="stage in", daemon=True)
    thread.start()
    yield
    while thread.is_alive():
        thread.join(0.5)  # in short waits: a notice is heard between them
    if failed:
        raise failed[0]


def elsewhere(name: str, field: str, error: type[JobError]) -> str:
    """What is to be said of what is not here. Raises `error` when there is nothing under an `s3://` prefix."""
    if not name.startswith("s3://"):
        return f"no {name} is here, so it is taken for a hub id"
    try:
        if is_there(name):
            return f"{name} is not fetched"
    except (NotAllowed, Unavailable) as reason:
        return f"{name} cannot be looked at from here ({reason})"
    raise error(f"{field}: there is nothing under {name}")


def is_local(path: str) -> bool:
    return path.startswith("file://") or (not path.startswith("s3://") and (Path(path).exists() or path[:1] in "./~"))


def find_device(has_torch: bool) -> Device:
    """The GPU that will be used, with as much of its memory as `JOB_GPU_MEMORY_GB` grants, else the CPU with the host
    memory that the container's limits leave."""
    granted = 1e9 * positive(os.environ, "JOB_GPU_MEMORY_GB", DEFAULT_GB, "gigabytes")
    if has_torch:
        import torch

        if torch.cuda.is_available():
            facts = torch.cuda.get_device_properties(0)
            return Device("cuda", str(facts.name), int(min(facts.total_memory, granted)))
    return Device("cpu", f"CPU, {cores()} cores", host_memory().limit)


def keep_within(device: Device) -> None:
    """Let no tensor take more of the GPU than is granted: others share it."""
    import torch

    share = device.memory / torch.cuda.get_device_properties(0).total_memory
    if share < 1:
        torch.cuda.set_per_process_memory_fraction(share)


def torch_device() -> torch.device:
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def rendered(spec: JobSpec, processor: Any, data: Data) -> str:
    """The first training row as the model sees it, what is learned between ⟦ and ⟧; without its text when privacy says so."""
    from job.model.collator import IGNORE, Collator

    truncate = spec.dataset.over_length == "truncate"
    collator = Collator(processor, spec.training.max_length, spec.training.train_on_responses_only, truncate)
    batch = collator([data.train[0]])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    learned = [label != IGNORE for label in labels]
    if not spec.privacy.report_images:
        return f"{len(ids)} tokens, {sum(learned)} of them learned (text not shown: privacy.report_images is false)"
    again = [near == token for near, token in zip([None, *ids], ids, strict=False)] + [False]
    image = [token if again[n] or again[n + 1] else None for n, token in enumerate(ids)]  # tokens that stand in a run
    pieces = list[str]()
    for (is_learned, repeated), run in groupby(range(len(ids)), key=lambda n: (learned[n], image[n])):
        places = list(run)
        text = processor.tokenizer.decode(ids[places[0] : places[-1] + 1] if repeated is None else [repeated])
        text += f"×{len(places)}" if repeated is not None else ""
        pieces.append(f"⟦{text}⟧" if is_learned else text)
    return f"{''.join(pieces)}\n{len(ids)} tokens, {sum(learned)} of them learned"
