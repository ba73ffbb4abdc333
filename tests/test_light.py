"""The light half works where none of the training libraries is installed: a login node, a laptop.

It is the wheel, installed by pip beside the packages that it requires without an extra, and away from the checkout.
"""

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from tests.conftest import ROOT, Job

PURE = Path(sysconfig.get_path("purelib"))


def required(name: str, found: set[str]) -> set[str]:
    """The names of a distribution's requirements without extras, and theirs."""
    for line in importlib.metadata.requires(name) or ():
        wanted = Requirement(line)
        if (wanted.marker is None or wanted.marker.evaluate({"extra": ""})) and wanted.name not in found:
            found.add(wanted.name)
            required(wanted.name, found)
    return found


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which pip installed the wheel, with links to what it requires."""
    folder = tmp_path_factory.mktemp("light")
    source, packages = folder / "source", folder / "packages"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "job", "k8s", "slurm"):
        (source / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    for command in (
        ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source],
        ["install", "-q", "--no-deps", "--no-index", "--find-links", folder, "--target", packages, "vision-lora-job"],
    ):
        done = subprocess.run([*pip, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    for name in required("vision-lora-job", set()):
        for file in importlib.metadata.files(name) or ():
            if (top := file.parts[0]) != ".." and not (packages / top).exists():
                (packages / top).symlink_to(PURE / top)
    return packages


@pytest.fixture
def light(packages: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python with the light dependencies and nothing else."""

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {"PYTHONPATH": str(packages), "PATH": os.environ["PATH"], "JOB_SCRATCH": str(tmp_path / "s")}
        command = [sys.executable, "-S", *arguments]
        return subprocess.run(
            command, env=environment | more, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60
        )

    return run


def test_the_wheel_is_whole(light, packages: Path, tree: dict[str, Any], job: Job):
    """It has its templates, which are links in a checkout, and knows its version."""
    for template in ("report/page.html", "report/page.md", "report/model_card.md", "py.typed"):
        assert (packages / "job" / template).exists()
    tree |= {"model": {"name_or_path": "s3://b/base"}, "dataset": {"path": "s3://b/d"}, "output": {"url": "s3://b/o"}}
    image = ("--image", "registry.example.com/vision-lora-job:0.2.0")
    for arguments in (["kubernetes", yaml.safe_dump(tree), *image, "--with", "spot"], ["slurm", yaml.safe_dump(tree)]):
        installed = light("-m", "job", "render", *arguments)
        assert installed.returncode == 0, installed.stderr
        assert installed.stdout == job("render", *arguments).stdout
    assert importlib.metadata.version("vision-lora-job") in light("-m", "job", "--version").stdout


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
