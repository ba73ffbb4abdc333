"""What would not fit scratch is refused before it is fetched or unpacked: to try again would fetch as much again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from job.data.tables import read_table
from job.errors import SpecError
from job.stage_in import local_path
from job.store import open_store
from tests.conftest import Job
from tests.hub import serve

MB = 1_000_000


def test_a_prefix_that_scratch_has_no_room_for_is_not_fetched(bucket: str, mounted: Callable[[str, float], Path]):
    store, scratch = open_store(f"s3://{bucket}/rows"), mounted("scratch", 2 * MB)
    store.write("a.bin", bytes(MB))
    store.write("b.bin", bytes(MB + MB // 2))
    with pytest.raises(
        SpecError, match=rf"dataset.path: s3://{bucket}/rows takes 2.5 MB of {scratch}.*, and 2.0 MB are free"
    ):
        local_path(f"s3://{bucket}/rows", scratch, "dataset.path")
    assert not list(scratch.rglob("*.bin"))
    store.write("b.bin", bytes(MB // 2))
    assert {file.name for file in local_path(f"s3://{bucket}/rows", scratch, "dataset.path").glob("*.bin")} == {
        "a.bin",
        "b.bin",
    }


def test_a_base_of_the_hub_that_scratch_has_no_room_for_is_not_fetched(
    job: Job, tree: dict, demo: Path, tmp_path: Path
):
    tree["model"] = {"name_or_path": "lab/tiny", "revision": "main"}
    tree["dataset"] = {"path": str(demo / "data")}
    with serve() as hub:
        hub.add("models", "lab/tiny", demo / "base")
        settings = {"HF_ENDPOINT": hub.url, "JOB_SCRATCH_GB": "0.003"}
        result = job("run", JOB_SPEC=yaml.safe_dump(tree), **settings)
    assert result.returncode == 78, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("exit 78: model.name_or_path: lab/tiny takes 4.2 MB of ")
    assert last.endswith("point JOB_SCRATCH at a larger disk, or remove what is not needed there")
    assert not any("model.safetensors" in asked and asked.startswith("GET") for asked in hub.asked)


def test_parquet_that_scratch_has_no_room_for_is_told_as_such(tmp_path: Path, mounted: Callable[[str, float], Path]):
    from datasets import Dataset

    rows, scratch = tmp_path / "rows", mounted("scratch", 2 * MB)
    rows.mkdir()
    images = [os.urandom(100_000) for _ in range(60)]
    Dataset.from_dict({"image": images, "caption": ["a nodule"] * 60}).to_parquet(rows / "train.parquet")
    with pytest.raises(
        SpecError, match=r"dataset.path: .*rows is unpacked to .*as large as its 6.0 MB, and that disk is full"
    ):
        read_table([rows / "train.parquet"], scratch / "cache", "dataset.path")
