"""What holds for every door."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import string
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.errors import DataError, JobError, NotAllowed, SpecError, Unavailable
from job.store import (
    Conflict,
    Corrupt,
    Digest,
    Missing,
    Store,
    check_writable,
    checked_key,
    download_files,
    inside,
    open_store,
    upload_folder,
)
from job.store.disk import disk_fault
from tests.s3 import SMALL_PART

names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=40
)
good_names = names.filter(lambda name: name not in (".", "..") and len(name.encode()) < 200 and name.strip() == name)
one_store = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@one_store
@given(parts=st.lists(good_names, min_size=1, max_size=3), data=st.binary(max_size=50))
def test_any_good_key_comes_back_with_its_bytes(store: Store, parts: list[str], data: bytes) -> None:
    key = "k/" + "/".join(parts)
    store.write(key, data)
    assert store.read(key) == data
    assert [entry.size for entry in store.list("k/") if entry.key == key] == [len(data)]
    store.delete([key])
    assert key not in [entry.key for entry in store.list("k/")]


@given(key=st.text(alphabet="ab./\0", min_size=0, max_size=12))
def test_no_accepted_key_leaves_its_folder(key: str) -> None:
    try:
        checked_key(key)
    except DataError:
        return
    root = Path("/somewhere/deep")
    assert os.path.normpath(root / key).startswith(f"{root}/")


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "../a", "a/../../b", ".", "a/./b", "a\0b", "\ud800", "x" * 256]
)
def test_bad_keys_are_refused_by_every_method(store: Store, key: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    for act in (lambda: store.write(key, b""), lambda: store.upload(path, key), lambda: store.read(key)):
        with pytest.raises(DataError):
            act()


def test_a_piece_is_what_a_slice_is(store: Store) -> None:
    store.write("whole", bytes(range(100)))
    assert store.read_piece("whole", 10, 20) == bytes(range(10, 30))
    assert store.read_piece("whole", 90, 20) == bytes(range(90, 100))
    with pytest.raises(Missing):
        store.read_piece("not there", 0, 1)


def test_missing_objects_raise_missing(store: Store, tmp_path: Path) -> None:
    for act in (
        lambda: store.read("not there"),
        lambda: store.version("not there"),
        lambda: store.age("not there"),
        lambda: store.download("not there", tmp_path / "x"),
    ):
        with pytest.raises(Missing, match="not there"):
            act()
    assert list(tmp_path.glob("x*")) == []


def test_deleting_what_is_not_there_is_no_error(store: Store) -> None:
    store.write("b/kept", b"")
    store.delete(["a", "b/c"])
    assert [entry.key for entry in store.list()] == ["b/kept"]


def test_listing_is_sorted_and_by_prefix(store: Store) -> None:
    for key in ("b/2", "b/1", "a", "b.txt", "bc"):
        store.write(key, b"")
    assert [entry.key for entry in store.list()] == sorted(["b/2", "b/1", "a", "b.txt", "bc"])
    assert [entry.key for entry in store.list("b")] == sorted(["b/2", "b/1", "b.txt", "bc"])
    assert [entry.key for entry in store.list("b/")] == ["b/1", "b/2"]
    assert list(store.list("nothing/here")) == []


def test_listing_goes_past_the_first_page(store: Store) -> None:
    keys = [f"many/{number:04d}" for number in range(1003)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: store.write(key, b""), keys))
    assert [entry.key for entry in store.list("many/")] == keys


def test_a_second_create_is_a_conflict_and_changes_nothing(store: Store) -> None:
    store.write("key", b"first", if_absent=True)
    with pytest.raises(Conflict) as refused:
        store.write("key", b"second", if_absent=True)
    assert store.read("key") == b"first"
    assert refused.value.exit_code == 75


def test_a_change_of_a_version_that_is_gone_is_a_conflict(store: Store) -> None:
    old = store.write("key", b"1")
    new = store.write("key", b"2", if_match=old)
    assert store.version("key") == new
    with pytest.raises(Conflict):
        store.write("key", b"3", if_match=old)
    with pytest.raises(Conflict):
        store.write("nothing", b"3", if_match=old)
    assert store.read("key") == b"2"


@pytest.mark.parametrize("there", [None, b"already"])
def test_of_sixteen_racers_one_wins(store: Store, there: bytes | None) -> None:
    store.probe()
    version = None if there is None else store.write("race", there)

    def race(number: int) -> int | None:
        try:
            store.write("race", str(number).encode(), if_absent=version is None, if_match=version)
            return number
        except Conflict:
            return None

    with ThreadPoolExecutor(16) as pool:
        winners = [number for number in pool.map(race, range(16)) if number is not None]
    assert [str(winner).encode() for winner in winners] == [store.read("race")]


@pytest.mark.parametrize(
    "size", [0, 1, SMALL_PART - 1, SMALL_PART, SMALL_PART + 1, 3 * SMALL_PART, 3 * SMALL_PART + 17]
)
def test_files_of_every_size_survive_the_round_trip(store: Store, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "up").write_bytes(data)
    digest = Digest(size, hashlib.sha256(data).hexdigest())
    sent = store.upload(tmp_path / "up", "some file")
    assert sent[:2] == digest[:2]
    assert [entry.version for entry in store.list()] == [sent.version]
    assert store.download("some file", tmp_path / "sub/down", sha256=digest.sha256) == sent
    assert (tmp_path / "sub/down").read_bytes() == data
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["down"]


def test_content_that_was_not_promised_never_gets_its_name(store: Store, tmp_path: Path) -> None:
    store.write("key", b"other bytes")
    with pytest.raises(Corrupt, match="as expected") as refused:
        store.download("key", tmp_path / "file", sha256="0" * 64)
    assert refused.value.exit_code == 65
    assert list(tmp_path.glob("*file*")) == []


def test_folders_survive_the_round_trip(store: Store, tmp_path: Path) -> None:
    contents = {"a b/ü.bin": os.urandom(SMALL_PART + 5), "empty": b"", "deep/er/x": b"1"} | {
        f"small/{number}": os.urandom(number) for number in range(20)
    }
    for name, data in contents.items():
        (tmp_path / "up" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / name).write_bytes(data)
    up = upload_folder(store, tmp_path / "up", "adapter")
    keys = [entry.key for entry in store.list("adapter/")]
    assert dict(download_files(store, keys, tmp_path / "down")) == {
        f"adapter/{name}": there for name, there in up.items()
    }
    assert list(download_files(store, ["adapter/gone"], tmp_path / "down")) == [("adapter/gone", None)]
    assert {name: (tmp_path / "down" / "adapter" / name).read_bytes() for name in contents} == contents
    assert set(up) == set(contents)


def test_a_name_that_leads_out_of_the_folder_is_not_inside(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path)
    assert inside(tmp_path / "in", "a/b")
    for name in ("../a", "/etc/passwd", "a/../../b", "link/a", ""):
        assert not inside(tmp_path / "in", name)


def test_two_files_that_break_do_not_leave_a_folder_half_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        upload_folder(store, _folder_with_bad_name(tmp_path), "bad")
    assert list(store.list("bad")) == []


def _folder_with_bad_name(tmp_path: Path) -> Path:
    folder = tmp_path / "named badly"
    folder.mkdir()
    (folder / "good").write_bytes(b"1")
    (Path(os.fsdecode(bytes(folder) + b"/\xff"))).write_bytes(b"2")
    return folder


def test_a_probe_leaves_nothing(store: Store) -> None:
    found = check_writable(store)
    assert found.conditional
    assert list(store.list()) == []


def test_a_process_forked_while_something_is_written_holds_up_no_later_write(tmp_path: Path) -> None:
    """As a loader's workers are, which live as long as training does."""
    store = open_store(str(tmp_path))
    first = store.write("lease", b"1", if_absent=True)
    with store._locked(tmp_path / "lease"):  # type: ignore[attr-defined]
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        with ThreadPoolExecutor(1) as pool:
            later = pool.submit(store.write, "lease", b"2", if_match=first)
            assert later.result(timeout=10) != first
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lock_that_is_never_let_go_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.store.local.LOCK_SECONDS", 0.1)
    store = open_store(str(tmp_path))
    first = store.write("lease", b"1", if_absent=True)
    with (
        store._locked(tmp_path / "lease"),  # type: ignore[attr-defined]
        pytest.raises(Unavailable, match=r"lease\.lock has been locked by another process for 0 s"),
    ):
        store.write("lease", b"2", if_match=first)


