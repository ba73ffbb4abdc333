"""A run is of the rows that it began with: what changed is counted, and said."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from job.checkpoint import commit
from job.config.loader import validate
from job.data.facts import QuarantinedRow
from job.data.images import UNKNOWN_HOST
from job.data.prepare import prepare
from job.errors import DataError, SpecError, Unavailable
from job.output.identity import Identity, changes, from_json, row_identity
from job.output.ownership import begin, check_data, holds_work, take_data
from job.output.stored import open_output
from job.planning.stage_in import refuse_lost_hosts
from job.store import LocalStore, OwnedStore, open_store, upload_folder
from tests.data.test_data import png

Rows = list[dict[str, Any]]


def write(rows: Rows, folder: Path) -> None:
    """An image folder whose pictures are grey as `grey` says."""
    folder.mkdir(exist_ok=True)
    for row in rows:
        (folder / row["file_name"]).write_bytes(png(row["grey"], (16, 16)))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(count: int) -> Rows:
    fields = ("file_name", "caption", "grey", "patient", "weight", "finding", "sex")
    return [dict(zip(fields, (f"{n}.png", f"c {n}", n, f"p{n}", 1, "a", "f"), strict=True)) for n in range(count)]


@pytest.fixture
def spec(tree: dict[str, Any]) -> dict[str, Any]:
    labels = {"labels": {"finding": {"column": "finding"}}, "groups": ["sex"]}
    data = {"eval_fraction": 0.3, "group_column": "patient", "weight_column": "weight"}
    return tree | {"dataset": tree["dataset"] | data, "evaluation": labels}


def identity(spec: dict[str, Any], tmp_path: Path) -> Identity:
    found = prepare(validate(spec), tmp_path / "scratch").identity
    assert found is not None
    return found


CHANGES = {
    "caption": (lambda rows: [rows[0] | {"caption": "other"}, *rows[1:]], "1 with different texts or values"),
    "picture": (lambda rows: [rows[0] | {"grey": 200}, *rows[1:]], "1 with different images"),
    "weight": (lambda rows: [rows[0] | {"weight": 2}, *rows[1:]], "1 with different texts or values"),
    "removed": (lambda rows: rows[1:], "1 removed"),
    "added": (lambda rows: [rows[0] | {"file_name": "new.png", "grey": 99}, *rows], "1 added"),
    "order": (lambda rows: [rows[1], rows[0], *rows[2:]], "in a different order"),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("side", ["train", "held"])
def test_each_kind_of_change_is_told_on_its_side(spec: dict[str, Any], tmp_path: Path, kind: str, side: str):
    change, said = CHANGES[kind]
    both = {"train": rows_of(12)[:8], "held": rows_of(12)[8:]}
    folders = {"train": tmp_path / "data", "held": tmp_path / "held"}
    spec["dataset"]["eval_path"] = str(folders["held"])
    del spec["dataset"]["eval_fraction"]
    for name, folder in folders.items():
        write(both[name], folder)
    before = identity(spec, tmp_path)
    assert changes(before, identity(spec, tmp_path)) == []
    write(change(both[side]), folders[side])
    [told] = changes(before, identity(spec, tmp_path))
    assert told.startswith("held-out rows (" if side == "held" else "training rows (")
    assert said in told


def test_rows_that_come_change_which_are_held_out(spec: dict[str, Any], tmp_path: Path):
    write(rows_of(12), tmp_path / "data")
    before = identity(spec, tmp_path)
    write(rows_of(40), tmp_path / "data")
    assert [told.partition(" (")[0] for told in changes(before, identity(spec, tmp_path))] == [
        "training rows",
        "held-out rows",
    ]


def test_where_the_rows_lie_is_no_part_of_them(spec: dict[str, Any], tmp_path: Path):
    """Nor are a file's name, its time, and the folder that it was copied to."""
    write(rows_of(6), tmp_path / "data")
    before = identity(spec, tmp_path)
    write([row | {"file_name": f"again-{row['file_name']}"} for row in rows_of(6)], tmp_path / "elsewhere")
    spec["dataset"]["path"] = str(tmp_path / "elsewhere")
    assert changes(before, identity(spec, tmp_path)) == []


