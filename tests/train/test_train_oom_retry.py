"""Out of memory inside a step: the same rows in halves, the same gradients, and the run goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.loss.loss_utils import LOSS_MAPPING

from job.config.environment import Environment
from job.context import RunContext
from job.errors import DataError, OutOfMemory
from job.model.transformers_backend import load
from job.planning.plan import make_plan
from job.planning.survey import survey
from job.runtime.preemption import Preemption
from job.runtime.status import Record
from job.store import open_store
from job.store.lease import acquire
from job.train.oom_retry import StepRetry
from job.train.stage import train
from tests.families import LAID_OUT
from tests.tiny import job_spec, picture

Trained = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    lines = [{"file_name": f"{n}.png", "caption": "There is a nodule. " * (1 + n % 3)} for n in range(8)]
    for number, line in enumerate(lines):
        picture(number, 60, 60 + 10 * number).save(folder / line["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def trained(rows: Path, tmp_path: Path) -> Trained:
    """`trained(base, fits, **training)` trains two steps of four rows on a card where `fits` rows fit, and returns the
    lines of metrics.jsonl."""

    def run(
        base: Path,
        fits: int,
        name: str = "out",
        spoil_at: int = 0,
        dataset: dict[str, Any] | None = None,
        **training: Any,
    ) -> list[dict[str, Any]]:
        spec = job_spec(
            model={"name_or_path": str(base)},
            dataset={"path": str(rows), "eval_fraction": 0} | (dataset or {}),
            lora={"r": 4, "finetune_vision_layers": False},
            checkpoint={"save_steps": 1},
            training={"max_steps": 2, "effective_batch_size": 4, "learning_rate": 1e-2} | training,
            output={"url": str(tmp_path / name)},
        )
        store, scratch = open_store(spec.output.url), tmp_path / f"scratch-{name}" / "job"
        scratch.mkdir(parents=True)
        found = survey(spec, store, scratch, Environment(), fetch=True)
        loaded = load(spec, base, torch.device("cpu"))

        forwards = []

        def card(_: Any, arguments: Any, named: dict[str, Any]) -> None:
            if named["input_ids"].shape[0] > fits:
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
            forwards.append(1)
            if len(forwards) == spoil_at:
                while record.read("last_checkpoint") != spoil_at - 1:
                    time.sleep(0.01)
                next(weight for weight in loaded.model.parameters() if weight.requires_grad).data.fill_(float("nan"))

        # It runs out behind the layers, so that a failed try leaves gradients of its first part behind.
        loaded.model.get_base_model().register_forward_pre_hook(card, with_kwargs=True)
        assert found.data is not None
        with acquire(store, "test", 60.0) as lease, Record(store, scratch).kept() as record:
            attempt = RunContext(spec, store, lease, scratch, record, Preemption(), 1)
            train(attempt, make_plan(spec, found.facts), loaded, found.data)
        return [json.loads(line) for line in (scratch / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.mark.parametrize("family", LAID_OUT)
def test_halves_have_the_loss_and_the_gradients_of_the_whole(
    family: str, tiny: Callable[..., Path], trained: Trained
) -> None:
    whole, halves = trained(tiny(family), 4), trained(tiny(family), 2, "halves")
    for one, other in zip(whole, halves, strict=True):
        assert one["rows"] == other["rows"]
        assert len(one["rows"]) == 4
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("family", ["mllama", "qwen3_vl", "gemma3"])
def test_short_rows_are_not_padded_to_long_ones(
    family: str, tiny: Callable[..., Path], rows: Path, trained: Trained
) -> None:
    """Long rows and short ones of a step train apart, where four at once do not fit, and as they would one by one; in the second
    epoch with features from the cache."""
    lines = [json.loads(line) for line in (rows / "metadata.jsonl").read_text().splitlines()]
    long = [line | {"caption": line["caption"] * (50 if n % 2 else 1)} for n, line in enumerate(lines)]
    (rows / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in long))
    mixed = {"max_steps": 3, "max_length": 4096}
    parts = trained(tiny(family), 3, "parts", **mixed)
    for part, one in zip(parts, trained(tiny(family), 1, "ones", per_device_train_batch_size=1, **mixed), strict=True):
        assert (part["micro_batch"], part["rows"]) == (4, one["rows"])
        assert part["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert part["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_weighted_rows_have_the_loss_of_the_whole_step_too(
    tiny: Callable[..., Path], rows: Path, trained: Trained
) -> None:
    lines = [json.loads(line) for line in (rows / "metadata.jsonl").read_text().splitlines()]
    weighted = [line | {"weight": 0.25 * number} for number, line in enumerate(lines)]
    (rows / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in weighted))
    plain = trained(tiny("qwen3_vl"), 4)
    whole, halves, steps = (
        trained(tiny("qwen3_vl"), fits, name, dataset={"weight_column": "weight"}, **training)
        for fits, name, training in (
            (4, "whole", {}),
            (2, "halves", {}),
            (4, "accumulated", {"per_device_train_batch_size": 2}),
        )
    )
    assert whole[0]["loss"] != pytest.approx(plain[0]["loss"], rel=1e-3)
    for one, half, step in zip(whole, halves, steps, strict=True):
        assert half["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert step["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_a_loss_that_is_replaced_as_unsloth_does_has_the_same_divisor(
    tiny: Callable[..., Path], trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No first token is predicted, so none counts: it has a label where the whole conversation is learned."""
    (own,) = trained(tiny("qwen3_vl"), 4, max_steps=1, train_on_responses_only=False)
    for kind, loss in LOSS_MAPPING.items():
        monkeypatch.setitem(LOSS_MAPPING, kind, lambda *given, loss=loss, **named: loss(*given, **named))
    (replaced,) = trained(tiny("qwen3_vl"), 4, "replaced", max_steps=1, train_on_responses_only=False)
    assert replaced["loss"] == own["loss"]


