"""Collects the facts for a plan: one listing of the output, one look at the data, the headers of the weights."""

from __future__ import annotations

import importlib.util
import math
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.checkpoint import steps
from job.config.environment import Environment
from job.config.schema import JobSpec
from job.data.hub import ask_hub, not_there
from job.data.webdataset import shards_to_stream
from job.errors import NoHub, NotAllowed, SpecError, Unavailable
from job.evaluate.extra import model_folders
from job.export.stage import check_export
from job.layout import CHECKPOINTS, RESULT_KEY, STATUS_KEY
from job.model.base_model import BaseFacts, base_facts, fetch_adapter, fetch_base
from job.model.families import family_of
from job.model.init_adapter import fitted, other_base, read_init_adapter, rescaled, suited
from job.model.load import choose_backend
from job.output.ownership import is_published, outdated
from job.output.stored import read_json
from job.planning.facts import Device, Facts
from job.planning.optional_packages import check_packages, uncompiled
from job.planning.remote_headers import GLIMPSES, glimpse, glimpse_adapter
from job.planning.sharding import backend_for
from job.runtime.hub import is_hub_id
from job.runtime.limits import Limits, cores, disk, host_memory
from job.runtime.peaks import used_bytes
from job.runtime.scratch import disk_of, job_folder
from job.runtime.staging import BUNDLE, exists, is_there, local_path
from job.store import OwnedStore, Store, open_store
from job.store.local import LocalStore

if TYPE_CHECKING:
    import torch

    from job.data import Data, Row


@dataclass(frozen=True)
class Survey:
    """Facts for the plan, and what was opened to collect them. Fields are None if `facts.notes` says why."""

    facts: Facts
    data: Data | None
    base: Path | None
    adapter: Path | None


QUICK_ROWS = 1000
"""Rows of a large data set that a quick look examines."""


def survey(
    spec: JobSpec,
    store: Store,
    scratch: Path,
    environment: Environment,
    *,
    fetch: bool,
    all_data: bool = False,
    world: int = 1,
    on_this_node: int = 1,
) -> Survey:
    """Collects all facts. With `fetch`, remote models and data are brought to scratch. Without it, only the headers of a remote
    model are fetched, remote data stay unknown, and only `QUICK_ROWS` rows of local data are examined; `all_data` fetches and
    examines all rows.

    Raises SpecError and DataError for faults of model and data.
    """
    notes = [slow] if (slow := uncompiled()) else []
    has_torch = importlib.util.find_spec("torch") is not None
    device, backend = find_device(has_torch, environment.gpu_memory_gb), None
    if not fetch and device.kind == "cpu" and math.isfinite(environment.gpu_memory_gb):
        device = Device("cuda", "a GPU of another machine", int(1e9 * environment.gpu_memory_gb))
        backend = "unsloth" if spec.model.by_unsloth else "transformers"
        notes.append("this machine has no GPU: the plan is for one with as much memory as JOB_GPU_MEMORY_GB says")
    else:
        check_packages(spec, device.kind == "cuda")
    if backend is None and (fetch or device.kind == "cuda" or spec.model.backend != "unsloth"):
        backend = choose_backend(spec.model, device.kind == "cuda")
    if spec.evaluation.cache:
        open_store(spec.evaluation.cache)
    data = example = None
    bundled = (scratch / BUNDLE).exists()
    base = _base(spec, scratch, notes, here=fetch or bundled)
    if spec.model.revision is None and not (bundled or is_local(name := spec.model.name_or_path) or "://" in name):
        notes.append("model.revision is not set: another attempt may find other weights on the hub; pin a commit")
    extra = spec.evaluation.extra_metrics
    if extra and (fetch or bundled or all(map(is_local, extra.values()))):
        model_folders(extra, scratch)
    known = base_facts(base) if base else None
    if backend and known:
        backend = backend_for(spec, backend, known, device, world)
    adapter = _adapter(spec, scratch, known, notes, here=fetch or bundled)
    if importlib.util.find_spec("datasets") is None:
        notes.append("the data was not validated: install the train extra to do so")
    elif fetch or bundled or all_data or is_local(spec.dataset.path):
        most = None if fetch or all_data else QUICK_ROWS
        data, example = _rows(spec, scratch, base if has_torch else None, most, notes)
    else:
        rows = elsewhere(spec.dataset.path, "dataset.path")
        notes.append(f"{rows}: rows are counted after stage in, or by check --data")
    facts = Facts(
        data=data.facts if data else None,
        base=known,
        device=device,
        backend=backend,
        world=world,
        on_this_node=on_this_node,
        left=left_by_attempts(scratch if fetch else job_folder(scratch, spec, make=False)),
        to_fetch=known.bytes + known.rest if known and base and GLIMPSES in base.parts else 0,
        example=example,
        notes=tuple(notes),
        checkpoint_seconds=(read_json(store, STATUS_KEY) or {}).get("checkpoint_seconds"),
        environment=environment,
    )
    return Survey(look_at_output(facts, spec, store, scratch), data, base, adapter)