def test_what_only_measuring_reads_is_no_part_of_them(spec: dict[str, Any], tmp_path: Path):
    """Labels and groups are read anew for both measurements, as spec and data have them then."""
    write(rows_of(6), tmp_path / "data")
    before = identity(spec, tmp_path)
    write([row | {"finding": "b", "sex": "m"} for row in rows_of(6)], tmp_path / "data")
    spec["evaluation"] = {"labels": {"other": {"column": "sex"}}}
    assert changes(before, identity(spec, tmp_path)) == []


def test_a_result_that_says_otherwise_goes_once_the_rows_are_known(
    begun: tuple[dict[str, Any], OwnedStore], tmp_path: Path
):
    spec, store = begun
    result = json.dumps({"result_digest": validate(spec).result_digest}).encode()
    store.write("RESULT.json", result)
    (tmp_path / "data").rename(tmp_path / "moved")
    write(rows_of(9), tmp_path / "data")
    with pytest.raises(DataError, match="is not the data that the run in"):  # nothing is lost to other rows
        take_data(store, validate(spec), identity(spec, tmp_path))
    assert store.read("RESULT.json") == result
    moved = spec | {"dataset": spec["dataset"] | {"path": str(tmp_path / "moved")}}
    assert begin(store, validate(moved)) == 2
    take_data(store, validate(moved), identity(moved, tmp_path))
    assert "RESULT.json" not in [entry.key for entry in store.list()]


def test_the_rows_of_an_earlier_version_are_refused_as_such():
    with pytest.raises(SpecError, match="another version of this program .*format 1"):
        from_json(b'{"format": 1, "train": {"digests": ""}, "held_out": {"digests": ""}}')


def test_a_look_at_some_rows_says_nothing_of_all(spec: dict[str, Any], tmp_path: Path):
    write(rows_of(6), tmp_path / "data")
    assert prepare(validate(spec), tmp_path / "scratch", most=3).identity is None
    assert prepare(validate(spec), tmp_path / "scratch", most=6).identity == identity(spec, tmp_path)


ROWS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=12)


@given(ROWS, ROWS)
def test_what_is_told_accounts_for_every_row(old: list[tuple[int, int]], new: list[tuple[int, int]]):
    """Whatever became of the rows: nothing is told where nothing changed, and what came and went adds up."""
    sides = [b"".join(row_identity([str(p)] if p else [], t) for t, p in rows) for rows in (old, new)]
    told = changes(Identity(sides[0], b""), Identity(sides[1], b""))
    assert (told == []) == (old == new)
    if told:
        counts = {"removed": 0, "added": 0}
        for part in told[0].partition("): ")[2].split(", "):
            number, _, what = part.partition(" ")
            counts[what] = int(number)
        assert counts["added"] - counts["removed"] == len(new) - len(old)


def test_what_is_stored_reads_back_and_other_files_do_not():
    kept = Identity(row_identity(["a"], "t") * 3, row_identity([], "u"))
    assert from_json(kept.to_json()) == kept
    assert "rows" in json.loads(kept.to_json())["train"]
    for data in (b"", b"{}", b"[]", b'{"train": 1, "held_out": 2}'):
        assert from_json(data) is None


@pytest.fixture
def begun(spec: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], OwnedStore]:
    """A run with a checkpoint, and its data as they were then."""
    write(rows_of(12), tmp_path / "data")
    store = open_output(validate(spec))
    begin(store, validate(spec))
    assert take_data(store, validate(spec), identity(spec, tmp_path)) is False
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "adapter_model.safetensors").write_bytes(b"x")
    commit(store, tmp_path / "state", step=5, epoch=0.1, spec_digest="", attempt=1)
    return spec, store


def test_other_rows_are_refused_by_name_with_the_cure(begun: tuple[dict[str, Any], OwnedStore], tmp_path: Path):
    spec, store = begun
    write([row | {"caption": "other"} for row in rows_of(3)] + rows_of(12)[3:], tmp_path / "data")
    for _ in range(2):  # what was refused is not taken for the truth by the next attempt
        with pytest.raises(
            DataError,
            match=r"dataset.path: .*/data is not the data that the run in .*/output began with; .*different texts or values.*; "
            "restore it, or set output.on_conflict to restart",
        ):
            take_data(store, validate(spec), identity(spec, tmp_path))
    write(rows_of(12), tmp_path / "data")
    assert take_data(store, validate(spec), identity(spec, tmp_path)) is False
    assert any(entry.key.endswith("MANIFEST.json") for entry in store.list())


