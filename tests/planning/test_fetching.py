"""What would not fit scratch is refused before it is fetched or unpacked: to try again would fetch as much again."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.config.loader import validate
from job.config.schema import ModelSpec
from job.data.archives import unpacked
from job.data.prepare import prepare
from job.data.tables import read_table
from job.errors import NotAllowed, SpecError
from job.model.base_model import weight_files
from job.planning.remote_headers import glimpse
from job.runtime.staging import local_path
from job.store import open_store
from tests.conftest import Job
from tests.data.test_data import png
from tests.data.test_sources import shard
from tests.hub import serve
from tests.s3 import address
from tests.store.proxy import Proxy

MB = 1_000_000
FIELDS = ("dataset.path", "dataset.eval_path")


def test_a_prefix_that_scratch_has_no_room_for_is_not_fetched(bucket: str, mounted: Callable[[str, float], Path]):
    store, scratch = open_store(f"s3://{bucket}/rows"), mounted("scratch", 2 * MB)
    store.write("a.bin", bytes(MB))
    store.write("b.bin", bytes(MB + MB // 2))
    with pytest.raises(
        SpecError, match=rf"dataset.path: s3://{bucket}/rows needs 2.5 MB in {scratch}.*, and 2.0 MB are free"
    ):
        local_path(f"s3://{bucket}/rows", scratch, "dataset.path")
    assert not list(scratch.rglob("*.bin"))
    store.write("b.bin", bytes(MB // 2))
    assert {file.name for file in local_path(f"s3://{bucket}/rows", scratch, "dataset.path").glob("*.bin")} == {
        "a.bin",
        "b.bin",
    }


def names(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file() and file.name[0] != "."}


def test_jobs_that_fetch_one_prefix_to_one_scratch_do_it_once_and_all_have_it_whole(bucket: str, tmp_path: Path):
    body = os.urandom(3 * MB)
    open_store(f"s3://{bucket}/base").write("model.safetensors", body)

    def fetch(_: int) -> tuple[bytes, int]:
        file = local_path(f"s3://{bucket}/base", tmp_path, "model.name_or_path") / "model.safetensors"
        return file.read_bytes(), file.stat().st_ino

    with ThreadPoolExecutor(3) as jobs:
        found = list(jobs.map(fetch, range(3)))
    assert [read for read, _ in found] == [body] * 3
    assert len({number for _, number in found}) == 1


def test_jobs_that_unpack_one_archive_to_one_scratch_do_it_once(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "chest.zip", "w") as packed:
        for number in range(200):
            packed.writestr(f"{number}.txt", str(number))
    with ThreadPoolExecutor(4) as jobs:
        found = list(jobs.map(lambda _: unpacked(tmp_path / "chest.zip", tmp_path / "s", "dataset.path"), range(4)))
    assert len(set(found)) == 1
    assert names(found[0]) == {f"{number}.txt" for number in range(200)}


@pytest.mark.parametrize(
    "two", [("site/a", "site-a"), ("a b", "a+b"), ("x" * 150 + "/" + "y" * 150, "x" * 150 + "-" + "y" * 80)]
)
def test_prefixes_that_are_spelt_alike_are_kept_apart(bucket: str, tmp_path: Path, two: tuple[str, str]):
    """Rows of one site would be those of the other; two long ones, longer than a file's name may be."""
    urls = [f"s3://{bucket}/{prefix}" for prefix in two]
    for url in urls:
        open_store(url).write("rows.jsonl", url.encode())
    for _ in range(2):
        folders = [local_path(url, tmp_path, field) for url, field in zip(urls, FIELDS, strict=True)]
        assert [(folder / "rows.jsonl").read_text() for folder in folders] == urls
    assert local_path(f"{urls[0]}/", tmp_path, "dataset.path") == folders[0]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_an_object_that_left_its_prefix_leaves_training_and_scratch(
    tree: dict[str, Any], bucket: str, tmp_path: Path, kind: str
):
    """Rows, shrunk pictures, unpacked tables and what had partly come, while scratch is kept."""
    store, scratch = open_store(f"s3://{bucket}/rows"), tmp_path / "scratch"
    for name in ("anna", "bert", "carl"):
        store.upload(written(tmp_path / f"{name}.{kind}", name), f"site/{name}.{kind}")
    tree["dataset"] = {"path": store.url, "eval_fraction": 0, "image_max_side": 32}
    seen = prepare(validate(tree), scratch)
    assert sorted(row["reference"] for row in seen.train) == ["anna", "bert", "carl"]
    [folder] = [file.parent for file in scratch.rglob(f"anna.{kind}")]
    for name in ("anna", "bert"):
        (folder / f".{name}.{kind}.0123456789ab.part").write_text(f"the beginning of {name}")
    store.delete([f"site/anna.{kind}"])
    assert sorted(row["reference"] for row in prepare(validate(tree), scratch).train) == ["bert", "carl"]
    left = [file for file in scratch.rglob("*") if file.is_file()]
    assert not [file for file in left if b"anna" in file.read_bytes() or "anna" in file.name]
    assert (folder / f".bert.{kind}.0123456789ab.part").exists()
    assert len([file for file in left if file.suffix == ".png"]) == 2


