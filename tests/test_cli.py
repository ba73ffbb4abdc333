"""What a scheduler and the person behind it see when something is wrong: one sentence, the right code, nothing lost."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.conftest import Job, job_environment


def ending(result: Any) -> tuple[int, str]:
    return result.returncode, result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("", "exit 78: JOB_SPEC is empty"),
        ("model: {name: x}\n", "exit 78: the spec has 4 problems"),
        ("/no/such/file.yaml", "exit 78: spec: cannot read /no/such/file.yaml"),
    ],
)
def test_a_wrong_spec_ends_with_78(job: Job, command: str, spec: str, sentence: str):
    code, line = ending(job(command, JOB_SPEC=spec))
    assert code == 78
    assert line.startswith(sentence)


@pytest.fixture
def whole(tree: dict[str, Any], demo: Path) -> dict[str, Any]:
    """A spec that would run."""
    tree["model"]["name_or_path"] = str(demo / "base")
    tree["dataset"]["path"] = str(demo / "data")
    return tree


def test_a_missing_dataset_ends_with_78(job: Job, whole: dict[str, Any]):
    whole["dataset"]["path"] = "/no/such/data"
    code, line = ending(job("run", JOB_SPEC=yaml.safe_dump(whole)))
    assert (code, line) == (78, "exit 78: dataset.path: /no/such/data does not exist")


def test_corrupt_images_end_with_65_and_are_counted(job: Job, whole: dict[str, Any], tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"file_name": f"{n}.png", "caption": "a"} for n in range(3)]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("L", (8, 8)).save(data / "0.png")
    (data / "1.png").write_bytes(b"nothing")
    (data / "2.png").write_bytes(b"nothing")
    whole["dataset"]["path"] = str(data)
    code, line = ending(job("run", JOB_SPEC=yaml.safe_dump(whole)))
    assert code == 65
    assert "2 of 3 rows are bad, over max_bad_fraction 0.01: 2 × image of an unknown format (first: row 1)" in line
    kept = (tmp_path / "output" / "data" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(row)["row"] for row in kept] == [1, 2]


@pytest.mark.parametrize("content", [None, "{}", '{"model_type": "mllama", "quantization_config": {}}'])
def test_a_base_that_is_not_a_model_ends_with_78(job: Job, whole: dict[str, Any], tmp_path: Path, content: str | None):
    (tmp_path / "base").mkdir()
    if content is not None:
        (tmp_path / "base" / "config.json").write_text(content)
    whole["model"]["name_or_path"] = str(tmp_path / "base")
    code, line = ending(job("run", JOB_SPEC=yaml.safe_dump(whole)))
    assert code == 78
    assert "model.name_or_path" in line


def test_an_output_that_cannot_be_written_is_named(job: Job, whole: dict[str, Any], tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    whole["output"]["url"] = str(tmp_path / "file" / "output")
    code, line = ending(job("run", JOB_SPEC=yaml.safe_dump(whole)))
    assert code == 78
    assert str(tmp_path / "file") in line


def test_scratch_that_cannot_be_written_ends_with_77(job: Job, whole: dict[str, Any], tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    code, line = ending(job("run", JOB_SPEC=yaml.safe_dump(whole), JOB_SCRATCH=str(tmp_path / "file" / "s")))
    assert code == 77
    assert "set JOB_SCRATCH" in line


@pytest.mark.parametrize(
    ("name", "unit"),
    [("JOB_GRACE_SECONDS", "seconds"), ("JOB_LEASE_SECONDS", "seconds"), ("JOB_GPU_MEMORY_GB", "gigabytes")],
)
def test_a_variable_that_is_no_number_ends_with_78(job: Job, whole: dict[str, Any], name: str, unit: str):
    result = job("run", **{"JOB_SPEC": yaml.safe_dump(whole), name: "soon"})
    assert ending(result) == (78, f"exit 78: {name} is 'soon'; give a number of {unit} above 0")


@pytest.mark.parametrize("stderr", ["/dev/full", "a pipe that nobody reads"])
def test_a_log_that_takes_no_more_does_not_change_the_code(tmp_path: Path, stderr: str):
    """As on a cluster whose home folder is over its quota."""
    if stderr == "/dev/full":
        log = os.open(stderr, os.O_WRONLY)
    else:
        reader, log = os.pipe()
        os.close(reader)
    command = [sys.executable, "-m", "job", "run", "/no/such/spec.yaml"]
    ended = subprocess.run(command, env=job_environment(tmp_path), stderr=log, check=False, timeout=60)
    os.close(log)
    assert ended.returncode == 78


def test_a_broken_pipe_inside_a_job_is_no_success():
    """A worker of the loader that died raises it too."""
    code = "from job.cli import finish\ndef work(*_):\n raise BrokenPipeError(32, 'Broken pipe')\nfinish(work)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 70


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "a command is missing; see python -m job --help"),
        (("runn",), "No such command 'runn'"),
        (("run", "--resume"), "No such option"),
        (("run", "a", "b"), "Got unexpected extra argument (b); see python -m job run --help"),
    ],
)
def test_a_wrong_command_line_ends_with_78(job: Job, arguments: tuple[str, ...], reason: str):
    """Not with a code of its own, which some scheduler would try again."""
    code, line = ending(job(*arguments))
    assert (code, line.startswith("exit 78: command line: ")) == (78, True)
    assert reason in line


def test_help_is_no_error(job: Job):
    assert [job(*words, "--help").returncode for words in ((), ("run",))] == [0, 0]


BUG = """
from job.cli import finish
def read(row):
    raise ValueError(f"cannot read {row}")
