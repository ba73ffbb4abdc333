"""What a base says is kept for later runs, and taken only where everything that decides it is the same."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job.errors import NotAllowed
from job.evaluate import answer_cache
from job.evaluate.records import Answer
from job.evaluate.stage import stored_rows
from job.store import open_store
from tests.s3 import address
from tests.store.proxy import Proxy
from tests.store.proxy import answer as refusal
from tests.tiny import CPU, job_spec, row

RECORD: dict[str, Any] = {"generated": "A nodule.", "tokens": 4, "loss": 1.5, "answer_tokens": 5}


def rows(count: int = 3, **changed: Any) -> list[dict[str, Any]]:
    own = {"reference": "A nodule.", "labels": {"side": "left"}, "groups": {}, "unit": 1}
    return [row(number) | own | changed for number in range(count)]


@pytest.fixture
def loaded(tmp_path: Path) -> Any:
    from job.model.loaded import Loaded

    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return Loaded(None, None, folder, "transformers", "32bit", CPU, {})


def test_another_run_gets_the_answers_with_its_own_labels(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "kept"))
    answer_cache.keep([store], "k.jsonl", answer_cache.held(rows()), [Answer("row", "", **RECORD)] * 3)
    later = answer_cache.held(rows(labels={"side": "right"}))
    found, where = answer_cache.recall([open_store(str(tmp_path / "empty")), store], "k.jsonl", later)
    assert where == store.url
    assert [record.labels for record in found] == [{"side": "right"}] * 3
    assert [{name: getattr(record, name) for name in RECORD} for record in found] == [RECORD] * 3


@pytest.mark.parametrize("damage", [b"", b'{"row": "x"}\n', b"\xff", b"[]\n"])
def test_what_is_not_whole_is_measured_again(tmp_path: Path, damage: bytes) -> None:
    store = open_store(str(tmp_path))
    store.write("k.jsonl", damage)
    assert answer_cache.recall([store], "k.jsonl", answer_cache.held(rows())) == ([], "")


def test_the_key_changes_with_all_that_decides_an_answer_and_with_nothing_else(loaded: Any, tmp_path: Path) -> None:
    def key(spec: Any = (), model: Any = loaded, given: Any = None, device: str = "A") -> str:
        return answer_cache.key(job_spec(**dict(spec)), model, answer_cache.held(given or rows()), device)

    first = key()
    moved = shutil.copytree(loaded.folder, tmp_path / "moved")
    same = [
        key(model=replace(loaded, folder=moved)),
        key({"lora": {"r": 3}, "training": {"learning_rate": 1e-5}}),
        key({"dataset": {"path": "elsewhere"}}),
        key(given=rows(labels={"side": "right"})),
    ]
    assert same == [first] * 4
    (moved / "model.safetensors").write_bytes(b"weightz")
    pixels, texts = rows(), rows()
    pixels[1]["images"] = row(9)["images"]
    texts[1]["messages"] = row(1, question="What?")["messages"]
    other = [
        key(model=replace(loaded, folder=moved)),
        key(model=replace(loaded, precision="4bit")),
        key({"evaluation": {"max_new_tokens": 9}}),
        key({"training": {"max_length": 99}}),
        key(given=pixels),
        key(given=texts),
        key(given=rows(2)),
        key(device="B"),
    ]
    assert len({first, *other}) == 9


def test_held_out_rows_are_read_once() -> None:
    class Counted(list[dict[str, Any]]):
        read = 0

        def __iter__(self) -> Iterator[dict[str, Any]]:
            Counted.read += 1
            return super().__iter__()

    given = Counted(rows())
    assert answer_cache.held(given) == answer_cache.held(given) == answer_cache.held(rows())
    assert answer_cache.rows_digest(given) == answer_cache.rows_digest(rows())
    assert Counted.read == 2  # once more, since other rows came in between


def test_a_base_that_was_read_ahead_is_not_read_again(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    fresh = answer_cache.base_digest(shutil.copytree(tmp_path, tmp_path.with_name("fresh")))
    answer_cache.read_base_ahead(tmp_path)
    for thread in threading.enumerate():
        if thread.name == "base digest":
            thread.join()
    stat = file.stat()
    file.write_bytes(b"weightz")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert answer_cache.base_digest(tmp_path) == fresh
    os.utime(file)
    assert answer_cache.base_digest(tmp_path) != fresh


def test_rows_of_like_length_share_a_batch_longest_first() -> None:
    lengths = [3, 9, 1, 9]
    given = answer_cache.held([rows(1, reference="x" * length)[0] for length in lengths])
    assert answer_cache.longest_first(given) == [1, 3, 0, 2]


def test_a_store_that_refuses_is_not_one_without_answers(s3: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else hours of answers would be made again because of one bad moment."""
    denied = refusal("403 Forbidden", "<Error><Code>AccessDenied</Code></Error>")
    with Proxy(address(s3), before=lambda request: denied) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        with pytest.raises(NotAllowed):
            stored_rows(open_store(f"s3://{bucket}"), "evaluation/before.jsonl", Answer)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3)
    assert stored_rows(open_store(f"s3://{bucket}"), "evaluation/before.jsonl", Answer) == []
