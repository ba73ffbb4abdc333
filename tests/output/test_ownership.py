"""No file that a job did not write is ever deleted or overwritten, whatever lies in its output and whatever is done there."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.checkpoint import commit, prune
from job.config.loader import validate
from job.errors import JobError, SpecError
from job.output.ownership import begin, check_owner
from job.output.stored import open_output
from job.publish import keep_for_reports
from job.report.contents import Contents
from job.store import Conflict, OwnedStore, check_writable, open_store, upload_folder
from job.store.lease import acquire
from tests.conftest import Job

NAMES = (
    "report.html",
    "Report.html",
    "RESULT.json",
    "spec.yaml",
    "status.json",
    "attempts.json",
    "lease.json",
    "written.json",
    "probe-notes.txt",
    "adapter/README.md",
    "adapter/adapter_config.json",
    "adapter/notes.txt",
    "merged/model.safetensors",
    "merged/mine/model.safetensors",
    "data/train/0.png",
    "data/quarantine.jsonl",
    "logs/lab.txt",
    "logs/metrics.jsonl",
    "evaluation/before.jsonl",
    "evaluation/before.partial.jsonl",
    "evaluation/images/row-1.jpg",
    "evaluation/images/mine.jpg",
    "checkpoints/step-00000001/MANIFEST.json",
    "checkpoints/step-00000001/state",
    "checkpoints/step-00000002/MANIFEST.json",
    "checkpoints/step-00000002/writer-2/state",
    "checkpoints/notes/MANIFEST.json",
    "images",
)
HIDDEN = (".lab.lock", ".spec.yaml.lock", "adapter/.README.md.lock", "logs/.lab.0123456789ab.part", ".RESULT.json.lock")
"""Names beside those that a folder's store gives its own files."""
OURS = (b"{}", b'{"spec_digest": "x"}', b"name: lab\n", b'{"files": ["data/train/0.png"]}')
MEMORY = next((place for place in ("/dev/shm",) if Path(place).is_dir()), None)
"""Where a sync costs nothing: these stories have thousands."""
ACTIONS = ("begin", "begin another", "restart another", "restart", "work", "work more", "work on", "leave")


def spec_of(url: str, action: str) -> dict[str, Any]:
    return {
        "model": {"name_or_path": "lab/base"},
        "dataset": {"path": "lab/rows"},
        "lora": {"r": 4 if "another" in action else 8},
        "output": {"url": url, "on_conflict": "restart" if "restart" in action else "refuse"},
    }


def started(url: str, action: str) -> OwnedStore:
    """What `lead` does before the first stage."""
    spec = validate(spec_of(url, action))
    store = open_output(spec)
    check_owner(store, spec)
    check_writable(store)
    with acquire(store.inner, "a test", 5):
        begin(store, spec)
    return store


def work(store: OwnedStore, made: Path, step: int) -> None:
    """What stages write and delete: each at its own key, so that one which is refused leaves the others to do."""
    images = {f"row-{number}": b"jpg" for number in range(step)}
    each: list[Callable[[], Any]] = [
        lambda: commit(store, made, step=step, epoch=0.5, spec_digest="d", attempt=1),
        lambda: prune(store, keep=1, verified=step),
        lambda: store.write("data/quarantine.jsonl", b""),
        lambda: store.write("evaluation/before.partial.jsonl", b"{}"),
        lambda: store.write("evaluation/before.jsonl", b"{}"),
        lambda: store.delete(["evaluation/before.partial.jsonl"]),
        lambda: store.write("logs/metrics.jsonl", b"{}"),
        lambda: upload_folder(store, made, "adapter"),
        lambda: store.upload_pieces(
            lambda: (memoryview(part) for part in (b"weights",)), 7, "merged/model.safetensors"
        ),
        lambda: keep_for_reports(store, Contents(), images),
        lambda: store.delete([entry.key for entry in store.list("merged/")]),
        lambda: store.write("report.html", b"page"),
        lambda: store.write("RESULT.json", b'{"spec_digest": "d"}'),
    ]
    for one in each[: len(each) if step % 2 else -1]:
        with suppress(JobError):
            one()