def look_at_output(facts: Facts, spec: JobSpec, store: Store, scratch: Path) -> Facts:
    """Adds what the output now holds that this spec will use."""
    stale = {*outdated(store, spec), *(() if is_published(store, spec) else (RESULT_KEY,))}
    entries = [entry for entry in store.list() if entry.key not in stale]
    output = store.inner if isinstance(store, OwnedStore) else store
    written = Counter[str]()
    for entry in entries:
        written[entry.key.partition("/")[0]] += entry.size
    return replace(
        facts,
        keys=frozenset(entry.key for entry in entries if not entry.key.startswith(f"{CHECKPOINTS}/")),
        checkpoints=tuple(steps(store)),
        limits=Limits(
            host_memory(),
            disk_of(scratch, facts.environment),
            disk(output.root) if isinstance(output, LocalStore) else None,
        ),
        written=written,
    )


def left_by_attempts(scratch: Path) -> dict[str, int]:
    """Returns the bytes that a later attempt reuses or removes, by folder: see `Facts.left`."""
    folders = [scratch / "trainer", *(scratch / "export").glob("*")]
    return {str(folder.relative_to(scratch)): used_bytes(folder) for folder in folders if folder.is_dir()}


def _base(spec: JobSpec, scratch: Path, notes: list[str], *, here: bool) -> Path | None:
    """Returns the base's folder, or one made from its headers; None if it cannot be examined from here."""
    if here or is_local(spec.model.name_or_path):
        base = fetch_base(spec.model, scratch)
    else:
        try:
            base = glimpse(spec.model, scratch)
        except (NoHub, NotAllowed, Unavailable) as error:
            refused = "run refuses this here: " if isinstance(error, NoHub) else ""
            notes.append(f"{refused}{error}; sizes are known after stage in")
            return None
    check_export(spec.export, base_facts(base))
    return base