def work(*_):
    try:
        read("Jane Doe, nodule")
    except ValueError as error:
        raise KeyError("Jane Doe, effusion") from error
finish(work)
"""


def test_a_bug_is_logged_with_its_places_and_without_what_it_says():
    """The message of an unforeseen error may hold the text of a row."""
    ended = subprocess.run([sys.executable, "-c", BUG], capture_output=True, text=True, check=False, timeout=60)
    assert ending(ended) == (70, "exit 70: a bug: KeyError")
    assert "in read" in ended.stderr
    assert "ValueError" in ended.stderr
    assert "Jane" not in ended.stderr


def test_a_package_that_is_missing_ends_with_78():
    code = "from job.cli import finish\ndef work(*_):\n import no_such_package\nfinish(work)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (ending(ended)[0], "the package no_such_package is not installed" in ended.stderr) == (78, True)


def test_who_has_seen_enough_of_what_is_shown_is_no_error(tmp_path: Path):
    (tmp_path / "status.json").write_text('{"state": "failed", "stage": "load", "exit_code": 65, "reason": "no"}')
    reader, shown = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "job", "status", str(tmp_path)]
    ended = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    os.close(shown)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_unsloth_without_a_gpu_ends_with_78(job: Job, whole: dict[str, Any]):
    whole["model"]["backend"] = "unsloth"
    code, line = ending(job("run", JOB_SPEC=yaml.safe_dump(whole)))
    assert code == 78
    assert "needs an NVIDIA GPU" in line


def test_check_plans_for_a_gpu_that_is_not_here(job: Job, whole: dict[str, Any]):
    plan = job("check", JOB_SPEC=yaml.safe_dump(whole), JOB_GPU_MEMORY_GB="24").stdout
    assert "device: a GPU of another machine, 24.0 GB" in plan
    assert "held in 16bit" in plan
    assert "this machine has no GPU: the plan is for one with as much memory as JOB_GPU_MEMORY_GB says" in plan
    assert "held in 32bit" in job("check", JOB_SPEC=yaml.safe_dump(whole)).stdout


def test_check_shows_what_is_learned_and_changes_nothing(job: Job, whole: dict[str, Any], tmp_path: Path):
    assert "⟦" not in job("check", JOB_SPEC=yaml.safe_dump(whole)).stdout.replace("⟦…⟧", "")
    result = job("check", "--example", JOB_SPEC=yaml.safe_dump(whole))
    assert result.returncode == 0, result.stderr
    assert "⟦" in result.stdout
    shown = result.stdout.replace("⟦…⟧", "").partition("⟦")[2].partition("⟧")[0]
    assert shown.endswith("<|im_end|>")
    assert "expert radiographer" not in shown
    assert not (tmp_path / "output").exists()


def test_check_hides_captions_when_privacy_says_so(job: Job, whole: dict[str, Any]):
    whole["privacy"] = {"report_images": False}
    result = job("check", JOB_SPEC=yaml.safe_dump(whole))
    assert "text not shown" in result.stdout
    assert "⟦" not in result.stdout.replace("⟦…⟧", "")


def test_the_schema_is_json_with_every_section(job: Job):
    schema = json.loads(job("schema").stdout)
    assert set(schema["properties"]) >= {"model", "lora", "dataset", "training", "checkpoint", "evaluation", "export"}


def test_check_data_fetches_and_looks_at_every_row(job: Job, whole: dict[str, Any], demo: Path, bucket: str):
    from job.store import open_store, upload_folder

    upload_folder(open_store(f"s3://{bucket}/d"), demo / "data", "rows")
    whole["dataset"] |= {"path": f"s3://{bucket}/d/rows", "group_column": "patient_id"}
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    result = job("check", "--data", JOB_SPEC=yaml.safe_dump(whole), **environment)
    assert result.returncode == 0, result.stderr
    assert (
        "data: 320 rows (image folder: it holds metadata.jsonl; answers in caption, images in file_name)"
        in result.stdout
    )
    assert "tokens per row: median" in result.stdout