def live(url: str, there: Callable[[str], bytes | None], put: Callable[[str, bytes], bool], days: Any) -> None:
    """Do what `days` say, and look after each whether every file of somebody else is as it was."""
    mine, store = dict[str, bytes](), None
    with tempfile.TemporaryDirectory() as made:
        for name in ("README.md", "state"):
            Path(made, name).write_text(name)
        for step, (action, names, content) in enumerate(days, 1):
            for name in names:
                if put(name, data := content + b" " * step):
                    mine[name] = data
            with suppress(JobError):
                if action == "leave":
                    store = None
                elif "work" in action:
                    if store is not None:
                        work(store, Path(made), step)
                else:
                    store = None
                    store = started(url, action)
            assert {name: there(name) for name in mine} == mine


def days(names: tuple[str, ...]) -> Any:
    """Most stories begin with a job in an empty output: where something else lies, little is allowed to happen."""
    files = st.lists(st.sampled_from(names), max_size=6)
    first = st.tuples(st.just("begin"), st.just([]) | st.just([]) | files, st.sampled_from(OURS))
    day = st.tuples(st.sampled_from(ACTIONS), files, st.sampled_from(OURS))
    return st.tuples(first, st.lists(day, min_size=3, max_size=7)).map(lambda both: [both[0], *both[1]])


@settings(max_examples=150)
@given(days(NAMES + HIDDEN), st.sampled_from(["", "merged", "data", "report.html", "evaluation/images"]))
def test_a_folder_keeps_every_file_that_no_job_wrote(story: Any, link: str):
    """A name in the output may also be a link to the user's files elsewhere."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as home:
        root, elsewhere = Path(home, "output"), Path(home, "elsewhere")
        elsewhere.mkdir()
        files = {elsewhere / name.rpartition("/")[2]: b"far" for name in NAMES}
        for file, data in files.items():
            file.write_bytes(data)
        if link:
            (root / link).parent.mkdir(parents=True)
            (root / link).symlink_to(elsewhere / "report.html" if "." in link else elsewhere)

        def put(name: str, data: bytes) -> bool:
            """Somebody puts a file where none is."""
            try:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                with (root / name).open("xb") as stream:
                    stream.write(data)
            except OSError:
                return False
            return True

        def there(name: str) -> bytes | None:
            return (root / name).read_bytes() if (root / name).is_file() else None

        live(str(root), there, put, story)
        assert all(file.is_file() and file.read_bytes() == data for file, data in files.items())


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(days(NAMES))
def test_a_bucket_keeps_every_object_that_no_job_wrote(new_bucket: Callable[[], str], story: Any):
    bucket, client = new_bucket(), boto3.client("s3")
    beside = {"runs/ab/adapter/README.md": b"of another", "runs/report.html": b"of all"}
    for key, data in beside.items():
        client.put_object(Bucket=bucket, Key=key, Body=data)

    def there(name: str) -> bytes | None:
        with suppress(client.exceptions.NoSuchKey):
            data: bytes = client.get_object(Bucket=bucket, Key=f"runs/a/{name}")["Body"].read()
            return data
        return None

    def put(name: str, data: bytes) -> bool:
        if there(name) is not None:
            return False
        client.put_object(Bucket=bucket, Key=f"runs/a/{name}", Body=data)
        return True

    live(f"s3://{bucket}/runs/a", there, put, story)
    for key, data in beside.items():
        assert client.get_object(Bucket=bucket, Key=key)["Body"].read() == data
    client.close()


@pytest.mark.parametrize("command", ["check", "run"])
def test_an_output_that_is_not_empty_and_holds_no_job_is_refused(
    job: Job, tree: dict[str, Any], tmp_path: Path, command: str
):
    """Under restart too: there is nothing in it that a job recorded."""
    (tmp_path / "output" / "logs").mkdir(parents=True)
    (tmp_path / "output" / "logs" / "lab.txt").write_text("precious")
    for conflict in ("refuse", "restart"):
        done = job(command, JOB_SPEC=yaml.safe_dump(tree | {"output": tree["output"] | {"on_conflict": conflict}}))
        assert done.returncode == 78
        assert done.stderr.splitlines()[-1].startswith(
            f"exit 78: output.url: {tmp_path}/output is not empty: it holds a file that no job of this version recorded as its "
            "own (logs/lab.txt); choose an empty folder or prefix"
        )
    assert [path.name for path in (tmp_path / "output").rglob("*") if path.is_file()] == ["lab.txt"]


@pytest.mark.parametrize("name", ["spec.yaml", "lease.json", "written.json", "RESULT.json", "status.json"])
def test_a_file_that_only_has_the_name_of_ours_makes_no_job(tree: dict[str, Any], tmp_path: Path, name: str):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / name).write_text(yaml.safe_dump(tree) if name == "spec.yaml" else '{"files": []}')
    spec = validate(tree)
    with pytest.raises(SpecError, match=rf"is not empty: .*\({name}\)"):
        check_owner(open_output(spec), spec)


def test_what_a_job_leaves_that_died_at_once_is_no_foreign_file(tree: dict[str, Any], tmp_path: Path):
    spec = validate(tree)
    store = open_output(spec)
    with acquire(store.inner, "a test", 5):
        store.inner.write("probe-0123456789ab", b"a")
    assert check_owner(store, spec) is False
    assert begin(store, spec) == 1


def test_a_mended_spec_leaves_what_somebody_put_beside_the_run_that_failed(tmp_path: Path):
    """It gave way to the mended one, since it came to nothing; in between, the user's own files came into its folder."""
    url, theirs = str(tmp_path / "output"), ("data/train/0.png", "logs/lab.txt", "adapter/notes.txt")
    started(url, "begin").write("data/quarantine.jsonl", b"")
    for name in theirs:
        (tmp_path / "output" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "output" / name).write_text(name)
    store = started(url, "begin another")
    assert all((tmp_path / "output" / name).read_text() == name for name in theirs)
    assert "data/quarantine.jsonl" not in [entry.key for entry in store.list()]


