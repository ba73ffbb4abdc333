"""Whose an output is."""

import json
from pathlib import Path
from typing import Any

import pytest

from job.config.loader import validate
from job.errors import NoProgress, SpecError
from job.output.ownership import begin, check_owner, is_published, outdated
from job.runtime.status import Record
from job.store import OwnedStore, open_store
from job.store.local import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> OwnedStore:
    return OwnedStore(open_store(str(tmp_path / "output")))


def test_attempts_are_counted_in_the_output(store: OwnedStore, tree: dict[str, Any], tmp_path: Path):
    for expected in (1, 2, 3):
        number = begin(store, validate(tree))
        assert number == expected
        Record(store, tmp_path, attempt=number).write()


def test_the_stored_spec_is_the_resolved_one(store: OwnedStore, tree: dict[str, Any]):
    spec = validate(tree)
    begin(store, spec)
    text = store.read("spec.yaml").decode()
    assert spec.digest in text
    assert "learning_rate: 0.0002" in text
    assert check_owner(store, spec) is False


def test_a_spec_with_rows_held_out_by_the_user_reads_back(store: OwnedStore, tree: dict[str, Any]):
    tree["dataset"]["eval_path"] = "held"
    spec = validate(tree)
    begin(store, spec)
    assert check_owner(store, spec) is False


def test_a_run_that_came_to_nothing_gives_way_to_the_mended_spec(store: OwnedStore, tree: dict[str, Any]):
    begin(store, validate(tree))
    store.write("data/quarantine.jsonl", b"")
    tree["dataset"]["answer_column"] = "mended"
    assert begin(store, validate(tree)) == 1
    assert check_owner(store, validate(tree)) is False


def test_a_harmless_change_is_let_in_and_another_is_not(store: OwnedStore, tree: dict[str, Any]):
    begin(store, validate(tree))
    store.write("evaluation/before.partial.jsonl", b"")
    tree["checkpoint"] = {"keep": 5}
    begin(store, validate(tree))
    tree["lora"] = {"r": 4}
    with pytest.raises(SpecError, match="lora.r: 16 → 4"):
        begin(store, validate(tree))


@pytest.mark.parametrize(
    ("field", "value", "again"),
    [("max_new_tokens", 9, True), ("max_rows", 9, True), ("groups", ["sex"], False), ("confidence", 0.9, False)],
)
def test_answers_are_made_again_where_they_were_asked_for_otherwise(
    store: OwnedStore, tree: dict[str, Any], field: str, value: Any, again: bool
):
    """Whatever is trained stays; and however often the attempt dies that finds it so."""
    answers = ["evaluation/after.partial.jsonl", "evaluation/before.jsonl", "evaluation/extra.json"]
    begin(store, validate(tree))
    for key in (*answers, "evaluation/samples.jsonl", "checkpoints/step-00000001/MANIFEST.json"):
        store.write(key, b"{}")
    changed = validate(tree | {"evaluation": {field: value}})
    assert outdated(store, changed) == (answers if again else [])
    for _ in range(2):
        begin(store, changed)
        left = [entry.key for entry in store.list("evaluation/")]
        assert left == ([] if again else answers) + ["evaluation/samples.jsonl"]
        assert list(store.list("checkpoints/"))


def test_a_run_of_a_version_with_other_fields_is_told_and_restarted_on_request(store: OwnedStore, tree: dict[str, Any]):
    begin(store, validate(tree))
    text = store.read("spec.yaml").decode()
    store.write("spec.yaml", text.replace("checkpoint:", "checkpoint:\n  compile_cache: true").encode())
    store.write("evaluation/before.partial.jsonl", b"")
    with pytest.raises(SpecError, match=r"another version of this program.*\(checkpoint.compile_cache: no such field;"):
        begin(store, validate(tree))
    tree["output"]["on_conflict"] = "restart"
    assert begin(store, validate(tree)) == 1
    assert [entry.key for entry in store.list("evaluation/")] == []


def test_published_is_only_this_very_spec(store: OwnedStore, tree: dict[str, Any]):
    spec = validate(tree)
    assert not is_published(store, spec)
    begin(store, spec)
    store.write("RESULT.json", json.dumps({"result_digest": spec.result_digest}).encode())
    assert is_published(store, spec)
    assert not is_published(store, validate(tree | {"evaluation": {"groups": ["sex"]}}))
    tree["lora"] = {"r": 4}
    assert not is_published(store, validate(tree))
    with pytest.raises(SpecError, match="holds a run of another spec"):
        check_owner(store, validate(tree))


