"""Public sets are read as their authors publish them: a spec names the folder and the columns, and no file is moved."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.config.environment import Environment
from job.config.loader import validate
from job.config.schema import RADIOGRAPHER
from job.data import Row
from job.data.prepare import prepare
from job.look import look
from tests.conftest import ROOT, Job
from tests.data.public_sets import SETS, Published

ALL = os.environ.get("PUBLIC_SETS") == "all"
"""Set by `make public-sets`; the suite has whole jobs on two sets."""


def spec_of(tree: dict[str, Any], folder: Path, published: Published) -> dict[str, Any]:
    """Writes the set into `folder`, and returns the spec of a job on it."""
    published.make(folder)
    paths = {"path": published.path, "eval_path": published.dataset.get("eval_path")}
    named = {field: str(folder / path) for field, path in paths.items() if path}
    return tree | {"dataset": published.dataset | named}


def asked(row: Row) -> str:
    return "".join(part.get("text", "") for part in row["messages"][0]["content"])


@pytest.mark.parametrize("name", SETS)
def test_a_public_set_is_read_without_moving_a_file(tree: dict[str, Any], tmp_path: Path, name: str):
    published = SETS[name]
    data = prepare(validate(spec_of(tree, tmp_path / "set", published)), tmp_path / "scratch")
    assert data.quarantined == []
    assert published.read in data.facts.source
    sides = ([*data.train], [*data.evaluation])
    rows = [row for side in sides for row in side]
    assert tuple(map(len, sides)) == published.rows
    assert sorted({len(row["images"]) for row in rows}) == list(published.images)
    question, answer = published.first
    first = next(row for row in rows if row["id"] == "row-0")
    assert (asked(first), first["reference"]) == (question or RADIOGRAPHER, answer)


@pytest.mark.parametrize("name", SETS)
def test_a_page_shows_its_questions_and_answers(
    tree: dict[str, Any], tmp_path: Path, tiny: Callable[..., Path], name: str
):
    published = SETS[name]
    made = spec_of(tree, tmp_path / "set", published) | {"model": {"name_or_path": str(tiny("qwen2_5_vl"))}}
    page = html.unescape(look(validate(made), tmp_path / "scratch", Environment(), 50))
    question, answer = published.first
    for text in (question or RADIOGRAPHER, answer):
        assert all(line in page for line in text.split("\n"))
    assert published.read in page


@pytest.mark.parametrize("name", SETS if ALL else ("VQA-RAD", "IU X-ray"))
def test_a_whole_job_runs_on_it(tree: dict[str, Any], tmp_path: Path, tiny: Callable[..., Path], job: Job, name: str):
    fields = {"groups": ["answer_type"]} if name == "VQA-RAD" else {}
    made = spec_of(tree, tmp_path / "set", SETS[name]) | {
        "model": {"name_or_path": str(tiny("qwen2_5_vl"))},
        "lora": {"r": 2},
        "training": {"max_steps": 2},
        "evaluation": {"max_new_tokens": 3, **fields},
    }
    done = job("run", JOB_SPEC=yaml.safe_dump(made))
    assert done.returncode == 0, done.stderr
    output = tmp_path / "output"
    result = json.loads((output / "RESULT.json").read_text())
    assert result["metrics"]["after"]["rougeL"]["n"] == SETS[name].rows[1]
    answers = [json.loads(line) for line in (output / "evaluation" / "after.jsonl").read_text().splitlines()]
    assert len(answers) == SETS[name].rows[1]
    if fields:
        assert {row["groups"]["answer_type"] for row in answers} == {"CLOSED", "OPEN"}
        metrics = json.loads((output / "evaluation" / "metrics.json").read_text())
        apart = metrics["groups"]["answer_type"]
        assert sum(apart[kind]["after"]["exact_match"]["n"] for kind in ("CLOSED", "OPEN")) == len(answers)
    page = html.unescape((output / "report.html").read_text())
    if "instruction_column" in SETS[name].dataset:
        assert all(row["question"].startswith(("Is there an effusion", "Which organ")) for row in answers)
        assert f"<dt>Question</dt><dd>{answers[0]['question']}</dd>" in page
        asked = job("predict", str(output), str(next((tmp_path / "set").rglob("*.jpg"))))
        assert (asked.returncode, "--instruction is missing: each row of" in asked.stderr) == (78, True)


@pytest.mark.parametrize("name", sorted(set(SETS) - {"VQA-RAD", "COCO, one file"}))
def test_the_documents_say_what_a_spec_needs(name: str):
    lines = [line.replace('"', "") for line in (ROOT / "docs" / "data.md").read_text().splitlines()]
    said = SETS[name].dataset | ({} if SETS[name].path == "." else {"path": SETS[name].path})
    wanted = [f"{field}: {value}".replace("\n", "\\n") for field, value in said.items() if field != "eval_fraction"]
    assert any(all(f"`{each}`" in line for each in wanted) for line in lines if line.startswith("| ")), wanted
