"""Stopped behind any micro-batch and taken up again, training cannot be told from one that was never stopped."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict

from job.config.environment import Environment
from job.context import RunContext
from job.errors import Preempted
from job.model.transformers_backend import load
from job.planning.plan import make_plan
from job.planning.survey import survey
from job.runtime.preemption import Preemption
from job.runtime.status import Record
from job.store import open_store
from job.store.lease import acquire
from job.train.stage import train
from tests.resume_proof import trajectory
from tests.tiny import job_spec, picture

ROWS, EPOCHS = 7, 3  # a step of four rows and one of three, two at once
Outcome = tuple[list[tuple[Any, ...]], dict[str, torch.Tensor]]
Trained = Callable[..., Outcome]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]) -> Trained:
    """`trained(name, fits, stops)` trains to the end on a card where so many rows fit; for each n of `stops` an attempt
    before is asked to stop in its n-th forward. A save took `save_seconds` so far. Returns the lines of numbers, one each
    `logging_steps`, and the adapter."""
    root = tmp_path_factory.mktemp("resume")
    (root / "rows").mkdir()
    lines = [{"file_name": f"{n}.png", "caption": "There is a nodule. " * (1 + n % 3)} for n in range(ROWS)]
    for number, line in enumerate(lines):
        picture(number).save(root / "rows" / str(line["file_name"]))
    (root / "rows" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(
        name: str,
        fits: int = 2,
        stops: tuple[int, ...] = (),
        save_seconds: float | None = None,
        stuck_at: int = 0,
        logging_steps: int = 1,
    ) -> Outcome:
        spec = job_spec(
            model={"name_or_path": str(tiny("llava"))},
            dataset={"path": str(root / "rows"), "eval_fraction": 0},
            lora={"r": 4, "lora_dropout": 0.2},
            training={
                "num_train_epochs": EPOCHS,
                "effective_batch_size": 4,
                "per_device_train_batch_size": 2,
                "learning_rate": 0.05,
                "logging_steps": logging_steps,
            },
            checkpoint={"save_steps": 4},
            output={"url": str(root / name)},
        )
        store, scratch = open_store(spec.output.url), root / f"scratch-{name}" / "job"
        scratch.mkdir(parents=True)
        found = survey(spec, store, scratch, Environment(), fetch=True)
        assert found.data is not None
        for number, stop in enumerate((*stops, 0), 1):
            loaded, preemption = load(spec, tiny("llava"), torch.device("cpu")), Preemption()
            forwards = itertools.count(1)

            def card(
                _: Any, __: Any, named: Any, last: int = stop, forwards: Any = forwards, asked: Any = preemption
            ) -> None:
                if named["input_ids"].shape[0] > fits:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                if next(forwards) == last:
                    asked.request("a notice")

            loaded.model.get_base_model().register_forward_pre_hook(card, with_kwargs=True)
            data = found.data
            if stuck_at and stop:
                data = dataclasses.replace(data, train=data.train.with_transform(stuck(data.train, stuck_at)))
            with (
                preemption.listening(),
                acquire(store, "test", 60.0) as lease,
                Record(store, scratch).kept() as record,
            ):
                record.update(checkpoint_seconds=save_seconds)
                attempt = RunContext(spec, store, lease, scratch, record, preemption, number)
                try:
                    train(attempt, make_plan(spec, found.facts), loaded, data)
                    assert not stop
                except Preempted:
                    assert stop
        weights = {key: value.clone() for key, value in get_peft_model_state_dict(loaded.model).items()}
        return trajectory((scratch / "metrics.jsonl").read_bytes()), weights

    return run


def stuck(rows: Any, at: int) -> Callable[[Any], Any]:
    """The transform of `rows`, which never gives the `at`-th batch: the store of the data does not answer."""
    transform, calls = rows.format["format_kwargs"]["transform"], itertools.count(1)

    def read(batch: Any) -> Any:
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
        return transform(batch)

    return read


@pytest.mark.parametrize(
    ("fits", "stops", "saved"),
    [
        # In the first step, in the second, again in it, at the end of an epoch, in the next step, two behind that.
        (2, (1, 3, 1, 2, 3, 4), [0, 1, 1, 2, 3, 5]),
        # Every micro-batch in halves, from the attempt on that ran out of memory.
        (1, (1, 5, 2, 3, 6), [0, 1, 1, 2, 3]),
    ],
)
def test_stopped_again_and_again(
    trained: Trained, fits: int, stops: tuple[int, ...], saved: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "job")
    numbers, weights = trained(f"whole {fits}", fits)
    assert [step for step, *_ in numbers] == list(range(1, 2 * EPOCHS + 1))
    again, same = trained(f"stopped {fits}", fits, stops)
    left = re.findall(r"notice → commit: [\d.]+ s, at step (\d+), [01] micro-batches dropped", caplog.text)
    assert [int(step) for step in left] == saved
    assert again == numbers
    assert any(value.any() for value in weights.values())
    assert same.keys() == weights.keys()
    assert all(torch.equal(same[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("stops", "steps"),
    [
        ((), [4, 6]),  # step 4 is saved, step 6 the last
        ((6,), [3, 4, 6]),  # asked to stop in the last micro-batch of step 3
        ((5, 7), [2, 4, 5, 6]),  # in the first one of step 3, then of step 6
    ],
)
def test_each_step_is_in_one_line_of_numbers(trained: Trained, stops: tuple[int, ...], steps: list[int]) -> None:
    """However rarely lines are written: the next attempt knows nothing of the steps behind the last one."""
    each_step, _ = trained(f"each step {stops}")
    lines, _ = trained(f"seldom {stops}", stops=stops, logging_steps=100)
    assert [step for step, *_ in lines] == steps
    for first, (last, loss, rate, _, rows) in zip([0, *steps], lines, strict=False):
        within = each_step[first:last]
        assert rows == [row for *_, of_step in within for row in of_step]
        assert loss == pytest.approx(sum(line[1] for line in within) / len(within), rel=1e-6)
        assert rate == within[-1][2]


def test_stopped_while_it_waits_for_rows_it_keeps_the_steps_before(
    trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "job")
    numbers, _ = trained("undisturbed")
    again, _ = trained("stuck", stops=(99,), stuck_at=6)
    assert again == numbers
    assert "at step 2, 0 micro-batches dropped" in caplog.text


def test_where_a_save_does_not_fit_the_grace_saves_come_twice_as_often(
    trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    trained("slow", save_seconds=25.0)
    said = "a checkpoint takes 25 s to reach the store, and a preemption notice leaves 30 s (JOB_GRACE_SECONDS)"
    (warning,) = [text for text in caplog.messages if said in text]
    assert warning.endswith("saving every 2 steps from now on")
