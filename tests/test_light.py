"""The light half works where none of the training libraries is installed: a login node, a laptop."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

LIGHT = (
    *(
        "click",
        "pydantic",
        "pydantic_core",
        "annotated_types",
        "typing_extensions.py",
        "typing_inspection",
        "yaml",
        "regex",
    ),
    *("_yaml", "boto3", "botocore", "s3transfer", "jmespath", "dateutil", "six.py", "urllib3"),
    "google_crc32c",
)


@pytest.fixture
def light(tmp_path: Path):
    """Run Python with the light dependencies and nothing else."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in LIGHT:
        found = Path(sysconfig.get_path("purelib")) / name
        if found.exists():
            (packages / name).symlink_to(found)
    (packages / "job").symlink_to(ROOT / "job")

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {"PYTHONPATH": str(packages), "PATH": os.environ["PATH"], "JOB_SCRATCH": str(tmp_path / "s")}
        command = [sys.executable, "-S", *arguments]
        return subprocess.run(
            command, env=environment | more, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60
        )

    return run


def test_spec_plan_store_checkpoint_and_command_line_import(light):
    rooms = "job.config.schema, job.config.loader, job.store, job.checkpoint, job.output.describe, job.output.ownership"
    stages = "job.planning.plan, job.planning.survey, job.cli, job.render, job.runtime.prometheus, job.run"
    assert light("-c", f"import {rooms}, {stages}").stderr == ""


def test_check_prints_the_plan_and_says_what_it_could_not_see(light, tree: dict[str, Any]):
    tree["model"]["name_or_path"] = "unsloth/Llama-3.2-11B-Vision-Instruct"
    result = light("-m", "job", "check", yaml.safe_dump(tree))
    assert result.returncode == 0, result.stderr
    assert "train            do" in result.stdout
    assert "the data was not validated: install the train extra" in result.stdout
    assert "sizes are known after stage in" in result.stdout


def test_check_counts_parameters_of_a_local_base_without_torch(light, tree: dict[str, Any], demo: Path):
    tree["model"]["name_or_path"] = str(demo / "base")
    result = light("-m", "job", "check", yaml.safe_dump(tree))
    assert "trainable parameters" in result.stdout
    assert "vision/attention" in result.stdout


def test_help_of_every_command_is_there(light):
    for command in ("run", "check", "predict", "report", "prefetch"):
        assert f"job {command} [OPTIONS]" in light("-m", "job", command, "--help").stdout


def test_status_and_schema_work(light, tmp_path: Path):
    assert light("-m", "job", "schema").returncode == 0
    result = light("-m", "job", "status", str(tmp_path / "nothing"))
    assert (result.returncode, "holds no job" in result.stderr) == (65, True)
