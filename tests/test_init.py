"""`job init` looks at data and writes a spec that `job check` accepts as it stands."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.config.environment import Environment
from job.config.loader import validate
from job.config.parsing import parse
from job.config.schema import JobSpec
from job.data.prepare import prepare
from job.errors import DataError, SpecError
from job.init import DEFAULT_MODEL, init, nobody
from tests.conftest import ROOT, Job, job_environment
from tests.data.public_sets import SETS, pictures, table

GIVEN = {"model": None, "answer": None, "output": None}
OF_SETS = {
    "SLAKE": {"image_column": "img_name", "instruction_column": "question", "eval_split": "test"},
    "ROCO": {"image_column": "id", "answer_column": "caption", "eval_split": "test"},
    "ROCOv2": {"image_column": "ID", "answer_column": "Caption"},
    "IU X-ray": {"join": "uid", "answer": "Findings: {findings}\nImpression: {impression}", "group_column": "uid"},
    "R2Gen": {"image_column": "image_path", "answer_column": "report", "eval_split": "test"},
    "MedPix": {"image_column": "image", "answer_column": "Description.Caption"},
    "PadChest": {"image_column": "ImageID", "answer_column": "Report", "group_column": "PatientID"},
    "COCO": {"image_column": "file_name", "answer_column": "caption", "eval_split": "validation"},
}


def made(data: Path, tmp_path: Path, **given: Any) -> JobSpec:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    text = init(str(data), GIVEN | given, nobody, scratch, Environment(scratch=scratch))
    return validate(parse(text))


@pytest.mark.parametrize("name", OF_SETS)
def test_columns_of_a_public_set_are_guessed(tmp_path: Path, name: str):
    """Every row of it can be used with the spec as it stands."""
    SETS[name].make(tmp_path / "set")
    spec = made(tmp_path / "set" / SETS[name].path, tmp_path)
    assert {field: getattr(spec.dataset, field) for field in OF_SETS[name]} == OF_SETS[name]
    data = prepare(spec, tmp_path / "scratch")
    assert (spec.evaluation.primary_metric == "exact_match") is (name == "SLAKE")
    assert (data.quarantined, data.facts.train > 0, data.facts.evaluation > 0) == ([], True, True)


def test_data_without_a_text_to_learn_need_a_column(tmp_path: Path):
    SETS["CheXpert"].make(tmp_path / "set")
    with pytest.raises(
        DataError, match=r"no column looks like text to learn; name one with --answer; .* Path, Sex, AP/PA"
    ):
        made(tmp_path / "set", tmp_path)
    with pytest.raises(DataError, match=r"no column sexx; did you mean Sex\?"):
        made(tmp_path / "set", tmp_path, answer="sexx")
    assert made(tmp_path / "set", tmp_path, answer="Sex").dataset.answer_column == "Sex"


def test_images_that_are_not_there_are_no_images(tmp_path: Path):
    table(tmp_path / "set" / "rows.csv", [{"image": f"{n}.png", "caption": "clear"} for n in range(4)])
    with pytest.raises(DataError, match="no column of .* holds images, or names of files below it: image, caption"):
        made(tmp_path / "set", tmp_path)


def test_conversations_and_several_images_are_seen(tmp_path: Path):
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Clear lungs."}]
    pictures(tmp_path / "set", ["a.png", "b.png", "c.png"])
    rows = [{"messages": turns, "image": f"{name}.png", "subject": name} for name in "abc"]
    (tmp_path / "set" / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    spec = made(tmp_path / "set", tmp_path)
    assert (spec.dataset.messages_column, spec.dataset.group_column) == ("messages", "subject")
    table(
        tmp_path / "two" / "rows.csv", [{"front": "a.png", "side": "b.png", "report": f"Clear {n}."} for n in range(4)]
    )
    pictures(tmp_path / "two", ["a.png", "b.png"])
    assert made(tmp_path / "two", tmp_path).dataset.image_column == ["front", "side"]


def test_data_elsewhere_are_named(tmp_path: Path):
    with pytest.raises(SpecError, match="DATA: s3://bucket/chest does not exist on this machine"):
        init("s3://bucket/chest", GIVEN, nobody, tmp_path, Environment())


def test_a_person_on_a_terminal_is_asked_and_the_spec_passes_check(job: Job, tmp_path: Path, demo: Path):
    """Guesses are defaults, and a name that does not exist is asked for again. Torch is not imported."""
    ours, theirs = pty.openpty()
    code = """if True:
        import sys
        from job.__main__ import main
        from job.runtime import exit
        end = exit.end
        exit.end = lambda *ending: (print("torch" in sys.modules), end(*ending))
        main()"""
    command = [sys.executable, "-c", code, "init", str(demo / "data")]
    environment = job_environment(tmp_path, PYTHONPATH=str(ROOT))
    asked = subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=tmp_path, text=True
    )
    os.write(ours, f"\nfindign\n\n\nWhat is it?\n\n{demo / 'base'}\n\n".encode())
    said, questions = asked.communicate(timeout=120)
    assert asked.returncode == 0, questions
    assert (said.splitlines()[0], said.splitlines()[-1]) == ("spec.yaml", "False")
    assert "image folder: it holds metadata.jsonl; its columns: file_name, caption, finding" in questions
    assert "no findign; did you mean finding?" in questions
    text = (tmp_path / "spec.yaml").read_text()
    (labels,) = (line for line in text.splitlines() if "# labels: " in line)
    assert ("finding: {column: finding}" in labels, "side: " in labels, "sex" in labels) == (True, True, False)
    spec = validate(parse(text))
    assert (spec.dataset.answer_column, spec.dataset.instruction) == ("caption", "What is it?")
    assert (spec.dataset.group_column, spec.output.url) == ("patient_id", str(tmp_path / "runs" / "data-1"))
    checked = job("check", str(tmp_path / "spec.yaml"), JOB__DATASET__MAX_ROWS="40")
    assert checked.returncode == 0, checked.stderr
    again = job("init", str(demo / "data"), "--to", str(tmp_path / "spec.yaml"))
    assert again.returncode == 78
    assert "spec.yaml exists, and is not overwritten; name another file" in again.stderr
    assert (tmp_path / "spec.yaml").read_text() == text


def test_the_page_on_the_first_model_shows_what_is_written(tmp_path: Path):
    data = tmp_path / "chest"
    pictures(data, [f"{n}.png" for n in range(4)])
    table(data / "train.csv", [{"image": f"{n}.png", "report": f"Clear {n}.", "patient_id": n} for n in range(4)])
    spec = made(data, tmp_path, model="/models/qwen3-vl-8b", output="/runs/chest-1").model_dump()
    page = (ROOT / "docs" / "first-model.md").read_text()
    (shown,) = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    shown["dataset"]["path"] = str(data)
    assert spec == validate(shown).model_dump()


def test_the_page_on_models_begins_with_the_default():
    page = (ROOT / "docs" / "choosing-a-model.md").read_text()
    assert re.findall(r"`([\w.-]+/[\w.-]+)`", page)[0] == DEFAULT_MODEL
