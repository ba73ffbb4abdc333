"""`job check` of a base that is elsewhere: the same plan as of one that is here, and some kilobytes fetched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.store import open_store, upload_folder
from tests.conftest import Job
from tests.hub import Hub, serve


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve() as served:
        yield served


@pytest.fixture
def whole(tree: dict[str, Any], demo: Path) -> dict[str, Any]:
    tree["model"] = {"name_or_path": str(demo / "base")}
    tree["dataset"] = {"path": str(demo / "data"), "eval_fraction": 0.2, "group_column": "patient_id"}
    return tree


def checked(job: Job, tree: dict[str, Any], base: str, **environment: str) -> list[str]:
    """What `check` says, but for the base's name and for what is free here now."""
    settings = {name: value for name, value in os.environ.items() if name.startswith("AWS_")} | environment
    tree["model"] = {"name_or_path": base, "revision": "main"}
    result = job("check", "--example", JOB_SPEC=yaml.safe_dump(tree), **settings)
    assert result.returncode == 0, result.stderr
    return [line for line in result.stdout.replace(base, "BASE").splitlines() if "  free here" not in line]


def without_needs(plan: list[str]) -> list[str]:
    begins = next(number for number, line in enumerate(plan) if line.startswith("needs"))
    return plan[:begins] + plan[begins + 8 :]


def fetched(plan: list[str]) -> float:
    """Megabytes that stage in needs on scratch."""
    (line,) = [line for line in plan if line.startswith("  stage in") and line.endswith("B")]
    return float(line.split()[4])


def test_a_base_that_is_elsewhere_is_planned_as_one_that_is_here(
    job: Job, whole: dict[str, Any], demo: Path, bucket: str, hub: Hub, tmp_path: Path
) -> None:
    base = shutil.copytree(demo / "base", tmp_path / "base")
    upload_folder(open_store(f"s3://{bucket}/models"), base, "tiny")
    hub.add("models", "lab/tiny", base, gated=True)
    plan = checked(job, whole, str(base))
    assert any(line.startswith("LoRA: ") for line in plan)
    assert any("⟦" in line for line in plan)
    size = sum(file.stat().st_size for file in base.iterdir()) / 1e6
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token}
    for elsewhere, variables in ((f"s3://{bucket}/models/tiny", {}), ("lab/tiny", settings)):
        seen = checked(job, whole, elsewhere, **variables)
        assert without_needs(seen) == without_needs(plan)
        assert fetched(seen) - fetched(plan) == pytest.approx(1.1 * size, abs=0.1)
    made = list((tmp_path / "scratch" / "glimpses").rglob("*.safetensors"))
    assert [file.stat().st_size for file in made] == [(base / "model.safetensors").stat().st_size] * 2
    assert all(512 * file.stat().st_blocks < file.stat().st_size / 4 for file in made)


def test_a_base_that_may_not_be_seen_yet_is_a_warning(job: Job, whole: dict[str, Any], demo: Path, hub: Hub) -> None:
    hub.add("models", "lab/gated", demo / "base", gated=True)
    said = checked(job, whole, "lab/gated", HF_ENDPOINT=hub.url)[-1]
    assert said.startswith("warning: model.name_or_path: BASE is gated; accept its terms at")
    assert said.endswith("and set HF_TOKEN; sizes are known after stage in")


@pytest.mark.parametrize(
    ("field", "name", "code", "says"),
    [
        ("model.name_or_path", "lab/none", 78, "and the hub has no model of that name that this token may see"),
        ("model.name_or_path", "s3://{bucket}/none", 78, "model.name_or_path: there is nothing under s3://"),
        ("model.name_or_path", "s3://{bucket}/rows", 78, "holds no config.json, so it is not a model"),
        ("dataset.path", "s3://{bucket}/none", 78, "dataset.path: there is nothing under s3://"),
        ("lora.init_adapter", "s3://{bucket}/none", 78, "lora.init_adapter: there is nothing under s3://"),
    ],
)
def test_what_is_nowhere_is_refused(
    job: Job, whole: dict[str, Any], bucket: str, hub: Hub, field: str, name: str, code: int, says: str
) -> None:
    open_store(f"s3://{bucket}/rows").write("metadata.jsonl", b"")
    section, key = field.split(".")
    whole[section] = whole.get(section, {}) | {key: name.format(bucket=bucket)}
    settings = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    settings |= {"HF_ENDPOINT": hub.url} if name == "lab/none" else {}
    result = job("check", JOB_SPEC=yaml.safe_dump(whole), **settings)
    assert result.returncode == code, result.stderr
    assert says in result.stderr.splitlines()[-1]
