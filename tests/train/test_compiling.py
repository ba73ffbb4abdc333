"""Of training, whole micro-batches alone run compiled, and only where the plan says so."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from job.config.environment import Environment
from job.context import RunContext
from job.model.load import load_model
from job.model.loaded import Loaded
from job.model.patches.compile_stance import compiled
from job.planning.plan import make_plan
from job.planning.survey import survey
from job.runtime.preemption import Preemption
from job.runtime.status import Record
from job.store import open_store
from job.store.lease import acquire
from job.train.stage import train
from tests.tiny import batch, job_spec, picture

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo asks for it as it traces

ROWS = 7  # a step of two and two rows, then one of two and one


class Counted:
    """A backend of torch.compile: `rows` are those of each run of compiled code."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, graph: Any, _inputs: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            self.rows.append(next(each.shape[0] for each in arguments if getattr(each, "ndim", 0) == 3))
            return graph.forward(*arguments)

        return run


@pytest.fixture
def counted() -> Iterator[Counted]:
    torch._dynamo.reset()
    yield Counted()
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def loaded_with_a_compiled_layer(folder: Path, counted: Counted, **lora: Any) -> Loaded:
    """As Unsloth loads it, which wraps the layers of all families."""
    spec = job_spec(model={"name_or_path": str(folder)}, lora={"r": 4} | lora)
    loaded = load_model(spec, folder, torch.device("cpu"), "transformers", "32bit", "all", None)
    layer = loaded.model.get_base_model().model.language_model.layers[0].mlp
    layer.forward = torch.compile(layer.forward, backend=counted, dynamic=True)
    return loaded


@pytest.fixture
def trained(tmp_path: Path, tiny: Callable[..., Path], counted: Counted) -> Callable[..., list[int]]:
    """`trained(compile, fits)` trains two epochs, measured after each step, on a card where `fits` rows fit, and returns
    the rows of each run of compiled code."""
    rows = tmp_path / "rows"
    rows.mkdir()
    lines = [{"file_name": f"{n}.png", "caption": "There is a nodule. " * (1 + n % 3)} for n in range(ROWS)]
    for number, line in enumerate(lines):
        picture(number).save(rows / str(line["file_name"]))
    (rows / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(compile: bool, fits: int = 2) -> list[int]:
        spec = job_spec(
            model={"name_or_path": str(tiny("llava"))},
            dataset={"path": str(rows), "eval_path": str(rows)},
            lora={"r": 4, "finetune_vision_layers": False},
            training={"num_train_epochs": 2, "effective_batch_size": 4, "per_device_train_batch_size": 2},
            evaluation={"eval_steps": 1, "eval_samples": fits, "max_new_tokens": 2},
            output={"url": str(tmp_path / "out")},
        )
        store, scratch = open_store(spec.output.url), tmp_path / "scratch" / "job"
        scratch.mkdir(parents=True)
        found = survey(spec, store, scratch, Environment(), fetch=True)
        loaded = loaded_with_a_compiled_layer(tiny("llava"), counted, finetune_vision_layers=False)

        def card(_: Any, __: Any, named: Any) -> None:
            if named["input_ids"].shape[0] > fits:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        loaded.model.get_base_model().register_forward_pre_hook(card, with_kwargs=True)
        assert found.data is not None
        with acquire(store, "test", 60.0) as lease, Record(store, scratch).kept() as record:
            attempt = RunContext(spec, store, lease, scratch, record, Preemption(), 1)
            train(attempt, dataclasses.replace(make_plan(spec, found.facts), compile=compile), loaded, found.data)
        return counted.rows

    return run


def test_whole_micro_batches_run_compiled_and_short_ones_and_measurements_do_not(
    trained: Callable[..., list[int]],
) -> None:
    assert trained(compile=True) == [2, 2, 2] * 2  # and not the fourth micro-batch of each epoch, of one row


def test_without_it_nothing_is_compiled(trained: Callable[..., list[int]]) -> None:
    assert trained(compile=False) == []


def test_parts_of_a_micro_batch_that_does_not_fit_are_not_compiled(trained: Callable[..., list[int]]) -> None:
    assert trained(compile=True, fits=1) == []


def test_nothing_compiles_after_someone_else_has_let_torch_compile(tiny: Callable[..., Path], counted: Counted) -> None:
    """Unsloth does before each training and each generation."""
    loaded = loaded_with_a_compiled_layer(tiny("llava"), counted)
    inputs = dict(loaded.processor(**asked(loaded), return_tensors="pt").items())
    torch.compiler.set_stance("default")
    loaded.model.generate(**inputs, max_new_tokens=2)
    torch.compiler.set_stance("default")
    loaded.model(**inputs)
    assert counted.rows == []
    with compiled(True):
        loaded.model(**inputs)
    assert counted.rows == [1]
    loaded.model(**inputs)
    assert counted.rows == [1]


def test_masks_of_a_generation_are_not_compiled_either(
    tiny: Callable[..., Path], counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are made before the first forward, by functions that Unsloth wraps."""
    mask, made = torch.compile(lambda tensor: tensor * 2, backend=counted), []
    prepare = LlavaForConditionalGeneration.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def prepared(*arguments: Any, **named: Any) -> Any:
        made.append(mask(torch.zeros(1, 1, 1)))
        return prepare(*arguments, **named)

    monkeypatch.setattr(LlavaForConditionalGeneration, "prepare_inputs_for_generation", prepared)
    loaded = loaded_with_a_compiled_layer(tiny("llava"), counted)
    torch.compiler.set_stance("default")
    loaded.model.generate(**loaded.processor(**asked(loaded), return_tensors="pt"), max_new_tokens=2)
    assert made
    assert counted.rows == []


def asked(loaded: Loaded) -> dict[str, Any]:
    one = batch()[0]
    text = loaded.processor.apply_chat_template(one["messages"][:-1], add_generation_prompt=True)
    return {"text": [text], "images": [one["images"]]}
