"""Held-out loss while training: it disturbs nothing, it survives a stop, and what it chose is what is published."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict

from job.config.environment import Environment
from job.context import RunContext
from job.data.split import hold_out
from job.errors import Preempted
from job.layout import SAMPLES_KEY
from job.model.transformers_backend import load
from job.planning.plan import make_plan
from job.planning.survey import survey
from job.runtime.preemption import Preemption
from job.runtime.status import Record
from job.store import open_store
from job.store.lease import acquire
from job.store.local import LocalStore
from job.train.stage import train
from tests.resume_proof import trajectory
from tests.tiny import job_spec, picture

STEPS = 8
RATE = {"learning_rate": 0.05, "lr_scheduler_type": "constant"}
CHOOSING = {"eval_steps": 1, "patience": 1000}
"""Sets the validation row aside, and stops never."""
Weights = dict[str, torch.Tensor]
Fitted = Callable[..., tuple[Weights, Path]]


@pytest.fixture
def fitted(tmp_path: Path, tiny: Callable[..., Path]) -> Fitted:
    """`fitted(name, evaluation, stop_at=k)` trains into the output of that name, and is asked to stop at the k-th
    batch that it measures. Returns the adapter and the file of numbers.

    One training row is like the held-out ones: the validation row, where one is set aside."""
    no_fracture = "No fracture of the clavicle is seen. "  # learning the other unlearns this
    said = {"rows": ("There is a nodule. ", range(8)), "held": (no_fracture, range(8)), "one": (no_fracture, [1])}
    for name, (caption, numbers) in said.items():
        folder = tmp_path / name
        folder.mkdir()
        names = [f"{name} {n}" for n in numbers]
        aside = hold_out(names, 0, 3407, rows=1) if name == "rows" else [False] * len(names)
        lines = [
            {
                "file_name": f"{n}.png",
                "caption": (no_fracture if is_aside else caption) * (1 + n % 3),
                "weight": 3.0 * (n == 1),
                "patient": patient,
            }
            for n, patient, is_aside in zip(numbers, names, aside, strict=True)
        ]
        for number, line in zip(numbers, lines, strict=True):
            picture(number + 8 * (name != "rows")).save(folder / str(line["file_name"]))
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(
        name: str, evaluation: dict[str, Any], stop_at: int = 0, dataset: dict[str, str] | None = None, **training: Any
    ) -> tuple[Weights, Path]:
        spec = job_spec(
            model={"name_or_path": str(tiny("llava"))},
            dataset={"path": str(tmp_path / "rows"), "eval_path": str(tmp_path / "held"), "image_max_side": None}
            | {"group_column": "patient"}
            | (dataset or {}),
            lora={"r": 4, "lora_dropout": 0.2, "finetune_vision_layers": False},
            training={
                "max_steps": STEPS,
                "effective_batch_size": 4,
                "learning_rate": 0.05,
                "lr_scheduler_type": "constant",
            }
            | training,
            evaluation={"max_new_tokens": 4} | evaluation,
            output={"url": str(tmp_path / name)},
        )
        store, scratch = open_store(spec.output.url), tmp_path / f"scratch-{name}" / "job"
        scratch.mkdir(parents=True, exist_ok=True)
        found = survey(spec, store, scratch, Environment(), fetch=True)
        loaded = load(spec, tiny("llava"), torch.device("cpu"))
        measured = 0

        def notice(model: Any, _arguments: Any) -> None:
            nonlocal measured
            measured += not model.training
            if measured == stop_at and not model.training:
                os.kill(os.getpid(), signal.SIGTERM)

        loaded.model.get_base_model().register_forward_pre_hook(notice)
        assert found.data is not None
        preemption = Preemption()
        with (
            preemption.listening(too_late=lambda reason: None),
            acquire(store, "test", 60.0) as lease,
            Record(store, scratch).kept() as record,
        ):
            attempt = RunContext(spec, store, lease, scratch, record, preemption, 1)
            train(attempt, make_plan(spec, found.facts), loaded, found.data)
        return get_peft_model_state_dict(loaded.model), scratch / "metrics.jsonl"

    return run


def samples(numbers: Path) -> list[dict[str, Any]]:
    output = numbers.parent.parent.with_name(numbers.parent.parent.name.removeprefix("scratch-"))
    return [json.loads(line) for line in (output / "evaluation" / "samples.jsonl").read_text().splitlines()]


def measured(numbers: Path) -> dict[int, float]:
    lines = map(json.loads, numbers.read_text().splitlines())
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_measuring_changes_neither_order_nor_dropout_and_the_best_step_is_taken(fitted: Fitted) -> None:
    plain, numbers = fitted("plain", {})
    watched, with_losses = fitted("watched", {"eval_steps": 1})
    assert same(plain, watched)
    assert trajectory(numbers.read_bytes()) == trajectory(with_losses.read_bytes())
    assert list(measured(with_losses)) == list(range(1, STEPS + 1))
    _, numbers = fitted("choosing", CHOOSING)
    last = first_worse(measured(numbers))
    taken, _ = fitted("taken", {"eval_steps": 1, "take": "best"}, max_steps=last)
    until_then, _ = fitted("until then", CHOOSING, max_steps=last - 1)
    assert same(taken, until_then)


def first_worse(losses: dict[int, float]) -> int:
    """The first step whose loss is no lower than that of the one before, which is so the best until then."""
    return next(step for step in losses if step > 1 and losses[step] >= losses[step - 1])


def test_a_notice_while_measuring_leaves_at_once_and_what_was_dropped_is_measured_again(fitted: Fitted) -> None:
    patient = {"eval_steps": 1, "take": "best", "patience": 1, "eval_samples": 2, "max_new_tokens": 1}
    whole, numbers = fitted("whole", patient)
    losses = measured(numbers)
    assert max(losses) == first_worse(losses) < STEPS  # it stopped early
    last = 2 * max(losses)  # one batch a measurement, and one that is answered
    for stop in (last, last - 1):  # in the midst of the last answers, and of the last losses
        with pytest.raises(Preempted):
            fitted(f"stopped {stop}", patient, stop_at=stop)
        again, resumed = fitted(f"stopped {stop}", patient)
        assert measured(resumed) == losses
        assert trajectory(resumed.read_bytes()) == trajectory(numbers.read_bytes())
        assert same(again, whole)
        assert samples(resumed) == samples(numbers)
        assert [line["step"] for line in samples(numbers)] == list(losses)
        assert len({line["id"] for line in samples(numbers)}) == 1
    once_more, _ = fitted(f"stopped {stop}", patient)
    assert same(once_more, whole)


def test_a_store_that_is_slow_to_take_samples_holds_up_no_step(fitted: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    second_step, write, numbers = threading.Event(), LocalStore.write, Record.numbers

    def slow_write(self: LocalStore, key: str, data: bytes, **conditions: Any) -> str:
        assert key != SAMPLES_KEY or second_step.wait(60)
        return write(self, key, data, **conditions)

    def noted(self: Record, **values: Any) -> None:
        numbers(self, **values)
        if "loss" in values and values["step"] == 2:
            second_step.set()

    monkeypatch.setattr(LocalStore, "write", slow_write)
    monkeypatch.setattr(Record, "numbers", noted)
    _, measurements = fitted("slow", {"eval_steps": 1}, max_steps=2)
    assert {line["step"] for line in samples(measurements)} == {1, 2}


def test_rows_count_as_often_as_their_weight_says(fitted: Fitted, tmp_path: Path) -> None:
    """Where all held-out rows but one weigh nothing, the loss is that of the one row alone."""
    weighted, once = {"weight_column": "weight"}, {"eval_steps": 1, "eval_samples": 0}
    _, all_rows = fitted("all", once, dataset=weighted, max_steps=1)
    _, one_row = fitted("alone", once, dataset=weighted | {"eval_path": str(tmp_path / "one")}, max_steps=1)
    assert measured(all_rows)[1] == pytest.approx(measured(one_row)[1], rel=1e-5)
    _, plain = fitted("plain", once, max_steps=1)
    assert measured(plain)[1] != pytest.approx(measured(one_row)[1], rel=1e-3)