def written(file: Path, name: str) -> Path:
    """A table of one row: a picture that is shrunk before it is used, and this name as its caption."""
    from datasets import Dataset

    picture = png(ord(name[0]), (200, 200))
    if file.suffix == ".parquet":
        Dataset.from_dict({"image": [picture], "caption": [name]}).to_parquet(file)
        return file
    return shard(file, {"0.png": picture, "0.txt": name.encode()})


def test_the_headers_of_a_base_that_was_sharded_anew_are_those_of_the_new_files(
    bucket: str, tmp_path: Path, demo: Path
):
    store = open_store(f"s3://{bucket}/base")
    for name in ("config.json", "model.safetensors"):
        store.upload(demo / "base" / name, name)
    spec = ModelSpec(name_or_path=store.url)
    assert [file.name for file in weight_files(glimpse(spec, tmp_path))] == ["model.safetensors"]
    store.delete(["model.safetensors"])
    store.upload(demo / "base" / "model.safetensors", "model-00001-of-00001.safetensors")
    assert [file.name for file in weight_files(glimpse(spec, tmp_path))] == ["model-00001-of-00001.safetensors"]


def test_a_base_of_the_hub_that_scratch_has_no_room_for_is_not_fetched(
    job: Job, tree: dict[str, Any], demo: Path, tmp_path: Path
):
    tree["model"] = {"name_or_path": "lab/tiny", "revision": "main"}
    tree["dataset"] = {"path": str(demo / "data")}
    with serve() as hub:
        hub.add("models", "lab/tiny", demo / "base")
        settings = {"HF_ENDPOINT": hub.url, "JOB_SCRATCH_GB": "0.003"}
        result = job("run", JOB_SPEC=yaml.safe_dump(tree), **settings)
    assert result.returncode == 78, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("exit 78: model.name_or_path: lab/tiny needs 4.2 MB in ")
    assert last.endswith("point JOB_SCRATCH at a larger disk, or free some space there")
    assert not any("model.safetensors" in asked and asked.startswith("GET") for asked in hub.asked)


def test_parquet_that_scratch_has_no_room_for_is_told_as_such(tmp_path: Path, mounted: Callable[[str, float], Path]):
    from datasets import Dataset

    rows, scratch = tmp_path / "rows", mounted("scratch", 2 * MB)
    rows.mkdir()
    images = [os.urandom(100_000) for _ in range(60)]
    Dataset.from_dict({"image": images, "caption": ["a nodule"] * 60}).to_parquet(rows / "train.parquet")
    with pytest.raises(SpecError, match=r"dataset.path: .*unpacking .*rows \(6.0 MB\) to .* filled that disk"):
        read_table([rows / "train.parquet"], scratch / "cache", "dataset.path")


def test_a_prefix_is_listed_once_and_only_what_is_new_is_fetched(
    s3: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An attempt that was stopped goes on where it was, and one object more costs one download."""
    url = f"s3://{bucket}/films"
    store = open_store(url)
    for number in range(12):
        store.write(f"p{number % 3}/{number}.txt", f"film {number}".encode())
    with Proxy(address(s3)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)

        def fetch() -> tuple[int, set[str]]:
            """Returns the listings and the names of what was downloaded."""
            proxy.seen.clear()
            local_path(url, tmp_path, "dataset.path")
            got = [first.split()[1] for first in proxy.seen if first.startswith("GET")]
            listings = [each for each in got if "list-type=2" in each]
            return len(listings), {Path(each).name.partition("?")[0] for each in got if each not in listings}

        denied = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        proxy.before = lambda request: denied if "p1/4.txt" in request.first else None
        with pytest.raises(NotAllowed):
            fetch()
        proxy.before = None
        assert fetch() == (1, {f"{number}.txt" for number in (4, 7, 11, 2, 5, 8)})  # those listed from p1/4.txt on
        assert fetch() == (1, set())
        store.write("p1/4.txt", b"retaken")
        store.write("p2/new.txt", b"new")
        store.delete(["p0/0.txt"])
        assert fetch() == (1, {"4.txt", "new.txt"})
        there = {file.name: file.read_text() for file in tmp_path.rglob("*.txt")}
        assert there == {f"{n}.txt": f"film {n}" for n in range(1, 12)} | {"4.txt": "retaken", "new.txt": "new"}
