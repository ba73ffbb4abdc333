"""A checkpoint is written behind training's back, and is what transformers would have written before its eyes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from job.checkpoint import load_weights, restore
from job.config.environment import Environment
from job.context import RunContext
from job.errors import Unavailable
from job.model.collator import Collator
from job.model.load import to_training
from job.model.transformers_backend import load
from job.planning.plan import make_plan
from job.planning.survey import survey
from job.runtime.preemption import Preemption
from job.runtime.status import Record
from job.store import open_store
from job.store.lease import acquire
from job.train.snapshot import Snapshot
from job.train.stage import train
from tests.tiny import job_spec, picture


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    (tmp_path / "unchanging").mkdir()
    (tmp_path / "unchanging/config.json").write_text("{}")
    return Snapshot(tmp_path / "unchanging")


def state(value: float) -> dict[str, Any]:
    weights = {"a": torch.full((50, 40), value), "b": torch.full((3,), value, dtype=torch.bfloat16)}
    moments = {0: {"step": torch.tensor(value), "exp_avg": torch.full((50, 40), value)}}
    return {"w.safetensors": weights, "optimizer.pt": {"state": moments, "param_groups": [{"lr": value}]}}


def test_what_is_written_is_the_state_of_the_moment_it_was_taken(snapshot: Snapshot, tmp_path: Path) -> None:
    now = state(1.0)
    snapshot.prepare(now)
    for number in (1.0, 2.0, 3.0):
        for tensor in (*now["w.safetensors"].values(), *now["optimizer.pt"]["state"][0].values()):
            tensor.fill_(number)
        now["optimizer.pt"]["param_groups"][0]["lr"] = number
        snapshot.take(tmp_path / f"{number}", now)
        for tensor in (*now["w.safetensors"].values(), *now["optimizer.pt"]["state"][0].values()):
            tensor.fill_(-1)  # the next step, while the files are being written
        now["optimizer.pt"]["param_groups"][0]["lr"] = -1
    snapshot.written.result()
    for number in (1.0, 2.0, 3.0):
        expected = state(number)
        weights, found = (
            load_file(tmp_path / f"{number}/w.safetensors"),
            load_weights(tmp_path / f"{number}/optimizer.pt"),
        )
        assert all(torch.equal(weights[name], value) for name, value in expected["w.safetensors"].items())
        assert torch.equal(found["state"][0]["exp_avg"], expected["optimizer.pt"]["state"][0]["exp_avg"])
        assert (found["state"][0]["step"], found["param_groups"]) == (number, [{"lr": number}])
        assert (tmp_path / f"{number}/config.json").exists()


def test_every_save_copies_into_the_same_memory(snapshot: Snapshot, tmp_path: Path) -> None:
    snapshot.take(tmp_path / "1", state(1.0))
    first = snapshot._copies["w.safetensors"]["a"].data_ptr()
    snapshot.take(tmp_path / "2", state(2.0))
    assert snapshot._copies["w.safetensors"]["a"].data_ptr() == first


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of one megabyte."""
    folder = tmp_path / "full"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("act", ["upload", "download", "a.safetensors", "a.pt"])
def test_a_full_disk_is_a_sentence_wherever_it_is_met(act: str, full: Path, snapshot: Snapshot, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(4 * 2**20))
    with pytest.raises(Unavailable, match=f"disk.*{full}|{full}.*disk"):
        if act == "upload":
            open_store(str(full)).upload(tmp_path / "large", "key")
        elif act == "download":
            open_store(str(tmp_path)).download("large", full / "file")
        else:
            snapshot.take(full, {act: {"weight": torch.ones(2**20)}})
            snapshot.written.result()


def test_plain_transformers_goes_on_from_a_checkpoint(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base, rows = tiny("qwen3_vl"), tmp_path / "rows"
    rows.mkdir()
    for number in range(4):
        picture(number, 60, 60).save(rows / f"{number}.png")
    lines = [{"file_name": f"{number}.png", "caption": "There is a nodule."} for number in range(4)]
    (rows / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = job_spec(
        model={"name_or_path": str(base)},
        dataset={"path": str(rows), "eval_fraction": 0},
        training={"max_steps": 3, "effective_batch_size": 2, "per_device_train_batch_size": 2},
        checkpoint={"save_steps": 3},
        output={"url": str(tmp_path / "out")},
    )
    store, scratch = open_store(spec.output.url), tmp_path / "scratch"
    scratch.mkdir()
    found = survey(spec, store, scratch, Environment(), fetch=True)
    assert found.data is not None
    loaded = load(spec, base, torch.device("cpu"))
    with acquire(store, "test", 60.0) as lease, Record(store, scratch).kept() as record:
        train(
            RunContext(spec, store, lease, scratch, record, Preemption(), 1),
            make_plan(spec, found.facts),
            loaded,
            found.data,
        )
    restored = restore(store, tmp_path / "restored", on_skip=lambda step, why: None)
    assert restored is not None
    loaded.model.save_pretrained(tmp_path / "upstream")
    loaded.processor.save_pretrained(tmp_path / "upstream")
    for path in (tmp_path / "upstream").iterdir():
        assert (restored.folder / path.name).read_bytes() == path.read_bytes(), path.name

    collator = Collator(loaded.processor, 2048, True)
    again = load(spec, base, torch.device("cpu"))
    to_training(again)
    trainer = Trainer(
        model=again.model,
        args=TrainingArguments(
            str(tmp_path / "plain"),
            max_steps=4,
            use_cpu=True,
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
        train_dataset=found.data.train,
        data_collator=collator,
    )
    trainer.train(resume_from_checkpoint=str(restored.folder))
    assert trainer.state.global_step == 4
    assert {int(each["step"]) for each in trainer.optimizer.state_dict()["state"].values()} == {4}