def test_age_is_measured_by_one_clock(store: Store) -> None:
    store.write("young", b"")
    assert -1.5 <= store.age("young") <= 5


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "empty"),
        ("s3://", "names no bucket"),
        ("s3:///prefix", "names no bucket"),
        ("s3://UP_&/x", "names no bucket"),
        ("s3://key:secret@bucket/x", "do not belong"),
        ("s3://bucket/a/../b", "is not allowed"),
        ("gs://bucket/x", "not a supported URL"),
        ("https://bucket/x", "not a supported URL"),
        ("file://host/path", "three slashes"),
    ],
)
def test_urls_that_name_no_store_are_refused_without_their_secrets(url: str, says: str) -> None:
    with pytest.raises(JobError, match=says) as refused:
        open_store(url)
    assert "secret" not in str(refused.value)


def test_encryption_asked_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="AES256"):
        open_store(str(tmp_path), sse="AES256")


def test_a_folder_that_may_not_be_written_is_not_allowed(tmp_path: Path) -> None:
    # /proc refuses even root.
    for place in ("/proc/self/store", "/proc/store/deeper"):
        with pytest.raises(SpecError, match="/proc/.*store cannot be created: that file system takes no new folders"):
            check_writable(open_store(place))
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(NotAllowed, match="may not write"):
            check_writable(open_store(str(tmp_path)))


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(store: Store, tmp_path: Path, way: str) -> None:
    small, big = tmp_path / "small", tmp_path / "big"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        big.write_bytes(bytes(2**21))
        store.upload(big, "big")
        with pytest.raises(Unavailable, match=f"The disk that holds {small}.* (is full|needs 0.0 GB)"):
            if way == "up":
                open_store(str(small)).upload(big, "big")
            else:
                store.download("big", small / "big")
        assert sum(path.stat().st_size for path in small.rglob("*")) == 0
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    store.write("a/b", b"1")
    (tmp_path / "store/a").chmod(0)
    nobody = os.geteuid() == 0
    if nobody:
        os.seteuid(65534)
    try:
        with pytest.raises(NotAllowed):
            list(store.list())
    finally:
        if nobody:
            os.seteuid(0)
        (tmp_path / "store/a").chmod(0o700)


def test_the_longest_names_are_stored(store: Store, tmp_path: Path) -> None:
    name = "ü" * 127
    version = store.write(name, b"1")
    store.write(name, b"2", if_match=version)
    store.download(name, tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"2"


def test_words_used_in_keys_are_all_kept(store: Store) -> None:
    key = "".join(sorted(set(string.punctuation) - set("/."))) + " %2F %25 + ünïcödé 日本"
    store.write(key, b"x")
    assert [entry.key for entry in store.list()] == [key]


def test_a_link_that_leads_nowhere_is_named_and_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "lustre").symlink_to(tmp_path / "unmounted")
    for url in (tmp_path / "lustre", tmp_path / "lustre" / "runs"):
        with pytest.raises(SpecError, match=r"lustre is a link to .*unmounted, which does not exist; fix the link"):
            open_store(str(url)).write("a", b"")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EFBIG, errno.ENXIO, errno.EOPNOTSUPP, errno.ENAMETOOLONG])
def test_what_a_file_system_refuses_for_good_is_the_specs_fault(number: int) -> None:
    assert isinstance(disk_fault(OSError(number, ""), Path("/somewhere")), SpecError)
    assert isinstance(disk_fault(OSError(errno.EIO, ""), Path("/somewhere")), Unavailable)
