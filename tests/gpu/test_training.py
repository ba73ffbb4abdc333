"""Training through Unsloth, on a real GPU: `make test-gpu`. Skipped, with the reason, where there is none."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("there is no NVIDIA GPU here", allow_module_level=True)
if importlib.util.find_spec("unsloth") is None:
    pytest.skip("unsloth is not installed: pip install vision-lora-job[gpu]", allow_module_level=True)

from job.model.load import import_first  # isort: skip

import_first("unsloth")  # before transformers, which it patches

from peft import get_peft_model_state_dict

from job.context import RunContext
from job.data.prepare import prepare
from job.errors import Preempted
from job.model.collator import Collator
from job.model.image_layout import WEIGHTS
from job.model.load import load_model
from job.model.loaded import Loaded
from job.planning.facts import Facts
from job.planning.plan import make_plan
from job.planning.survey import find_device, keep_within
from job.runtime.preemption import Preemption
from job.runtime.status import Record
from job.store import open_store
from job.store.lease import acquire
from job.train.loss import token_loss
from job.train.stage import train
from tests.tiny import job_spec, make_model, picture

GPU = torch.device("cuda", 0)
WEIGHT_OF = (0.5, 2.0, 1.0, 0.0)


def caption(number: int) -> str:
    return "There is a nodule in the left upper zone. " * (1 + number % 5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("mllama", tmp_path_factory.mktemp("mllama"), dtype=torch.bfloat16, device="cuda")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen of them, with captions of different lengths and weights."""
    folder = tmp_path_factory.mktemp("rows")
    lines = [
        {"file_name": f"{n}.png", "caption": caption(n), "weight": WEIGHT_OF[n % len(WEIGHT_OF)]} for n in range(16)
    ]
    for number, line in enumerate(lines):
        picture(number).save(folder / str(line["file_name"]))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


Trained = tuple[list[dict[str, Any]], dict[str, Any], Loaded]


