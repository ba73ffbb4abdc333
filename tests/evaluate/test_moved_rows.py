"""Answers of an earlier attempt are those of the same rows, wherever these stand in the table now."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from job.config.schema import JobSpec
from job.context import RunContext
from job.data import Data
from job.data.prepare import prepare
from job.errors import Preempted
from job.evaluate.records import Answer
from job.evaluate.stage import measure, stored_rows
from job.layout import OCCLUSION_KEY
from job.model.transformers_backend import load
from job.runtime.preemption import Preemption
from job.runtime.status import Record
from job.store import open_store
from job.store.lease import acquire
from tests.tiny import job_spec, picture


def write(rows: list[dict[str, str]], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for number, row in enumerate(rows):
        if not (folder / row["file_name"]).exists():
            picture(number, 60, 60 + 10 * number).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_bad_row_that_is_taken_out_between_attempts_moves_no_answer(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    good = [{"file_name": f"{n}.png", "caption": f"There is finding number {n}."} for n in range(6)]
    bad = {"file_name": "0.png", "caption": ""}
    spec = job_spec(
        model={"name_or_path": str(tiny("llava"))},
        dataset={"path": str(tmp_path / "data"), "eval_fraction": 0.7, "max_bad_fraction": 1},
        evaluation={"max_new_tokens": 4, "batch_size": 1},
        output={"url": str(tmp_path / "output")},
    )
    loaded = load(spec, tiny("llava"), torch.device("cpu"))
    asked = 0

    def notice(*_: Any) -> None:
        nonlocal asked
        asked += 1
        if asked == 12:  # some rows are finished
            os.kill(os.getpid(), signal.SIGTERM)

    loaded.model.get_base_model().register_forward_pre_hook(notice)

    def attempt(rows: list[dict[str, str]], scratch: str) -> tuple[list[Answer], Data]:
        write(rows, tmp_path / "data")
        return measured(spec, prepare(spec, tmp_path / scratch), loaded, tmp_path / scratch)

    store = open_store(spec.output.url)
    with pytest.raises(Preempted):
        attempt([bad, *good], "one")
    begun = stored_rows(store, "evaluation/before.partial.jsonl", Answer)
    assert 0 < len(begun) < 4
    resumed, data = attempt(good, "two")
    store.delete(["evaluation/before.jsonl"])
    undisturbed, _ = attempt(good, "three")
    assert resumed == undisturbed
    assert [row.id for row in resumed] == [row["id"] for row in data.evaluation]
    store.write(OCCLUSION_KEY, b"{}")
    moved, data = attempt([bad, bad, *good], "four")  # the finished ones, too
    assert [row.id for row in moved] == [row["id"] for row in data.evaluation]
    assert [row.generated for row in moved] == [row.generated for row in resumed]
    assert stored_rows(store, "evaluation/before.jsonl", Answer) == moved
    assert not any(store.list(OCCLUSION_KEY))


def measured(spec: JobSpec, data: Data, loaded: Any, scratch: Path) -> tuple[list[Answer], Data]:
    """What the base says, in an attempt of its own."""
    store, own, preemption = open_store(spec.output.url), scratch / "job", Preemption()
    own.mkdir(parents=True, exist_ok=True)
    with (
        preemption.listening(too_late=lambda reason: None),
        acquire(store, "test", 60.0) as lease,
        Record(store, own).kept() as record,
    ):
        return measure(RunContext(spec, store, lease, own, record, preemption, 1), loaded, data, "before"), data
