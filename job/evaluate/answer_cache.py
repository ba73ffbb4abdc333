"""Caches a base model's answers to held-out rows under a digest, since they are the same for every run.

The cache is on scratch, for jobs on the same node, and at `evaluation.cache`, for all jobs given that location. Of the data it
holds only the generated texts: each run has its own references, labels and groups.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

from job.checkpoint.commit import known_sha256
from job.config.schema import JobSpec
from job.context import RunContext
from job.errors import JobError, Preempted
from job.evaluate.records import Answer, HeldOutRow, from_json
from job.model.loaded import Loaded
from job.runtime.status import own_code, versions
from job.store import Missing, Store, files_of, open_store

log = logging.getLogger("job")

MADE = ("generated", "tokens", "loss", "answer_tokens", "swapped_loss")
"""Fields of an answer that the model generates."""
PLACES = ("path", "eval_path")
"""Fields of the dataset section that only locate rows and do not affect them."""


@dataclass(frozen=True)
class Held:
    """A held-out row before any model sees it: its own fields, and a digest of its texts and pixels."""

    own: HeldOutRow
    digest: str


_last: list[tuple[Any, list[Held]]] = []
"""The rows read last, and the result of `held` for them."""


def held(rows: Any) -> list[Held]:
    """Return all rows in order. They are read once per process, because each digest requires decoding every image."""
    if not any(known is rows for known, _ in _last):
        found, asked = list[Held](), list[str]()
        for row in rows:
            found.append(Held(from_json(HeldOutRow, row), _digest(row["messages"], row["images"])))
            asked.append(_question(row["messages"]))
        if len(set(asked)) > 1:
            found = [
                replace(each, own=replace(each.own, question=said)) for each, said in zip(found, asked, strict=True)
            ]
        _last[:] = [(rows, found)]
    return _last[0][1]


def rows_digest(rows: Any) -> str:
    """Return the SHA-256 over texts and pixels of all rows, in order."""
    return hashlib.sha256("".join(row.digest for row in held(rows)).encode()).hexdigest()


def longest_first(rows: Sequence[Held]) -> list[int]:
    """Order rows so that those in a batch have answers of similar length, and a batch that does not fit the GPU comes first."""
    return sorted(range(len(rows)), key=lambda place: (-len(rows[place].own.reference), place))


def key(spec: JobSpec, loaded: Loaded, rows: Sequence[Held], device: str) -> str:
    """Return the file name of this base's answers to these rows: a digest of everything that decides them, to the last bit of
    a logit."""
    dataset = {name: value for name, value in spec.dataset.model_dump(mode="json").items() if name not in PLACES}
    decides = {
        "base": base_digest(loaded.folder),
        "held as": [loaded.backend, loaded.precision, spec.model.attn_implementation, device],
        "rows": [row.digest for row in rows],
        "asked": "greedily, to the end of the template's turn",
        "dataset": dataset,
        "lengths": [spec.training.max_length, spec.evaluation.max_new_tokens, spec.evaluation.batch],
        "packages": versions(),
        "job": own_code(),
    }
    return f"{hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()}.jsonl"


def base_digest(folder: Path) -> str:
    """Return the SHA-256 over names and contents of all files in a model's folder, which are read once per process."""
    names = sorted(files_of(folder))
    with ThreadPoolExecutor(4) as threads:
        digests = list(threads.map(lambda name: known_sha256(folder / name), names))
    return hashlib.sha256(json.dumps(list(zip(names, digests, strict=True))).encode()).hexdigest()


def read_base_ahead(folder: Path) -> None:
    """Hash a base's files in the background for `base_digest`. A resumed job that has already measured the base would
    otherwise read gigabytes at its end. The thread is a daemon, so that a preemption notice does not wait for it."""

    def read() -> None:
        with suppress(OSError):  # `base_digest` raises it
            for name in files_of(folder):
                known_sha256(folder / name)

    Thread(target=read, name="base digest", daemon=True).start()


def places(ctx: RunContext) -> list[Store]:
    """Return the stores of the base's answers, nearest first. Empty when the run trains biases, which no adapter holds."""
    spec = ctx.spec
    if spec.lora.bias != "none":
        return []
    near = open_store(str(ctx.scratch.parent / "before"))
    return [near, open_store(spec.evaluation.cache)] if spec.evaluation.cache else [near]


def recall(stores: Sequence[Store], name: str, rows: Sequence[Held]) -> tuple[list[Answer], str]:
    """Return cached answers to exactly these rows, as `generations` makes them, and the store's URL; an empty list and string
    when there are none."""
    for store in stores:
        try:
            found = [json.loads(line) for line in store.read(name).decode().splitlines()]
            # Rows are identified by content: another run may number the same rows differently.
            if [record["row"] for record in found] == [row.digest for row in rows]:
                made = [
                    {"swapped_loss": None} | {field: record[field] for field in MADE if field in record}
                    for record in found
                ]
                return [Answer(**vars(row.own), **said) for row, said in zip(rows, made, strict=True)], store.url
        except Missing:
            continue
        except Preempted:
            raise
        except (JobError, ValueError, KeyError, TypeError) as error:
            log.warning("cannot read the base model's answers from %s: %s", store.url, error)
    return [], ""


def keep(stores: Sequence[Store], name: str, rows: Sequence[Held], answers: Sequence[Answer]) -> None:
    """Write the base's answers to every store. A failing store is reported and stops nothing."""
    lines = [
        {"row": row.digest} | {field: getattr(answer, field) for field in MADE}
        for row, answer in zip(rows, answers, strict=True)
    ]
    body = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    for store in stores:
        try:
            store.write(name, body)
        except Preempted:
            raise
        except JobError as error:
            log.warning("cannot cache the base model's answers at %s: %s", store.url, error)


def _question(messages: list[dict[str, Any]]) -> str:
    """Return the text of the last user turn."""
    turns = [message["content"] for message in messages if message["role"] == "user"]
    return "".join(part.get("text") or "" for part in turns[-1]) if turns else ""


def _digest(messages: list[dict[str, Any]], images: Sequence[Any]) -> str:
    digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode())
    for image in images:
        digest.update(f"{image.mode} {image.size}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()
