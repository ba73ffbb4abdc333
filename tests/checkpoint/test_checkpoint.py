"""Commit, restore and prune through both doors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.checkpoint import File, Manifest, commit, prune, read_manifest, restore, steps
from job.checkpoint.manifest import folder_of, from_json, step_of, to_json
from job.errors import DataError
from job.store import Missing, Store, open_store

DIGEST = "0" * 64
keys = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20).filter(
    lambda key: key not in (".", "..")
)
manifests = st.builds(
    Manifest,
    step=st.integers(0, 10**9),
    epoch=st.floats(0, 1e6),
    spec_digest=st.text(max_size=10),
    attempt=st.integers(0, 99),
    token=st.integers(0, 99),
    created=st.text(max_size=10),
    versions=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    files=st.dictionaries(keys, st.builds(File, size=st.integers(0), sha256=st.just(DIGEST), key=keys), max_size=3),
    extra=st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=5), max_size=3),
)


class Saved:
    """A trainer's folder that changes from step to step, and the skips that a restore reports."""

    def __init__(self, store: Store, work: Path) -> None:
        self.store = store
        self.work = work
        self.folder = work / "trainer"
        self.skips: list[tuple[int, str]] = []
        (self.folder / "sub dir").mkdir(parents=True)
        (self.folder / "frozen.safetensors").write_bytes(os.urandom(100_000))
        (self.folder / "training_args.bin").write_bytes(b"a pickle of code")
        (self.folder / "empty").write_bytes(b"")

    def commit(self, step: int) -> Manifest:
        (self.folder / "sub dir/state.json").write_text(f"state of {step}")
        return commit(
            self.store, self.folder, step=step, epoch=step / 100, spec_digest="d", attempt=1, extra={"s": step}
        )

    def restored_step(self, spec_digest: str = "d") -> int | None:
        self.skips.clear()
        found = restore(
            self.store,
            self.work / "into",
            on_skip=lambda step, why: self.skips.append((step, why)),
            spec_digest=spec_digest,
        )
        if found is None:
            return None
        assert (found.folder / "sub dir/state.json").read_text() == f"state of {found.manifest.step}"
        assert (found.folder / "frozen.safetensors").read_bytes() == (self.folder / "frozen.safetensors").read_bytes()
        assert {path.name for path in found.folder.iterdir()} == {"sub dir", "frozen.safetensors", "empty"}
        return found.manifest.step

    def stored(self) -> list[str]:
        return [entry.key for entry in self.store.list()]


@pytest.fixture
def saved(store: Store, tmp_path: Path) -> Saved:
    return Saved(store, tmp_path / "work")


def test_a_checkpoint_of_another_spec_is_passed_over(saved: Saved) -> None:
    """Its writer may have been asleep when the output became ours."""
    saved.commit(7)
    assert saved.restored_step("another") is None
    assert saved.skips == [(7, "it belongs to another spec")]
    assert saved.restored_step() == 7


def test_what_was_committed_is_restored_newest_first(saved: Saved) -> None:
    assert saved.restored_step() is None
    for step in (100, 200):
        saved.commit(step)
    assert steps(saved.store) == [200, 100]
    assert saved.restored_step() == 200
    assert read_manifest(saved.store, 200).extra == {"s": 200}


def test_a_folder_without_its_manifest_is_no_checkpoint(saved: Saved) -> None:
    saved.commit(1)
    saved.commit(2)
    saved.store.delete([f"{folder_of(2)}/MANIFEST.json"])
    assert steps(saved.store) == [1]
    assert saved.restored_step() == 1
    with pytest.raises(Missing):
        read_manifest(saved.store, 2)


def test_frozen_files_are_sent_once(saved: Saved) -> None:
    first = saved.commit(1)
    for step in (2, 3):
        again = saved.commit(step)
        assert again.files["frozen.safetensors"] == first.files["frozen.safetensors"]
        assert f"{folder_of(step)}/frozen.safetensors" not in saved.stored()
        assert f"{folder_of(step)}/sub dir/state.json" in saved.stored()
    assert saved.restored_step() == 3


def test_a_changed_file_of_the_same_size_is_sent_again(saved: Saved) -> None:
    saved.commit(1)
    (saved.folder / "frozen.safetensors").write_bytes(os.urandom(100_000))
    saved.commit(2)
    assert saved.restored_step() == 2


@pytest.mark.parametrize("damage", ["flipped", "shorter", "gone", "manifest", "nonsense"])
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(saved: Saved, damage: str) -> None:
    saved.commit(1)
    last = saved.commit(2)
    state = last.files["sub dir/state.json"].key
    manifest = f"{folder_of(2)}/MANIFEST.json"
    if damage == "flipped":
        saved.store.write(state, b"state of 9")
    elif damage == "shorter":
        saved.store.write(state, b"state")
    elif damage == "gone":
        saved.store.delete([state])
    elif damage == "manifest":
        saved.store.write(manifest, saved.store.read(manifest).replace(b'"attempt": 1', b'"attempt": 2'))
    else:
        saved.store.write(manifest, b"\xff{}")
    assert saved.restored_step() == 1
    assert [step for step, _ in saved.skips] == [2]
    assert "step-00000002" in saved.skips[0][1]


def test_committing_a_step_again_replaces_it_and_never_overwrites_data(saved: Saved) -> None:
    first = saved.commit(5)
    before = {file.key: saved.store.read(file.key) for file in first.files.values()}
    (saved.folder / "empty").write_bytes(b"no longer")
    commit(saved.store, saved.folder, step=5, epoch=0, spec_digest="d", attempt=2)
    assert {key: saved.store.read(key) for key in before} == before
    assert read_manifest(saved.store, 5).attempt == 2
    assert saved.restored_step() == 5