def test_restart_names_what_it_deletes_and_deletes_that_alone(
    tree: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("job"), "propagate", True)
    caplog.set_level("INFO")
    store = started(str(tmp_path / "output"), "begin")
    work(store, tmp_path, 1)
    store.write("adapter/adapter_model.safetensors", b"123")
    (tmp_path / "output" / "adapter" / "notes.txt").write_text("mine")
    written = {entry.key for entry in store.list()} - {"adapter/notes.txt"}
    started(str(tmp_path / "output"), "restart another")
    said = "\n".join(record.getMessage() for record in caplog.records)
    for key in written - {"spec.yaml", "written.json", "lease.json"}:
        assert key.rpartition("/")[2] in said, key
    assert "adapter: adapter_model.safetensors" in said
    assert "notes.txt" not in said
    left = {entry.key for entry in store.list()}
    assert left == {"adapter/notes.txt", "attempts.json", "lease.json", "spec.yaml", "written.json"}


def test_a_write_onto_somebody_elses_file_is_refused_with_its_name(store: Any):
    store.write("report.html", b"mine")
    with pytest.raises(SpecError, match=r"holds report.html, which no job wrote there, .*move it away"):
        OwnedStore(store).write("report.html", b"page")
    assert store.read("report.html") == b"mine"


def test_a_writer_with_an_old_record_cannot_put_it_in_place_of_the_new_one(store: Any):
    """It slept while another took the lease over, and wakes up."""
    sleeper, other = OwnedStore(store), OwnedStore(store)
    sleeper.write("a", b"1")
    other.write("b", b"2")
    with pytest.raises(Conflict):
        sleeper.write("c", b"3")
    assert OwnedStore(store).read_record() == {"a", "b"}


def test_what_is_gone_when_an_attempt_begins_is_not_its_own_any_more(store: Any):
    first = OwnedStore(store)
    first.write("a", b"1")
    first.write("b", b"2")
    store.delete(["a"])
    second = OwnedStore(store)
    assert second.take_up() == {"b"}
    store.write("a", b"somebody's")
    OwnedStore(store).delete(["a", "b"])
    assert [entry.key for entry in store.list()] == ["a", "written.json"]


def test_only_what_dead_writers_of_our_keys_began_is_given_up(tmp_path: Path):
    store = OwnedStore(open_store(str(tmp_path)))
    store.write("adapter/README.md", b"1")
    dead = tmp_path / "adapter" / ".README.md.0123456789ab.part"
    theirs = [tmp_path / "adapter" / ".notes.txt.0123456789ab.part", tmp_path / ".lab.lock"]
    for path in (dead, *theirs):
        path.write_bytes(b"x")
    store.take_up()
    assert not dead.exists()
    store.delete(["adapter/README.md"])
    assert all(path.exists() for path in theirs)


def test_the_page_of_a_report_that_no_job_wrote_is_not_written_over(job: Job, tmp_path: Path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "report.html").write_text("mine")
    (tmp_path / "evaluation" / "report.json").write_text("{}")
    done = job("report", str(tmp_path))
    assert done.returncode == 78
    assert "with --to FILE" in done.stderr
    assert (tmp_path / "report.html").read_text() == "mine"
    done = job("report", str(tmp_path), "--to", f"{tmp_path}/none/page.html")
    assert done.returncode == 78, done.stderr
