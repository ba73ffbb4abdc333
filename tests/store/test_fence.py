"""A writer that froze past its lease spoils nothing that its successor wrote, and the successor writes over what came late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from job.errors import Preempted
from job.layout import LEASE_KEY
from job.store import Capabilities, Conflict, OwnedStore, Store, check_writable, open_store
from job.store.lease import Lease, acquire
from tests.s3 import ON_CEPH, SMALL_PART, address
from tests.store.proxy import Message, Proxy
from tests.store.test_lease import die

on_moto = pytest.mark.skipif(ON_CEPH, reason="a matter of the proxy and the client alone")
BYTES = {"late": b"late" * SMALL_PART, "own": b"mine" * SMALL_PART}  # four parts
Write = Callable[[OwnedStore, Path, str], Any]
WRITES: dict[str, Write] = {
    "write": lambda store, _, who: store.write("key", BYTES[who]),
    "upload": lambda store, folder, who: store.upload(folder / who, "key"),
    "pieces": lambda store, _, who: store.upload_pieces(
        lambda: (memoryview(part) for part in (BYTES[who],)), len(BYTES[who]), "key"
    ),
}


@pytest.fixture
def holders(store: Store, tmp_path: Path) -> Iterator[tuple[OwnedStore, OwnedStore]]:
    """A job that wrote a key and froze past its lease, and believes that it has it; and its successor."""
    for who, data in BYTES.items():
        (tmp_path / who).write_bytes(data)
    can = check_writable(store)
    frozen, first = held(store, "a", can)
    frozen.write("key", b"of the first attempt")
    die(first)
    store.write(LEASE_KEY, first._text(released=True))  # the same to the second as a long silence
    own, second = held(store, "b", can)
    yield frozen, own
    second.release()


def held(store: Store, who: str, can: Capabilities) -> tuple[OwnedStore, Lease]:
    owned, lease = OwnedStore(store), acquire(store, who, 60)
    owned.hold(lease, can)
    owned.take_up()
    return owned, lease


@pytest.mark.parametrize("there", [True, False], ids=["over a file", "where none is"])
@pytest.mark.parametrize("late", WRITES)
def test_a_late_writer_leaves_what_its_successor_wrote_and_learns_of_it(
    holders: tuple[OwnedStore, OwnedStore], tmp_path: Path, late: str, there: bool
) -> None:
    frozen, own = holders
    if not there:
        own.delete(["key"])
        frozen._versions.pop("key")
    WRITES[late](own, tmp_path, "own")
    with pytest.raises(Preempted, match="taken over by b"):
        WRITES[late](frozen, tmp_path, "late")
    assert own.read("key") == BYTES["own"]


@pytest.mark.parametrize("own_way", WRITES)
def test_the_holder_writes_over_what_came_late(
    holders: tuple[OwnedStore, OwnedStore], tmp_path: Path, own_way: str
) -> None:
    frozen, own = holders
    WRITES["write"](frozen, tmp_path, "late")
    WRITES[own_way](own, tmp_path, "own")
    assert own.read("key") == BYTES["own"]
    own.write("key", b"and once more")


def test_a_late_entry_in_the_record_is_kept_by_the_holder(holders: tuple[OwnedStore, OwnedStore]) -> None:
    frozen, own = holders
    frozen.write("late", b"1")
    own.write("own", b"2")
    assert OwnedStore(own.inner).read_record() == {"key", "late", "own"}
    with pytest.raises(Preempted, match="taken over by b"):
        frozen.claim(["later"])


def test_a_late_deletion_leaves_what_its_successor_wrote(holders: tuple[OwnedStore, OwnedStore]) -> None:
    frozen, own = holders
    own.write("key", BYTES["own"])
    with pytest.raises(Preempted, match="taken over by b"):
        frozen.delete(["key"])
    assert own.read("key") == BYTES["own"]


def test_the_holder_deletes_what_came_late(holders: tuple[OwnedStore, OwnedStore]) -> None:
    frozen, own = holders
    frozen.write("key", b"late")
    own.delete(["key"])
    assert [entry.key for entry in own.list()] == ["lease.json", "written.json"]


def test_a_lease_that_was_not_asked_for_half_its_term_is_confirmed_before_a_write(store: Store) -> None:
    now = [0.0]
    owned, lease = OwnedStore(store), acquire(store, "a", 30, clock=lambda: now[0])
    owned.hold(lease, check_writable(store))
    for seconds, asked in ((14.0, 0), (16.0, 1), (80.0, 2)):  # the last: it ran out, and nobody came
        now[0] = seconds
        before, owned_writes = lease._version, owned.write("key", b"x")
        assert owned_writes
        assert (lease._version != before) == (asked > 0)
    lease.release()
    with pytest.raises(Preempted, match="released"):
        owned.write("key", b"y")


def test_a_deletion_is_of_one_version(store: Store) -> None:
    if not check_writable(store).deletes:
        pytest.skip("this server deletes whatever is there")
    old = store.write("key", b"1")
    new = store.write("key", b"2")
    with pytest.raises(Conflict):
        store.delete(["key"], if_match={"key": old})
    store.delete(["key", "gone"], if_match={"key": new, "gone": new})
    assert not list(store.list())


@on_moto
def test_before_a_store_whose_deletions_have_no_conditions_the_lease_is_confirmed(
    bucket: str, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not know the header ignores it, which is found by trying."""

    def ignores(request: Message) -> None:
        if request.first.startswith("DELETE"):
            request.head = request.head.replace(b"If-Match:", b"If-Other:")

    with Proxy(address(s3), before=ignores) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        owned = OwnedStore(open_store(f"s3://{bucket}/x"))
        can = check_writable(owned)
        assert can.conditional
        assert not can.deletes
        with acquire(owned.inner, "a", 30) as lease:
            owned.hold(lease, can)
            owned.write("key", b"1")
            beat = lease._version
            owned.delete(["key"])
            assert lease._version != beat
            assert [entry.key for entry in owned.list()] == ["lease.json", "written.json"]


def test_a_file_that_a_former_holder_recorded_late_is_no_foreign_one(holders: tuple[OwnedStore, OwnedStore]) -> None:
    frozen, own = holders
    frozen.write("late", b"1")
    own.write("late", b"2")
    assert own.read("late") == b"2"
    own.write("own", b"3")
    with pytest.raises(Preempted, match="taken over by b"):
        frozen.write("own", b"4")
