"""benchmarks/whole_job.py: the whole job, stopped and killed on the way, on a tiny model; and its arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import whole_job_figures as figures
from whole_job_figures import Attempt

ROOT = Path(__file__).parents[1]


def test_a_job_that_is_stopped_and_killed_on_the_way_ends_published(tmp_path: Path, tiny: Callable[..., Path]):
    recorded = (ROOT / "benchmarks" / "results.jsonl").read_bytes()
    given = ["qwen2_5_vl", "--size", "tiny", "--rows", "24", "--no-uncut", "--model", str(tiny("qwen2_5_vl"))]
    command = [sys.executable, "benchmarks/whole_job.py", *given, "--folder", str(tmp_path)]
    environment = os.environ | {"JOB__EVALUATION__MAX_NEW_TOKENS": "8", "JOB__EVALUATION__EXPLAINED_ROWS": "0"}
    environment["JOB__DATASET__EVAL_ROWS"] = "3"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ends published" in done.stdout
    result = json.loads((tmp_path / "output" / "RESULT.json").read_text())
    assert (result["lineage"]["attempts"], result["steps"]) == (3, 9)
    assert {"load", "train", "export"} <= result["lineage"]["stages"].keys()
    assert (ROOT / "benchmarks" / "results.jsonl").read_bytes() == recorded


def start(name: str, began: float, first: float, last: float, ended: float, steps: range, **stages: float) -> Attempt:
    lines = [{"step": step, "step_seconds": 2.0, "loss": 1.0 + step, "rows": [step]} for step in steps]
    lines[0]["step_seconds"] = 7.0
    made = {f"evaluate {when}": {"seconds": seconds} for when, seconds in stages.items()}
    resumed = steps[0] - 1
    return Attempt(name, began, resumed, first, last, last + 1, ended, 75, lines, made)


@pytest.fixture
def attempts() -> list[Attempt]:
    """30 steps of 2 s. A first start of 40 s, 15 of them measuring; restarts of 22 s; a notice that costs 6 s."""
    return [
        start("notice", 0, 40, 58, 64, range(1, 11), before=15),
        start("kill", 100, 122, 140, 141, range(11, 21)),
        start("end", 200, 222, 244, 320, range(19, 31), after=30),
    ]


def test_goodput_counts_from_each_start_to_its_end_without_measuring(attempts: list[Attempt]):
    assert figures.goodput(attempts, 30) == pytest.approx(30 * 2 / (64 + 41 + 44 - 15))


def test_projected_goodput_has_one_cold_start_and_two_notices(attempts: list[Attempt]):
    share, seconds = figures.projected(attempts)
    assert seconds == pytest.approx(742 * 2 + (40 - 15 - 2) + 2 * ((22 - 2) + 6))
    assert share == pytest.approx(742 * 2 / seconds)


def test_a_step_that_compiles_again_is_a_cost_of_its_start(attempts: list[Attempt]):
    attempts[1].lines[5]["step_seconds"] = 22.0
    _, seconds = figures.projected(attempts)
    assert seconds == pytest.approx(742 * 2 + (40 - 15 - 2) + 2 * ((22 - 2) + 20 / 2 + 6))


def test_what_is_not_training_is_taken_to_200_rows_by_batches_of_16(attempts: list[Attempt]):
    other = 13 * (15 + 30) + (320 - 244 - 30)
    assert figures.not_training(attempts, 10) == pytest.approx(other / (other + figures.projected(attempts)[1]))


def test_the_stage_furthest_from_what_was_foreseen_is_told(attempts: list[Attempt]):
    end = attempts[-1]
    end.stages = {
        "train": {"seconds": 1.0, "device_peak": 31e9},
        "export": {"seconds": 1.0, "device_peak": 43e9},
        "evaluate after": {"seconds": 30.0},
    }
    end.foreseen = {"train": {"device": 32e9}, "export": {"device": 25e9}}
    result = {"steps": 30, "gate": {"token_agreement": 1.0}}
    found = {each.case: each for each in figures.figures(attempts, result, 10, None, published=True)}
    furthest = found["device over what was foreseen, furthest"]
    assert (furthest.value, furthest.meets, furthest.detail) == (1.72, False, "export")
    assert found["stage export"].detail == "device 43.00 GB (25.00 foreseen)"


def test_losses_are_compared_step_by_step(attempts: list[Attempt]):
    uncut: list[dict[str, Any]] = attempts[0].lines
    mine = [line | {"loss": line["loss"] * (1.01 if line["step"] == 4 else 1.0)} for line in uncut]
    assert figures.apart(mine, uncut) == (pytest.approx(0.01), [])
    assert figures.apart(mine[1:], uncut)[1]