def test_restart_begins_anew_with_the_rows_as_they_are(begun: tuple[dict[str, Any], OwnedStore], tmp_path: Path):
    spec, store = begun
    write(rows_of(9), tmp_path / "data")
    spec["output"]["on_conflict"] = "restart"
    now = identity(spec, tmp_path)
    assert check_data(store, validate(spec), now) is True
    assert take_data(store, validate(spec), now) is True
    assert [entry.key for entry in store.list()] == ["attempts.json", "data/identity.json", "spec.yaml", "written.json"]
    assert take_data(store, validate(spec), now) is False


class Dying(LocalStore):
    """A folder whose deletions are cut off after so many files."""

    left = 0

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            if not self.left:
                raise Unavailable("killed")
            self.left -= 1
            super().delete([key])


def test_a_restart_that_is_cut_off_is_taken_up_by_the_next_attempt(
    begun: tuple[dict[str, Any], OwnedStore], tmp_path: Path
):
    """However far it came: no answer and no checkpoint of the other rows is left to ours."""
    spec, store = begun
    for key in ("evaluation/before.jsonl", "evaluation/report.json", "logs/metrics.jsonl", "adapter/a"):
        store.write(key, b"{}")
    write(rows_of(9), tmp_path / "data")
    spec["output"]["on_conflict"] = "restart"
    now, restarted = identity(spec, tmp_path), []
    for _ in range(20):
        dying = Dying(store.url, tmp_path / "output")
        dying.left = 1
        again = OwnedStore(dying)
        again.take_up()
        try:
            restarted.append(take_data(again, validate(spec), now))
            break
        except Unavailable:
            continue
    assert len(restarted) == 1
    assert not holds_work(store, store.read_record() or frozenset())
    assert from_json(store.read("data/identity.json")) == now


def test_rows_that_changed_before_there_was_any_work_are_taken_as_they_are(spec: dict[str, Any], tmp_path: Path):
    store = open_output(validate(spec))
    begin(store, validate(spec))
    for count in (12, 9):
        write(rows_of(count), tmp_path / "data")
        now = identity(spec, tmp_path)
        assert take_data(store, validate(spec), now) is False
    assert from_json(store.read("data/identity.json")) == now


def test_a_table_that_took_the_place_of_one_with_the_same_time_is_seen(spec: dict[str, Any], tmp_path: Path):
    """As where every file has the time of the archive, or of the image, that it came in."""
    write(rows_of(8), tmp_path / "data")
    (tmp_path / "data" / "metadata.jsonl").unlink()
    file = tmp_path / "data" / "rows.parquet"

    def found(caption: str) -> Identity:
        Dataset.from_list([row | {"caption": caption} for row in rows_of(8)]).to_parquet(file)
        os.utime(file, (0, 0))
        return identity(spec, tmp_path)

    assert found("c one") == (before := found("c one"))
    assert len(changes(before, found("c two"))) == 2
    assert len(list((tmp_path / "scratch").rglob("*.arrow"))) == 1


def test_images_on_hosts_that_are_not_known_now_are_an_outage_where_the_run_had_them(tmp_path: Path):
    bad, now = [QuarantinedRow(1, UNKNOWN_HOST)], Identity(b"t" * 48, b"h" * 16)
    first, later = (OwnedStore(open_store(str(tmp_path / name))) for name in ("first", "later"))
    later.write("data/identity.json", Identity(b"t" * 64, b"h" * 16).to_json())
    for rows in (now, None):
        refuse_lost_hosts(first, bad, rows)
        with pytest.raises(Unavailable, match="image hosts of 1 rows cannot be resolved now.*run again once"):
            refuse_lost_hosts(later, bad, rows)
    refuse_lost_hosts(later, bad, Identity(b"t" * 64, b"h" * 16))  # they were bad from the first
    refuse_lost_hosts(later, [QuarantinedRow(1, "no caption")], now)


def test_objects_in_a_bucket_that_changed_are_seen(spec: dict[str, Any], tmp_path: Path, bucket: str):
    """Fetched to a scratch that has the earlier ones, and to one that has none."""
    write(rows_of(6), tmp_path / "data")
    upload_folder(open_store(f"s3://{bucket}"), tmp_path / "data", "rows")
    spec["dataset"]["path"] = f"s3://{bucket}/rows"
    before = identity(spec, tmp_path)
    open_store(f"s3://{bucket}/rows").write("0.png", png(201, (16, 16)))
    for scratch in ("", "another"):
        [told] = changes(before, identity(spec, tmp_path / scratch))
        assert "1 with different images" in told
