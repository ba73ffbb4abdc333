"""Whose an output is."""

from pathlib import Path
from typing import Any

import pytest

from job.errors import NoProgress, SpecError
from job.output import begin, check_owner, is_published
from job.record import Record
from job.specfile import validate
from job.status import describe_status
from job.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "output"))


def test_attempts_are_counted_in_the_output(store: Store, tree: dict[str, Any], tmp_path: Path):
    for expected in (1, 2, 3):
        number = begin(store, validate(tree))
        assert number == expected
        Record(store, tmp_path, attempt=number).write()


def test_the_stored_spec_is_the_resolved_one(store: Store, tree: dict[str, Any]):
    spec = validate(tree)
    begin(store, spec)
    text = store.read("spec.yaml").decode()
    assert spec.digest in text
    assert "learning_rate: 0.0002" in text
    assert check_owner(store, spec) is False


def test_a_spec_with_rows_held_out_by_the_user_reads_back(store: Store, tree: dict[str, Any]):
    tree["dataset"]["eval_path"] = "held"
    spec = validate(tree)
    begin(store, spec)
    assert check_owner(store, spec) is False


def test_a_run_that_came_to_nothing_gives_way_to_the_mended_spec(store: Store, tree: dict[str, Any]):
    begin(store, validate(tree))
    store.write("data/quarantine.jsonl", b"")
    tree["dataset"]["path"] = "mended"
    assert begin(store, validate(tree)) == 1
    assert check_owner(store, validate(tree)) is False


def test_a_harmless_change_is_let_in_and_another_is_not(store: Store, tree: dict[str, Any]):
    begin(store, validate(tree))
    store.write("evaluation/before.partial.jsonl", b"")
    tree["checkpoint"] = {"keep": 5}
    begin(store, validate(tree))
    tree["lora"] = {"r": 4}
    with pytest.raises(SpecError, match="lora.r: 16 → 4"):
        begin(store, validate(tree))


def test_published_is_only_this_very_spec(store: Store, tree: dict[str, Any]):
    spec = validate(tree)
    assert not is_published(store, spec)
    store.write("RESULT.json", b'{"spec_digest": "%s"}' % spec.digest.encode())
    assert is_published(store, spec)
    tree["lora"] = {"r": 4}
    with pytest.raises(SpecError, match="holds a run of another spec"):
        is_published(store, validate(tree))


def test_a_job_that_went_silent_is_told_from_a_running_one(store: Store):
    import json

    running = {"state": "running", "stage": "train", "step": 3, "steps": 9, "updated": "2020-01-01T00:00:00Z"}
    store.write("status.json", json.dumps(running).encode())
    assert "killed, or cut off from its store" in describe_status(store)
    from job.record import now

    store.write("status.json", json.dumps(running | {"updated": now()}).encode())
    assert "running, stage train" in describe_status(store)
    assert "step 3 of 9" in describe_status(store)


def die(store: Store, number: int, **status: Any) -> None:
    """What an attempt leaves behind that ended so."""
    import json

    ending = {"attempt": number, "stage": "train", "state": "failed", "exit_code": 70, "reason": "a bug"}
    store.write("status.json", json.dumps(ending | status).encode())


def test_dying_at_the_same_place_again_and_again_stops_with_79(store: Store, tree: dict[str, Any]):
    spec = validate(tree)
    for expected in (1, 2, 3):
        assert begin(store, spec) == expected
        die(store, expected, state="running" if expected == 2 else "failed")
    with pytest.raises(NoProgress, match=r"3 attempts in a row died at the same place: stage train, after the.*step 0"):
        begin(store, spec)
    tree["preemption"] = {"max_attempts_without_progress": 4}
    assert begin(store, validate(tree)) == 4


@pytest.mark.parametrize(
    "between",
    [
        {"state": "preempted", "exit_code": 75, "reason": "stopped on SIGTERM"},
        {"state": "failed", "exit_code": 65, "reason": "the data is wrong"},
        {"stage": "evaluate after"},
    ],
)
def test_a_death_elsewhere_a_preemption_or_a_mended_input_starts_the_count_anew(
    store: Store, tree: dict[str, Any], between: dict[str, Any]
):
    spec = validate(tree)
    for number in range(1, 7):
        assert begin(store, spec) == number
        die(store, number, **(between if number % 3 == 0 else {}))


def test_a_new_checkpoint_is_progress(store: Store, tree: dict[str, Any], tmp_path: Path):
    from job.checkpoint import commit

    spec = validate(tree)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "adapter_model.safetensors").write_bytes(b"x")
    for number in range(1, 8):
        assert begin(store, spec) == number
        commit(store, tmp_path / "state", step=number, epoch=0.1, spec_digest=spec.digest, attempt=number)
        die(store, number)
