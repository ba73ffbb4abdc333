from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from job.errors import DataError
from job.evaluate import bootstrap, sums
from job.evaluate import compare as statistics
from job.evaluate.records import Comparison, Settings, from_json
from tests.evaluate.conftest import answers_of

FINDING = {"finding": SimpleNamespace(values=None, pattern=None)}


def compare(before: Any, after: Any, groups: Any = (), samples: int = 200) -> dict[str, Any]:
    settings = Settings(samples, 0.95, 3)
    return asdict(statistics.compare(answers_of(before), answers_of(after), FINDING, groups, settings))


def test_the_result_has_the_agreed_keys_and_is_read_again_from_json(make_rows: Callable[..., Any]) -> None:
    result = compare(make_rows(0.2), make_rows(0.9), ["sex"])
    assert asdict(from_json(Comparison, json.loads(json.dumps(result, allow_nan=False)))) == result
    entry = result["change"]["finding_accuracy"]
    assert entry["value"] == pytest.approx(
        result["after"]["finding_accuracy"]["value"] - result["before"]["finding_accuracy"]["value"], abs=2e-6
    )
    assert set(entry) == {"value", "low", "high", "n", "p", "moved"}
    assert set(result["after"]["rougeL"]) == {"value", "low", "high", "n"}
    assert result["settings"] | {"scorers": 0} == {
        "bootstrap_samples": 200,
        "confidence": 0.95,
        "seed": 3,
        "rows": 48,
        "units": 24,
        "scorers": 0,
    }


def test_every_value_lies_in_its_interval(make_rows: Callable[..., Any]) -> None:
    result = compare(make_rows(0.2), make_rows(0.9))
    for when in ("before", "after", "change"):
        assert {"rougeL", "bleu", "loss", "finding_accuracy"} <= result[when].keys()
        for name, entry in result[when].items():
            assert entry["low"] <= entry["value"] <= entry["high"], (when, name)


def test_an_accuracy_of_one_is_not_said_to_be_certain(make_rows: Callable[..., Any]) -> None:
    entry = compare(make_rows(1.0), make_rows(1.0))["after"]["finding_accuracy"]
    assert entry["value"] == entry["high"] == 1
    assert 0.8 < entry["low"] < 0.95


def test_nothing_changed_is_no_clear_change(make_rows: Callable[..., Any]) -> None:
    rows = make_rows(0.5)
    change = compare(rows, rows)["change"]
    assert {"rougeL", "bleu", "loss", "finding_accuracy"} <= change.keys()
    for name, entry in change.items():
        assert entry["value"] == 0, name
        assert entry["low"] <= 0 <= entry["high"], name
        assert entry["p"] == 1, name


def test_other_rows_after_than_before_are_refused(make_rows: Callable[..., Any]) -> None:
    rows = make_rows(0.5)
    for after in (rows[:-1], rows[::-1], []):
        with pytest.raises(DataError, match="the same held-out rows"):
            compare(rows, after)


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError):
        compare([], [])


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_very_few_rows_are_measured_without_a_warning(make_rows: Callable[..., Any], rows: int) -> None:
    result = compare(make_rows(0.2, rows), make_rows(0.9, rows), ["sex"])
    assert result["change"]["rougeL"]["n"] == rows
    json.dumps(result, allow_nan=False)


def test_rows_without_a_unit_are_units_of_their_own(make_rows: Callable[..., Any]) -> None:
    rows = [{**row, "unit": None} for row in make_rows(0.5)]
    assert compare(rows, rows)["settings"]["units"] == 48


def test_a_metric_that_no_row_has_is_left_out(make_rows: Callable[..., Any]) -> None:
    rows = [{**row, "loss": None, "labels": {}} for row in make_rows(0.5)]
    assert not {"loss", "perplexity", "finding_accuracy"} & set(compare(rows, rows)["change"])


def test_a_group_is_measured_as_if_it_were_alone(make_rows: Callable[..., Any]) -> None:
    before, after = make_rows(0.2), make_rows(0.9)
    group = compare(before, after, ["sex"])["groups"]["sex"]["F"]
    chosen = [index for index, row in enumerate(before) if row["groups"]["sex"] == "F"]
    alone = compare([before[index] for index in chosen], [after[index] for index in chosen])
    assert group["rows"] == len(chosen)
    assert {when: group[when] for when in ("before", "after", "change")} == {
        when: alone[when] for when in ("before", "after", "change")
    }


def test_a_group_of_few_rows_is_said_to_be_so_and_makes_no_gap(make_rows: Callable[..., Any]) -> None:
    rows = make_rows(0.9)
    for row in rows[:9]:
        row["groups"] = {"site": "Tiny"}
        row["generated"] = "nothing"
    result = compare(rows, rows, ["site"])
    assert [name for name, group in result["groups"]["site"].items() if group["too_few"]] == ["Tiny"]
    assert "Tiny" not in {result["gaps"]["site"]["rougeL"][end] for end in ("highest", "lowest")}


def test_a_group_that_the_model_fails_is_flagged(make_rows: Callable[..., Any]) -> None:
    rows = make_rows(1.0)
    for row in rows:
        if row["groups"]["site"] == "South":
            row["generated"] = "a nodule"
    gap = compare(rows, rows, ["site"])["gaps"]["site"]["rougeL"]
    assert gap["lowest"] == "South"
    assert gap["flagged"]
    assert gap["p"] < 0.01


def test_groups_that_mean_nothing_are_flagged_at_the_stated_rate() -> None:
    draw, runs, flagged = np.random.default_rng(0), 300, 0
    names = np.array(list("abcd") * 10)
    for seed in range(runs):
        right = sums.Sums(np.stack([draw.random(40) < 0.6, np.ones(40)], axis=-1), np.ones(40, bool), sums.ratio, True)
        gap = statistics._gap(bootstrap.pair(right, right), np.arange(40), names, Settings(200, 0.95, seed))
        assert gap is not None
        flagged += statistics._flagged({"x": {"y": gap}}, 0.05)["x"]["y"].flagged
    assert flagged / runs == pytest.approx(0.05, abs=0.035)


def test_of_many_groups_the_rare_ones_are_taken_together(make_rows: Callable[..., Any]) -> None:
    rows = make_rows(0.5, 100)
    for index, row in enumerate(rows):
        row["groups"] = {"city": f"city {min(index % 30, 19)}" if index % 5 else None}
    names = statistics.group_names(answers_of(rows), "city")
    assert len(set(names)) == statistics.MOST_GROUPS
    assert {statistics.OTHER, statistics.MISSING} <= set(names)


def test_always_answering_the_commonest_label_is_the_measure_of_accuracy(make_rows: Callable[..., Any]) -> None:
    rows = make_rows(0.5)
    label = compare(rows, rows)["labels"]["finding"]
    counts = [sum(row.values()) for row in label["confusion"]["after"].values()]
    assert sum(counts) == len(rows)
    assert label["commonest_share"] == max(counts) / len(rows)


def test_two_hundred_rows_and_a_thousand_resamples_take_seconds(make_rows: Callable[..., Any]) -> None:
    before, after = make_rows(0.2, 200), make_rows(0.9, 200)
    start = time.process_time()  # of this process alone: others on the machine do not count
    compare(before, after, ["sex", "site"], 1000)
    assert time.process_time() - start < 5


def test_measuring_and_reporting_need_no_torch() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'peft']))"
    rooms = "import job.evaluate.compare, job.report.page, job.report.model_card"
    subprocess.run([sys.executable, "-W", "error", "-c", f"{blocked}; {rooms}"], check=True)
