"""What a base says to held-out rows is the same for every run that asks it: kept under a digest, and not asked for twice.

It is kept on scratch, for jobs on the same node, and at `evaluation.cache`, for all that are given it. Nothing of the data
is kept but the generated texts: reference, labels and groups are each run's own.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

from job.attempt import Attempt
from job.checkpoint.commit import sha256_of
from job.errors import JobError, Preempted
from job.model import Loaded
from job.record import versions
from job.spec import JobSpec
from job.store import Missing, Store, files_of, open_store

log = logging.getLogger("job")

OWN = ("id", "reference", "labels", "groups", "unit")
"""The fields of a row that the data gives."""
MADE = ("generated", "tokens", "loss", "answer_tokens")
"""The fields of a row that the model makes."""
PLACES = ("path", "eval_path")
"""Fields of the dataset section that say where rows lie, and nothing about them."""


@dataclass(frozen=True)
class Held:
    """A held-out row before any model sees it: its own facts, and a digest of its texts and pixels."""

    own: dict[str, Any]
    digest: str


_last: list[tuple[Any, list[Held]]] = []
"""The rows that were read last, and what `held` found."""


def held(rows: Any) -> list[Held]:
    """All rows, in their order. They are read once a process, since every picture is decoded for its digest."""
    if not any(known is rows for known, _ in _last):
        found = [Held({name: row[name] for name in OWN}, _digest(row["messages"], row["images"])) for row in rows]
        _last[:] = [(rows, found)]
    return _last[0][1]


def rows_digest(rows: Any) -> str:
    """SHA-256 over texts and pixels of all rows, in order."""
    return hashlib.sha256("".join(row.digest for row in held(rows)).encode()).hexdigest()


def longest_first(rows: Sequence[Held]) -> list[int]:
    """An order in which rows that share a batch have answers of like length, and what does not fit the GPU comes first."""
    return sorted(range(len(rows)), key=lambda place: (-len(rows[place].own["reference"]), place))


def key(spec: JobSpec, loaded: Loaded, rows: Sequence[Held], device: str) -> str:
    """The file that holds what this base says to these rows: a digest of all that decides it, to the last bit of a logit."""
    dataset = {name: value for name, value in spec.dataset.model_dump(mode="json").items() if name not in PLACES}
    decides = {
        "base": base_digest(loaded.folder),
        "held as": [loaded.backend, loaded.precision, spec.model.attn_implementation, device],
        "rows": [row.digest for row in rows],
        "dataset": dataset,
        "lengths": [spec.training.max_length, spec.evaluation.max_new_tokens, spec.evaluation.batch],
        "packages": versions(),
    }
    return f"{hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()}.jsonl"


def base_digest(folder: Path) -> str:
    """SHA-256 over names and contents of all files of a model's folder, which are read once a process."""
    names = sorted(files_of(folder))
    with ThreadPoolExecutor(4) as threads:
        digests = list(threads.map(lambda name: _unchanged(folder / name), names))
    return hashlib.sha256(json.dumps(list(zip(names, digests, strict=True))).encode()).hexdigest()


def read_base_ahead(folder: Path) -> None:
    """Take the digests of a base's files in the background, for `base_digest`. A resumed job, which has measured the base
    already, else reads gigabytes at its end. The thread is a daemon, so that a notice does not wait for it."""

    def read() -> None:
        with suppress(OSError):  # for who asks for the digest
            for name in files_of(folder):
                _unchanged(folder / name)

    Thread(target=read, name="base digest", daemon=True).start()


def _unchanged(file: Path) -> str:
    stat = file.stat()
    return _file_digest(file, stat.st_size, stat.st_mtime_ns)


@cache
def _file_digest(file: Path, _size: int, _changed: int) -> str:
    return sha256_of(file)


def places(attempt: Attempt) -> list[Store]:
    """Where answers of the base are kept, nearest first. Nowhere when the run trains biases, which no adapter holds."""
    spec = attempt.spec
    if spec.lora.bias != "none":
        return []
    near = open_store(str(attempt.scratch.parent / "before"))
    return [near, open_store(spec.evaluation.cache)] if spec.evaluation.cache else [near]


def recall(stores: Sequence[Store], name: str, rows: Sequence[Held]) -> tuple[list[dict[str, Any]], str]:
    """Records as `generations` makes them, from what was kept for exactly these rows, and where; none and an empty string
    when there is nothing."""
    for store in stores:
        try:
            found = [json.loads(line) for line in store.read(name).decode().splitlines()]
            # Rows are known by what they hold: another run may number the same rows otherwise.
            if [record["row"] for record in found] == [row.digest for row in rows]:
                made = [{field: record[field] for field in MADE} for record in found]
                return [row.own | said for row, said in zip(rows, made, strict=True)], store.url
        except Missing:
            continue
        except Preempted:
            raise
        except (JobError, ValueError, KeyError, TypeError) as error:
            log.warning("answers of the base are not taken from %s: %s", store.url, error)
    return [], ""


def keep(stores: Sequence[Store], name: str, rows: Sequence[Held], records: Sequence[dict[str, Any]]) -> None:
    """Keep what the base said in every place. One that does not take it is reported and stops nothing."""
    lines = [
        {"row": row.digest} | {field: record[field] for field in MADE}
        for row, record in zip(rows, records, strict=True)
    ]
    body = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    for store in stores:
        try:
            store.write(name, body)
        except Preempted:
            raise
        except JobError as error:
            log.warning("answers of the base are not kept at %s: %s", store.url, error)


def _digest(messages: list[dict[str, Any]], images: Sequence[Any]) -> str:
    digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode())
    for image in images:
        digest.update(f"{image.mode} {image.size}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()