def test_leftovers_of_a_dead_upload_are_neither_used_nor_kept(saved: Saved) -> None:
    saved.store.write(f"{folder_of(7)}/frozen.safetensors", b"half of it")
    saved.commit(7)
    assert saved.restored_step() == 7
    prune(saved.store, keep=1)
    assert f"{folder_of(7)}/frozen.safetensors" not in saved.stored()
    assert saved.restored_step() == 7


def test_prune_keeps_the_newest_and_the_multiples(saved: Saved) -> None:
    for step in range(1, 8):
        saved.commit(step)
    assert prune(saved.store, keep=2) == [5, 4, 3, 2, 1]
    assert steps(saved.store) == [7, 6]
    assert saved.restored_step() == 7
    # The bytes of the frozen file live on under the step that sent them; nothing else of it does.
    assert [key for key in saved.stored() if key.startswith(folder_of(1))] == [
        f"{folder_of(1)}/empty",
        f"{folder_of(1)}/frozen.safetensors",
    ]


def test_prune_never_removes_the_newest_that_is_whole(saved: Saved) -> None:
    saved.commit(1)
    last = saved.commit(2)
    saved.store.delete([last.files["sub dir/state.json"].key])
    assert prune(saved.store, keep=1) == []
    assert saved.restored_step() == 1


def test_prune_after_going_back_keeps_the_new_past(saved: Saved) -> None:
    saved.commit(1)
    bad = saved.commit(30)
    saved.store.write(bad.files["sub dir/state.json"].key, b"state of 31"[:11].replace(b"31", b"77"))
    assert saved.restored_step() == 1
    saved.commit(2)
    assert prune(saved.store, keep=1, verified=2) == [1]
    assert saved.restored_step() == 2


def test_prune_of_nothing_does_nothing(store: Store) -> None:
    store.write("checkpoints/step-00000001/half", b"x")
    assert prune(store, keep=1) == []
    assert [entry.key for entry in store.list()] == ["checkpoints/step-00000001/half"]


def test_a_second_restore_fetches_nothing_again(saved: Saved) -> None:
    manifest = saved.commit(1)
    saved.restored_step()
    (saved.work / "into/step-00000001/stranger").write_bytes(b"x")
    # Only the manifest can still be read; the files are taken from the folder, once verified.
    saved.store.delete([file.key for file in manifest.files.values()])
    assert saved.restored_step() == 1


def test_names_that_lead_out_of_the_folder_are_refused(saved: Saved) -> None:
    saved.commit(1)
    good = read_manifest(saved.store, 1)
    forged = Manifest.model_construct(**{**dict(good), "files": {**good.files, "../../outside": good.files["empty"]}})
    saved.store.write(f"{folder_of(1)}/MANIFEST.json", to_json(forged))
    assert saved.restored_step() is None
    assert "is not a manifest" in saved.skips[0][1]
    assert not (saved.work.parent / "outside").exists()


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(manifest=manifests)
def test_manifests_survive_the_round_trip(manifest: Manifest) -> None:
    assert from_json(to_json(manifest), "here") == manifest


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(manifest=manifests, data=st.data())
def test_no_flipped_bit_of_a_manifest_changes_what_is_read(manifest: Manifest, data: st.DataObject) -> None:
    text = bytearray(to_json(manifest))
    text[data.draw(st.integers(0, len(text) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        assert from_json(bytes(text), "here") == manifest  # white space may differ
    except DataError as error:
        assert str(error).startswith("here is")


@given(
    data=st.binary(max_size=60)
    | st.recursive(st.none() | st.integers(), st.lists).map(lambda x: json.dumps(x).encode())
)
def test_nonsense_is_never_a_manifest(data: bytes) -> None:
    with pytest.raises(DataError, match="is not a manifest|damaged"):
        from_json(data, "here")


@given(step=st.integers(0, 10**10), tail=st.text(max_size=5))
def test_only_folders_we_would_name_belong_to_a_step(step: int, tail: str) -> None:
    assert step_of(f"{folder_of(step)}/{tail}") == step
    assert step_of(f"checkpoints/step-{step}x/{tail}") is None
    assert step_of(f"checkpoints/step-0{step:08d}/{tail}") is None


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    acts=st.lists(
        st.tuples(st.sampled_from(["commit", "prune", "tear", "unmanifest"]), st.integers(1, 9)), max_size=14
    ),
    keep=st.integers(1, 3),
)
def test_after_any_history_the_newest_untorn_commit_is_restored(
    tmp_path_factory: pytest.TempPathFactory, acts: list[tuple[str, int]], keep: int
) -> None:
    work = tmp_path_factory.mktemp("history")
    saved = Saved(open_store(str(work / "store")), work)
    good: set[int] = set()
    for act, step in acts:
        if act == "commit":
            saved.commit(step)
            good.add(step)
        elif act == "prune":
            good -= set(prune(saved.store, keep=keep))
        elif step in good and act == "tear":
            key = read_manifest(saved.store, step).files["sub dir/state.json"].key
            saved.store.delete([key])
            good.discard(step)
            # A later commit of the very same content may share the bytes that were torn.
            shared = [
                other for other in good if read_manifest(saved.store, other).files["sub dir/state.json"].key == key
            ]
            good -= set(shared)
        elif step in good:
            saved.store.delete([f"{folder_of(step)}/MANIFEST.json"])
            good.discard(step)
    assert saved.restored_step() == max(good, default=None)
