"""Each family learns through the job's own training, from rows on disk to a loss that falls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from job.config.environment import Environment
from job.context import RunContext
from job.model.transformers_backend import load
from job.planning.plan import make_plan
from job.planning.survey import survey
from job.runtime.preemption import Preemption
from job.runtime.status import Record
from job.store import open_store
from job.store.lease import acquire
from job.train.stage import train
from tests.tiny import job_spec, picture


@pytest.mark.parametrize(("family", "recomputed"), [("mllama", True), ("qwen3_vl", False), ("gemma3", False)])
def test_a_few_steps_lower_the_loss(family: str, recomputed: bool, tiny: Callable[..., Path], tmp_path: Path) -> None:
    rows = [
        {"file_name": f"{number}.png", "caption": f"There is a {'nodule' if number % 2 else 'fracture'}."}
        for number in range(8)
    ]
    (tmp_path / "rows").mkdir()
    for number, each in enumerate(rows):
        picture(number, 60, 60 + 10 * number).save(tmp_path / "rows" / each["file_name"])
    (tmp_path / "rows" / "metadata.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    spec = job_spec(
        model={"name_or_path": str(tiny(family))},
        dataset={"path": str(tmp_path / "rows"), "eval_fraction": 0},
        lora={"r": 8},
        training={
            "max_steps": 8,
            "learning_rate": 1e-2,
            "effective_batch_size": 4,
            "per_device_train_batch_size": 2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "gradient_checkpointing": recomputed,
        },
        output={"url": str(tmp_path / "out")},
    )
    store, scratch = open_store(spec.output.url), tmp_path / "scratch"
    scratch.mkdir()
    found = survey(spec, store, scratch, Environment(), fetch=True)
    loaded = load(spec, tiny(family), torch.device("cpu"))
    layer, calls = next(each for name, each in loaded.model.named_modules() if name.endswith(".layers.0")), []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    assert found.data is not None
    with acquire(store, "test", 60.0) as lease, Record(store, scratch).kept() as record:
        attempt = RunContext(spec, store, lease, scratch, record, Preemption(), 1)
        train(attempt, make_plan(spec, found.facts), loaded, found.data)
    losses = [json.loads(line)["loss"] for line in (scratch / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 8
    assert len(calls) == 8 * 2 * (2 if recomputed else 1)
    assert sum(losses[-2:]) < 0.85 * sum(losses[:2])
    assert not any(module.training for module in loaded.model.modules())
