"""What is published is what RESULT.json says, or there is no RESULT.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.errors import Preempted, Unavailable
from job.evaluate.records import Answer
from job.evaluate.stage import jsonl, stored_rows
from job.layout import LEASE_KEY
from job.output.stored import own_json
from job.publish import ensure_published, send, write_result
from job.store import Capabilities, Entry, LocalStore, OwnedStore, Store, check_writable, open_store
from job.store.lease import Lease, acquire


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    for name in ("a", "b"):
        (tmp_path / "adapter" / name).write_text(name)
    return tmp_path / "adapter"


@pytest.fixture
def owned(store: Store) -> Iterator[OwnedStore]:
    yield from under_lease(store)


def under_lease(store: Store) -> Iterator[OwnedStore]:
    owned = OwnedStore(store)
    with acquire(store, "a", 60) as lease:
        owned.hold(lease, check_writable(owned))
        owned.take_up()
        yield owned


def test_a_published_file_that_changed_or_vanished_is_sent_again(owned: OwnedStore, folder: Path):
    files, here = send(owned, folder, "adapter"), {f"adapter/{name}": folder / name for name in "ab"}
    owned.inner.write("adapter/a", b"x")
    owned.inner.delete(["adapter/b"])
    ensure_published(owned, files, here)
    assert [owned.read(key) for key in here] == [b"a", b"b"]
    owned.inner.write("adapter/a", b"x")
    with pytest.raises(
        Unavailable, match=r"adapter/a is not the file that was sent \(1 such files\): something else writes"
    ):
        ensure_published(owned, files, {})


def test_a_listing_that_lags_behind_stops_nothing(folder: Path, tmp_path: Path):
    class Lagging(LocalStore):
        def list(self, prefix: str = "") -> Iterator[Entry]:
            yield from ()

    for owned in under_lease(Lagging("lagging", tmp_path / "output")):
        ensure_published(owned, send(owned, folder, "adapter"), {})


def attempt(owned: OwnedStore) -> Any:
    return SimpleNamespace(store=owned, lease=owned._lease)


def test_no_result_stays_over_files_that_somebody_else_keeps_changing(folder: Path, tmp_path: Path):
    class Changing(LocalStore):
        def entry(self, key: str) -> Entry:
            if (self.root / "RESULT.json").exists():
                (self.root / "adapter" / "a").write_text("y")
            return super().entry(key)

    for owned in under_lease(Changing("changing", tmp_path / "output")):
        files, here = send(owned, folder, "adapter"), {f"adapter/{name}": folder / name for name in "ab"}
        ensure_published(owned, files, here)
        with pytest.raises(Unavailable, match="adapter/a is not the file that was sent"):
            write_result(attempt(owned), b"{}", files, here)
        assert "RESULT.json" not in [entry.key for entry in owned.list()]


def test_a_result_that_was_written_too_late_is_taken_back(owned: OwnedStore, folder: Path):
    """Its writer froze behind the question to the lease; the successor has no result of its own yet."""
    files, lease = send(owned, folder, "adapter"), owned._lease
    assert lease is not None
    taken_over(lease)
    with pytest.raises(Preempted, match="taken over by b"):
        write_result(attempt(owned), b"{}", files, {})
    assert "RESULT.json" not in [entry.key for entry in owned.list()]


def test_a_result_of_the_successor_is_not_taken_back(owned: OwnedStore, folder: Path):
    files, lease = send(owned, folder, "adapter"), owned._lease
    assert lease is not None
    taken_over(lease)
    owned.inner.write("RESULT.json", b"its own")
    with pytest.raises(Preempted, match="taken over by b"):
        write_result(attempt(owned), b"{}", files, {})
    assert owned.read("RESULT.json") == b"its own"


def taken_over(lease: Lease) -> None:
    lease.store.write(LEASE_KEY, json.dumps({"holder": "b", "name": "b", "token": 2, "ttl": 60}).encode())


def test_on_a_store_without_conditions_a_job_writes_as_ever(tmp_path: Path):
    owned = OwnedStore(open_store(str(tmp_path)))
    with acquire(owned.inner, "a", 60) as lease:
        owned.hold(lease, Capabilities(conditional=False, checksums=True, deletes=False))
        for text in (b"1", b"2"):
            owned.write("key", text)
        owned.inner.write("key", b"x")
        owned.write("key", b"3")
        owned.delete(["key"])
    assert not (tmp_path / "key").exists()


def test_answers_of_another_run_are_not_used(store: Store):
    rows = [Answer("row-1", "", generated="clear")]
    for written, found in (("spec-rows", rows), ("other-rows", []), ("spec-others", []), (None, [])):
        store.write("evaluation/after.partial.jsonl", jsonl(rows, written))
        assert stored_rows(store, "evaluation/after.partial.jsonl", Answer, "spec-rows") == found
        assert stored_rows(store, "evaluation/after.partial.jsonl", Answer) == rows
        store.write(
            "evaluation/extra.json", json.dumps({"bertscore": [1]} | ({"run": written} if written else {})).encode()
        )
        assert own_json(store, "evaluation/extra.json", "spec-rows") == ({"bertscore": [1]} if found else {})