def trained(
    model: Path, rows: Path, out: Path, *, stops: tuple[int, ...] = (), cap: float = 1.0, **sections: Any
) -> Trained:
    """Two steps of eight rows unless `sections` say otherwise; for each n of `stops` an attempt before is asked to stop in
    its n-th forward. Returns the lines of metrics.jsonl, the adapter, and the model."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(cap)
    training = {"max_steps": 2, "effective_batch_size": 8, "dataloader_num_workers": 0} | sections.pop("training", {})
    spec = job_spec(
        model={"name_or_path": str(model), "precision": "16bit"},
        dataset={"path": str(rows), "eval_fraction": 0} | sections.pop("dataset", {}),
        lora={"r": 4},
        training=training,
        output={"url": str(out)},
        **sections,
    )
    store, scratch = open_store(spec.output.url), out.with_suffix(".scratch") / "job"
    scratch.mkdir(parents=True)
    data = prepare(spec, scratch)
    plan = make_plan(spec, Facts(data=data.facts))
    try:
        for number, stop in enumerate((*stops, 0), 1):
            loaded, preemption = load_model(spec, model, GPU, "unsloth", "16bit", plan.kept, None), Preemption()
            forwards = itertools.count(1)

            def count(*_: Any, last: int = stop, forwards: Any = forwards, asked: Any = preemption) -> None:
                if next(forwards) == last:
                    asked.request("a notice")

            loaded.model.get_base_model().register_forward_pre_hook(count)
            with acquire(store, "test", 60.0) as lease, Record(store, scratch).kept() as record:
                attempt = RunContext(spec, store, lease, scratch, record, preemption, number)
                try:
                    train(attempt, plan, loaded, data)
                    assert not stop
                except Preempted:
                    assert stop
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    lines = [json.loads(line) for line in (scratch / "metrics.jsonl").read_text().splitlines()]
    weights = {name: weight.clone() for name, weight in get_peft_model_state_dict(loaded.model).items()}
    return lines, weights, loaded


def steps(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "loss" in line]


def same_steps(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], rel: float) -> None:
    for one, other in zip(steps(ours), steps(theirs), strict=True):
        assert (one["step"], one["rows"]) == (other["step"], other["rows"])
        assert one["loss"] == pytest.approx(other["loss"], rel=rel)


def test_a_stage_has_the_highest_peak_of_its_steps_which_reset_it(model: Path, rows: Path, tmp_path: Path) -> None:
    lines, _, _ = trained(model, rows, tmp_path / "out")
    stage = json.loads((tmp_path / "out" / "status.json").read_text())["stages"]["train"]
    for name, of_steps in (("device_peak", "gpu_memory_peak_gb"), ("device_reserved", "gpu_memory_reserved_gb")):
        assert stage[name] / 1e9 > max(line[of_steps] for line in steps(lines)) - 0.001


def test_a_card_too_small_for_the_step_makes_it_in_parts(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    lines = [{"file_name": f"{n}.png", "caption": "There is a nodule. " * 800} for n in range(16)]
    for number, line in enumerate(lines):
        picture(number).save(rows / line["file_name"])
    (rows / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    # Rows that take much, beside the 60 MiB in which Triton times kernels for another number of them.
    training = {"per_device_train_batch_size": 8, "gradient_checkpointing": False, "max_length": 4096}
    trained(model, rows, tmp_path / "compiled", training=training)  # which takes memory of its own
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    whole, _, _ = trained(model, rows, tmp_path / "whole", training=training)
    of_eight = torch.cuda.max_memory_reserved()
    card = torch.cuda.get_device_properties(0).total_memory
    for share in (0.9, 0.8, 0.7, 0.6, 0.5):  # what takes memory whatever the rows is not known: less until it shows
        gc.collect()
        cap = share * of_eight / card
        capped, _, _ = trained(model, rows, tmp_path / f"capped-{share}", cap=cap, training=training)
        print(f"{share:.0%} of {of_eight / 1e6:.0f} MB: {[line['micro_batch'] for line in steps(capped)]} rows at once")
        same_steps(capped, whole, rel=0.01)
        if steps(capped)[-1]["micro_batch"] < 8:
            return
    pytest.fail("no card was too small for eight rows")


def test_a_card_that_others_share_is_taken_as_far_as_is_granted() -> None:
    device = find_device(has_torch=True, granted_gb=2)
    assert device.memory == 2e9
    try:
        keep_within(device)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(3 * 10**9, dtype=torch.uint8, device=GPU)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_stopped_in_a_step_and_resumed_it_is_the_run_that_was_never_stopped(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    """Within the noise of kernels that add up in any order, which the same run twice shows."""
    training = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "optim": "adamw_8bit"}
    whole, weights, _ = trained(model, rows, tmp_path / "whole", training=training)
    twice, again, _ = trained(model, rows, tmp_path / "twice", training=training)
    resumed, ours, _ = trained(model, rows, tmp_path / "resumed", stops=(4, 2), training=training)
    same_steps(resumed, whole, rel=0.01)

    def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
        return max(float((one[name] - other[name]).abs().max()) for name in other)

    def losses_apart(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
        return max(abs(a["loss"] - b["loss"]) for a, b in zip(steps(one), steps(other), strict=True))

    noise, difference = apart(again, weights), apart(ours, weights)
    said = f"losses {losses_apart(twice, whole):.2g} and {losses_apart(resumed, whole):.2g}"
    print(f"apart: the run again {noise:.3g}, resumed {difference:.3g}; {said}")
    moved = max(float(weight.abs().max()) for name, weight in weights.items() if "lora_B" in name)
    assert difference <= 2 * noise + 0.02 * moved


@pytest.mark.parametrize("weighted", [False, True])
def test_the_first_loss_is_that_of_the_rows(weighted: bool, model: Path, rows: Path, tmp_path: Path) -> None:
    """Prompts trained on too, and rows that count more or less: Unsloth's own count of tokens knows neither."""
    dataset = {"weight_column": "weight"} if weighted else {}
    training = {"train_on_responses_only": weighted, "max_steps": 1, "per_device_train_batch_size": 4}
    (line,), _, loaded = trained(model, rows, tmp_path / "out", training=training, dataset=dataset)
    fresh = load_model(job_spec(lora={"r": 4}), model, GPU, "unsloth", "16bit", "nothing", None)
    data = prepare(job_spec(dataset={"path": str(rows), "eval_fraction": 0}), tmp_path)
    chosen = [data.train[number] for number in line["rows"]]
    batch = Collator(loaded.processor, 2048, responses_only=weighted)(chosen)
    inputs = {name: tensor.cuda() for name, tensor in batch.items()}
    weights = [WEIGHT_OF[number % len(WEIGHT_OF)] if weighted else 1.0 for number in line["rows"]]
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        right = float(token_loss(fresh.model, inputs | {WEIGHTS: torch.tensor(weights, device=GPU)}, None))
    assert line["loss"] == pytest.approx(right, rel=0.01)


def test_measuring_while_it_trains_disturbs_nothing(model: Path, rows: Path, tmp_path: Path) -> None:
    undisturbed, _, _ = trained(model, rows, tmp_path / "undisturbed", dataset={"eval_path": str(rows)})
    evaluation = {"eval_steps": 1, "eval_samples": 2, "max_new_tokens": 4}
    lines, _, _ = trained(model, rows, tmp_path / "measured", dataset={"eval_path": str(rows)}, evaluation=evaluation)
    same_steps(lines, undisturbed, rel=0.01)
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    samples = [json.loads(line) for line in (tmp_path / "measured/evaluation/samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in samples] == [1, 1, 2, 2]
    assert all(line["generated"] for line in samples)