def _rows(
    spec: JobSpec, scratch: Path, base: Path | None, most: int | None, notes: list[str]
) -> tuple[Data, str | None]:
    """Returns the rows, `most` of them examined, and one as the model sees it. Without `base`, tokens are not counted."""
    from job.data.images import Bounds
    from job.data.prepare import prepare

    if base is None:
        return prepare(spec, scratch, None, most), None
    from job.model.generation import remarks
    from job.model.token_length import TokenCounter
    from job.model.transformers_backend import load_processor, refuse_unless_built

    refuse_unless_built(spec.model, base)
    measure = TokenCounter(load_processor(spec.model, base), spec.training.train_on_responses_only)
    notes += remarks(measure.processor, base)
    bounds = Bounds(**measure.room(spec.training.max_length * 3 // 4))
    data = prepare(spec, scratch, measure, most, bounds)
    return data, rendered(spec, measure.processor, data)


def _adapter(spec: JobSpec, scratch: Path, base: BaseFacts | None, notes: list[str], *, here: bool) -> Path | None:
    """Returns the folder of the initial adapter, once it is known to fit; None if there is none, or none to train with here."""
    start = spec.lora.init_adapter
    if start is None:
        return None
    if away := start.startswith("s3://") and not here:
        try:
            folder = glimpse_adapter(start, scratch)
        except (NotAllowed, Unavailable) as reason:
            notes.append(f"lora.init_adapter: {start} cannot be read from here ({reason})")
            return None
    else:
        folder = fetch_adapter(start, scratch)
    adapter = read_init_adapter(start, folder)
    if base is not None and family_of(base.model_type).whole:
        fitted(adapter, spec.lora, base.linears)
    else:  # the headers do not contain the modules' names
        suited(adapter, spec.lora)
    notes += [note for note in (rescaled(adapter, spec.lora), other_base(adapter, spec.model.name_or_path)) if note]
    return None if away else folder


@contextmanager
def arriving(spec: JobSpec, scratch: Path) -> Iterator[None]:
    """Fetches model and data while the block runs (it imports the libraries). Their errors are raised after it."""
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
        thread.join(0.5)  # short waits, so that a notice is handled between them
    if failed:
        raise failed[0]


def elsewhere(name: str, field: str) -> str:
    """Describes data that is not here. Raises SpecError if there is nothing under an `s3://` prefix, or nothing of this name on
    the Hub."""
    try:
        if not name.startswith("s3://"):
            if not is_hub_id(name):
                raise not_there(name, field)
            ask_hub(name, field)
            return f"{name} is on the hub and is not fetched"
        if is_there(name):
            return f"{name} is not fetched"
    except NoHub as reason:
        return f"run refuses this here: {reason}"
    except (NotAllowed, Unavailable) as reason:
        return f"{name} cannot be read from here ({reason})"
    raise SpecError(f"{field}: there is nothing under {name}")


def is_local(path: str) -> bool:
    return path.startswith("file://") or (not path.startswith("s3://") and (exists(Path(path)) or path[:1] in "./~"))


def find_device(has_torch: bool, granted_gb: float) -> Device:
    """Returns the GPU that will be used, with as much memory as `JOB_GPU_MEMORY_GB` grants; else the CPU, with the host memory
    that the container's limits leave."""
    if has_torch:
        import torch

        if torch.cuda.is_available():
            facts = torch.cuda.get_device_properties(0)
            return Device("cuda", str(facts.name), int(min(facts.total_memory, 1e9 * granted_gb)))
    return Device("cpu", f"CPU, {cores()} cores", host_memory().limit)


def keep_within(device: Device) -> None:
    """Limits tensors to the granted share of the GPU, which others use too."""
    import torch

    share = device.memory / torch.cuda.get_device_properties(0).total_memory
    if share < 1:
        torch.cuda.set_per_process_memory_fraction(share)


def torch_device() -> torch.device:
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def rendered(spec: JobSpec, processor: Any, data: Data) -> str:
    """Returns the first training row as the model sees it, with learned text between ⟦ and ⟧; without text if privacy says so."""
    text, tokens, learned = as_seen(spec, processor, data.train[0])
    if not spec.privacy.report_images:
        return f"{tokens} tokens, {learned} of them learned (text not shown: privacy.report_images is false)"
    return f"{text}\n{tokens} tokens, {learned} of them learned"


def as_seen(spec: JobSpec, processor: Any, row: Row) -> tuple[str, int, int]:
    """Returns a row's text as the model sees it, with learned text between ⟦ and ⟧, the number of its tokens, and of those that
    are learned. Repeated special tokens, such as those of images, are written once with their number."""
    from job.model.collator import IGNORE, Collator

    truncate = spec.dataset.over_length == "truncate"
    collator = Collator(processor, spec.training.max_length, spec.training.train_on_responses_only, truncate)
    batch = collator([row])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    learned = [label != IGNORE for label in labels]
    special = {*processor.tokenizer.all_special_ids, *processor.tokenizer.added_tokens_decoder}
    again = [near == token in special for near, token in zip([None, *ids], ids, strict=False)] + [False]
    image = [token if again[n] or again[n + 1] else None for n, token in enumerate(ids)]  # adjacent repeats
    pieces = list[str]()
    for (is_learned, repeated), run in groupby(range(len(ids)), key=lambda n: (learned[n], image[n])):
        places = list(run)
        text = processor.tokenizer.decode(ids[places[0] : places[-1] + 1] if repeated is None else [repeated])
        text += f"×{len(places)}" if repeated is not None else ""
        pieces.append(f"⟦{text}⟧" if is_learned else text)
    return "".join(pieces), len(ids), sum(learned)