def die(store: OwnedStore, number: int, **status: Any) -> None:
    """What an attempt leaves behind that ended so."""
    import json

    ending = {"attempt": number, "stage": "train", "state": "failed", "exit_code": 70, "reason": "a bug"}
    store.write("status.json", json.dumps(ending | status).encode())


PREEMPTED = {"state": "preempted", "exit_code": 75, "reason": "stopped on SIGTERM"}


@pytest.mark.parametrize(
    ("others", "places"),
    [
        ([], "3 in stage train, after the checkpoint of step 0;"),
        ([{"stage": "load"}], "2 in stage train, .*; 1 in stage load, "),
        ([PREEMPTED], "3 in stage train"),
    ],
)
def test_dying_without_progress_stops_with_79(
    store: OwnedStore, tree: dict[str, Any], others: list[dict[str, Any]], places: str
):
    """Wherever it dies, and however often it is preempted in between."""
    spec = validate(tree)
    endings = [{}, *others, {"state": "running"}, {}][: 4 if PREEMPTED in others else 3]
    for expected, ending in enumerate(endings, 1):
        assert begin(store, spec) == expected
        die(store, expected, **ending)
    with pytest.raises(NoProgress, match=f"3 attempts died without any progress: {places}.*the last reason: "):
        begin(store, spec)
    if others:
        return
    tree["preemption"] = {"max_attempts_without_progress": 4}
    assert begin(store, validate(tree)) == 4


@pytest.mark.parametrize(
    ("used", "reason"), [(62.5, "62.5 GB of 64.0 GB of host memory were in use"), (20, "or its machine was")]
)
def test_the_last_reason_tells_want_of_memory_from_another_kill(
    store: OwnedStore, tree: dict[str, Any], used: float, reason: str
):
    """Nobody tells a pod why the one before it was killed."""
    tree["preemption"] = {"max_attempts_without_progress": 1}
    spec, memory = validate(tree), {"host_used": int(used * 1e9), "host_limit": 64 * 10**9}
    die(store, begin(store, spec), state="running", stage="load", **memory)
    with pytest.raises(NoProgress, match=reason):
        begin(store, spec)


def test_a_mended_input_starts_the_count_anew(store: OwnedStore, tree: dict[str, Any]):
    spec, mended = validate(tree), {"state": "failed", "exit_code": 65, "reason": "the data is wrong"}
    for number in range(1, 7):
        assert begin(store, spec) == number
        die(store, number, **(mended if number % 3 == 0 else {}))


def test_more_answers_are_progress(store: OwnedStore, tree: dict[str, Any]):
    """A long evaluation on a machine that is taken away without notice goes on from where it was."""
    spec = validate(tree)
    for number in range(1, 7):
        assert begin(store, spec) == number
        store.write("evaluation/before.partial.jsonl", b"{}\n" * number)
        die(store, number, stage="evaluate before", state="running")


def test_a_restart_that_is_killed_on_the_way_goes_on(tree: dict[str, Any], tmp_path: Path):
    """Nothing of the other run may be left to ours: until ours is written, its spec says whose the rest is."""
    there = []

    class Watched(LocalStore):
        def delete(self, keys: Any) -> None:
            super().delete(keys)
            there.append("spec.yaml" in [entry.key for entry in self.list()])

    store = OwnedStore(Watched(str(tmp_path / "output"), tmp_path / "output"))
    begin(store, validate(tree))
    for key in ("evaluation/before.jsonl", "checkpoints/step-00000001/MANIFEST.json", "RESULT.json"):
        store.write(key, b"{}")
    begin(store, validate(tree | {"lora": {"r": 4}, "output": tree["output"] | {"on_conflict": "restart"}}))
    assert len(there) == 3
    assert all(there)
    assert sorted(entry.key for entry in store.list()) == ["attempts.json", "spec.yaml", "written.json"]


def test_a_new_checkpoint_is_progress(store: OwnedStore, tree: dict[str, Any], tmp_path: Path):
    from job.checkpoint import commit

    spec = validate(tree)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "adapter_model.safetensors").write_bytes(b"x")
    for number in range(1, 8):
        assert begin(store, spec) == number
        commit(store, tmp_path / "state", step=number, epoch=0.1, spec_digest=spec.digest, attempt=number)
        die(store, number)