def test_a_failed_try_leaves_no_gradient_behind() -> None:
    weight = torch.nn.Linear(1, 1, bias=False)
    rows = torch.tensor([[1.0], [2.0], [3.0], [4.0]])

    def part(start: int, stop: int) -> torch.Tensor:
        loss = weight(rows[start:stop]).sum()
        loss.backward()
        if stop - start > 1 and stop == 4:
            raise torch.OutOfMemoryError
        return loss.detach()

    retry = StepRetry(2)
    weight(rows[:1]).sum().backward()  # of the micro-batch before
    retry.run(4, weight, part)
    assert weight.weight.grad is not None
    assert weight.weight.grad.item() == 1 + 1 + 2 + 3 + 4
    assert retry.micro_batch == 1


def test_one_row_that_does_not_fit_ends_with_71(tiny: Callable[..., Path], trained: Trained) -> None:
    with pytest.raises(
        OutOfMemory, match="does not fit the GPU; set training.gradient_checkpointing to true, shrink"
    ) as caught:
        trained(tiny("mllama"), 0)
    assert caught.value.exit_code == 71


def test_what_fits_is_remembered_in_the_checkpoint(tiny: Callable[..., Path], trained: Trained, tmp_path: Path) -> None:
    trained(tiny("mllama"), 1)
    manifests = list((tmp_path / "out" / "checkpoints").glob("*/MANIFEST.json"))
    assert [json.loads(manifest.read_text())["extra"]["micro_batch"] for manifest in manifests] == [1, 1]


def test_the_processes_of_the_loader_end_with_the_training(tiny: Callable[..., Path], trained: Trained) -> None:
    trained(tiny("qwen3_vl"), 4, dataloader_num_workers=2)
    assert not active_children()


def test_a_lost_training_stops_and_names_the_last_good_checkpoint(
    tiny: Callable[..., Path], trained: Trained, tmp_path: Path
) -> None:
    with pytest.raises(
        DataError, match=r"diverged at step 3: the loss is nan.*; the last good checkpoint is that of step 2"
    ):
        trained(tiny("mllama"), 4, spoil_at=3, max_steps=6)
    kept = [json.loads(path.read_text())["step"] for path in (tmp_path / "out" / "checkpoints").glob("*/MANIFEST.json")]
    assert max(kept) == 2
