"""What a run leaves for others to read has the keys, the order and the values that earlier versions gave it (`stored/`)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.data import Data
from job.data.facts import DataFacts
from job.errors import DataError
from job.evaluate import answer_cache
from job.evaluate.records import Answer, Comparison, from_json
from job.evaluate.stage import compare, jsonl, stored_rows
from job.export.gain import Smaller
from job.export.gate import Verdict
from job.export.stage import Exported
from job.layout import FACTS_KEY, METRICS_KEY, NUMBERS_KEY, RESULT_KEY, answers_key
from job.planning.facts import Device, Facts
from job.planning.plan import Plan
from job.planning.stage_in import StagedIn
from job.publish import publish
from job.report.contents import Contents
from job.report.model_card import render
from job.report.rebuild import rebuild, stored_contents
from job.runtime.preemption import Preemption
from job.runtime.status import Record
from job.store import OwnedStore, Store, check_writable, open_store
from job.store.lease import acquire
from tests.evaluate.conftest import evaluated
from tests.tiny import job_spec, row

STORED = Path(__file__).with_name("stored")
KEYS = (METRICS_KEY, FACTS_KEY, RESULT_KEY, answers_key("before"), answers_key("after"))
VARYING = {
    "spec_digest",
    "result_digest",
    "published",
    "written",
    "packages",
    "package_lock_sha256",
    "scorers",
    "stages",
    "seconds",
    "files",
}
"""What differs from run to run, or between machines."""


class Rows(list[dict[str, Any]]):
    def with_format(self, _: None) -> dict[str, list[int]]:
        return {"_row": [int(each["id"].removeprefix("row-")) for each in self]}


def rows_and_answers(store: Store, share_known: float, *, wordy: bool) -> tuple[Rows, Any]:
    """Held-out rows, and the answers to them as a cache gives them back."""
    made = evaluated(share_known, 24, wordy=wordy)
    own = ("reference", "labels", "groups", "unit")
    rows = Rows(row(number) | {name: each[name] for name in own} for number, each in enumerate(made))
    lines = [
        {"row": held.digest} | {name: each.get(name) for name in answer_cache.MADE}
        for held, each in zip(answer_cache.held(rows), made, strict=True)
    ]
    store.write("cache.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    found, _ = answer_cache.recall([store], "cache.jsonl", answer_cache.held(rows))
    written = store.read("cache.jsonl")
    answer_cache.keep([store], "cache.jsonl", answer_cache.held(rows), found)
    assert store.read("cache.jsonl") == written
    return rows, found


def published(tmp_path: Path) -> Store:
    """The output of a run of made-up answers."""
    spec = job_spec(
        name="chest captions",
        lora={"init_adapter": "s3://bucket/adapter"},
        evaluation={
            "labels": {"finding": {"column": "finding"}, "side": {"column": "side", "pattern": r"in the (\w+) zone"}},
            "groups": ["sex"],
            "bootstrap_samples": 100,
            "require": {"rougeL": {"min_change": -1}},
        },
        privacy={"report_images": False},
    )
    for name, file in (("base", "config.json"), ("adapter", "adapter_model.safetensors"), ("cache", "none")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    cache, inner = open_store(str(tmp_path / "cache")), open_store(str(tmp_path / "output"))
    store = OwnedStore(inner)
    rows, before = rows_and_answers(cache, 0.2, wordy=False)
    after = rows_and_answers(cache, 0.9, wordy=True)[1]
    values = {"finding": ["effusion", "fracture", "nodule", "pneumothorax"], "side": ["left", "right"]}
    told = "Describe what you see."
    rows_facts = DataFacts(
        rows=140, source="a table", train=112, evaluation=28, train_sha256="ab" * 32, instruction=told
    )
    data: Any = Data([], rows, [], [], rows_facts, values)  # type: ignore[arg-type]
    facts = Facts(device=Device("cuda", "NVIDIA H200", 1))
    plan = Plan((), 20, 1, 8, 1, "16bit", None, groups={"vision/attention": 120_000})  # type: ignore[arg-type]
    numbers = [number / 1000 for number in range(11)]
    verdict = Verdict(4, 120, *numbers, weights={"language": {"adapted": 14, "change": 0.01}}, compared=14, wrong=[])
    with acquire(inner, "test", 60) as lease:
        store.hold(lease, check_writable(store))
        store.take_up()
        record = Record(store, tmp_path)
        record.update(step=20, taken_step=10, foreseen={"device_memory": 1})
        record.numbers(step=1, loss=2.5)
        environment = SimpleNamespace(image_digest=None, price_per_hour="3.6")
        ctx: Any = SimpleNamespace(
            spec=spec,
            store=store,
            lease=lease,
            record=record,
            preemption=Preemption(),
            number=2,
            environment=environment,
        )
        for when, answers in (("before", before), ("after", after)):
            store.write(answers_key(when), jsonl(answers, "run"))
        results = compare(ctx, data, before, after)
        staged = StagedIn(facts, data, tmp_path / "base", tmp_path / "adapter", "transformers")
        exported = Exported(
            {"adapter": tmp_path / "adapter"}, {}, verdict, {"merged_fp8": Smaller(1.25, {"loss": 0.95})}
        )
        publish(ctx, plan, staged, results, exported)
    return inner


def without_varying(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: None if name in VARYING else without_varying(value) for name, value in tree.items()}
    return tree


def canonical(key: str, data: bytes) -> str:
    if key.endswith(".jsonl"):
        return data.decode()
    assert data.decode() == json.dumps(json.loads(data), indent=1)
    return json.dumps(without_varying(json.loads(data)), indent=1) + "\n"


@pytest.mark.parametrize("key", KEYS)
def test_what_is_stored_is_what_earlier_versions_stored(key: str, output: Store) -> None:
    assert canonical(key, output.read(key)) == (STORED / Path(key).name).read_text()


@pytest.mark.parametrize(("key", "kind"), [(METRICS_KEY, Comparison), (FACTS_KEY, Contents)])
def test_what_earlier_versions_stored_is_read_without_a_loss(key: str, kind: type[Any]) -> None:
    text = (STORED / Path(key).name).read_text()
    record = from_json(kind, json.loads(text))
    tree = record.to_json() if isinstance(record, Contents) else asdict(record)
    assert without_varying(tree) == json.loads(text)
    assert json.dumps(without_varying(tree), indent=1) + "\n" == text


def test_answers_of_earlier_versions_are_read_without_a_loss(output: Store) -> None:
    text = output.read(answers_key("after"))
    assert jsonl(stored_rows(output, answers_key("after"), Answer, "run"), "run") == text


def test_a_key_that_is_missing_null_or_unknown_stops_no_report(output: Store, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    metrics = json.loads(output.read(METRICS_KEY))
    for when in ("before", "after"):
        store.write(answers_key(when), output.read(answers_key(when)))
    for kept in ({}, {"lineage": None, "base": {}, "gate": {"other": [1]}, "other": 1}):
        for missing in metrics.keys() - {"before", "after"}:
            store.write(FACTS_KEY, json.dumps(kept).encode())
            store.write(METRICS_KEY, json.dumps({**metrics, missing: None, "other": 1}).encode())
            assert rebuild(store).endswith("</html>\n")
            assert "A LoRA adapter for a base model that was not recorded" in render(stored_contents(store))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return published(tmp_path_factory.mktemp("published"))


@pytest.mark.parametrize("key", [answers_key("after"), NUMBERS_KEY, METRICS_KEY])
@pytest.mark.parametrize("text", ['{"before": 3', '{"before": 3}\n[1]', '{"change": 3, "before": {"values": 3}}\n3'])
def test_a_damaged_file_is_named(output: Store, tmp_path: Path, key: str, text: str) -> None:
    copy = open_store(str(tmp_path / "copy"))
    for entry in output.list():
        copy.write(entry.key, output.read(entry.key))
    copy.write(key, (text if key != METRICS_KEY else '{"before": 3}').encode())
    with pytest.raises(DataError, match=rf"{key} is not as a job wrote it; copy the output again"):
        stored_contents(copy)
