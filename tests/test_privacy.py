"""No text of a row is in what schedulers, monitors and people on call see: logs, statuses, metrics, termination messages."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.config.loader import validate
from job.data import BadRows
from job.data.conversations import conversation
from job.data.facts import as_jsonl
from job.data.prepare import prepare
from job.data.remote import fetched
from job.errors import DataError, SpecError, Unavailable
from job.runtime.exit import traced
from job.runtime.prometheus import exposition
from job.runtime.status import start_logging
from job.store import open_store
from tests.conftest import Job, job_environment
from tests.forked import Forks
from tests.s3 import make_bucket, point_at

CAPTION, QUESTION, LABEL = "zuckerkandl", "quackenbush", "wolfenstein"
MARKERS = (CAPTION, QUESTION, LABEL)
SECRET = "hushhushhush"
SIGNED = f"X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}"


@pytest.fixture
def rows(demo: Path, tmp_path: Path) -> Path:
    return rows_at(tmp_path / "data", demo)


def rows_at(folder: Path, demo: Path) -> Path:
    """Rows of the demo's, each with a word of its own kind in caption, question and label."""
    folder.mkdir()
    lines = (demo / "data" / "metadata.jsonl").read_text().splitlines()[:28]
    made = []
    for line in lines:
        row = json.loads(line)
        row |= {"caption": f"{row['caption']} {CAPTION}.", "question": f"What of {QUESTION}?", "finding": LABEL}
        (folder / row["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        (folder / row["file_name"]).hardlink_to(demo / "data" / row["file_name"])
        made.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(made) + "\n")
    return folder


def spec_of(rows: Path, demo: Path, output: Path | str) -> dict[str, Any]:
    return {
        "model": {"name_or_path": str(demo / "base")},
        "dataset": {"path": str(rows), "instruction_column": "question", "group_column": "patient_id"},
        "training": {"max_steps": 2, "logging_steps": 1},
        "evaluation": {
            "max_rows": 4,
            "max_new_tokens": 4,
            "eval_steps": 1,
            "explained_rows": 0,
            "labels": {"finding": {"column": "finding"}},
            "groups": ["finding"],
        },
        "export": {"gate": {"rows": 2}},
        "output": {"url": str(output)},
    }


def assert_silent(text: str, where: str) -> None:
    assert [word for word in MARKERS if word in text.casefold()] == [], f"{where}:\n{text}"


@contextmanager
def signed(rows: Path) -> Iterator[Path]:
    """The same rows with their images behind signed URLs of a server; two more with a password in theirs, and a token in that
    which a server sends back."""

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/away"):
                self.send_response(302)
                self.send_header("Location", f"/none.png?{SIGNED}")
                return self.end_headers()
            return super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=rows))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    place = f"127.0.0.1:{server.server_port}"
    made = [json.loads(line) for line in (rows / "metadata.jsonl").read_text().splitlines()]
    urls = [f"http://{place}/{row['file_name']}?{SIGNED}&token={SECRET}" for row in made]
    urls += [f"http://user:{SECRET}@{place}/a.png", f"http://{place}/away?{SIGNED}"]
    made = [row | {"image": url} for row, url in zip([*made, made[0], made[0]], urls, strict=True)]
    table = rows.parent / "signed.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in made))
    yield table
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def published(
    demo: Path, s3_server: str, forks: Forks, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, Any], dict[str, str], dict[str, bytes]]]:
    """The spec of a job that ran to its end with secrets all around it; all that it said, and then `status`, `check` and a second
    start; and all that it wrote."""
    folder = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch, signed(rows_at(folder / "data", demo)) as table:
        point_at(s3_server, patch)
        output = f"s3://{make_bucket()}/output"
        tree = spec_of(table, demo, output)
        tree["dataset"] |= {"image_hosts": ["127.0.0.1"], "max_bad_fraction": 0.2}
        settings = {"JOB_SPEC": yaml.safe_dump(tree)}
        settings["AWS_ENDPOINT_URL_S3"] = s3_server.replace("//", f"//user:{SECRET}@")

        def job(*command: str) -> str:
            done = forks.run(list(command), job_environment(folder, **settings), timeout=240)
            assert done.returncode == 0, done.stderr
            return done.stderr + done.stdout

        told = {
            "log": job("run"),
            "log of a second start": job("run"),
            "status": job("status", output),
            "check": job("check"),
        }
        store = open_store(output)
        told["Prometheus"] = exposition(json.loads(store.read("status.json")))
        yield tree, told, {entry.key: store.read(entry.key) for entry in store.list()}


def test_no_text_of_a_row_is_in_what_a_whole_job_says(
    published: tuple[dict[str, Any], dict[str, str], dict[str, bytes]],
):
    _, told, written = published
    told = told | {name: written[name].decode() for name in ("status.json", "logs/metrics.jsonl", "attempts.json")}
    for where, text in told.items():
        assert text
        assert_silent(text, where)
    assert CAPTION in written["data/example.txt"].decode().casefold()  # for who may read the output
    assert CAPTION in written["evaluation/after.jsonl"].decode()


def test_no_credential_is_in_what_a_whole_job_says_or_writes(
    published: tuple[dict[str, Any], dict[str, str], dict[str, bytes]],
):
    _, told, written = published
    reasons = written["data/quarantine.jsonl"].decode()
    assert "its URL contains a user or password" in reasons
    assert "there is no image at its URL" in reasons
    assert {"spec.yaml", "report.html", "RESULT.json", "adapter/README.md", "evaluation/report.json"} <= written.keys()
    everything = told | {name: data.decode(errors="replace") for name, data in written.items()}
    assert [where for where, text in everything.items() if SECRET in text] == []


@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_privacy_that_is_wanted_later_is_carried_out_on_what_is_published(
    published: tuple[dict[str, Any], dict[str, str], dict[str, bytes]],
    job: Job,
    tmp_path: Path,
    where: str,
    request: pytest.FixtureRequest,
):
    tree, _, before = published
    url = str(tmp_path / "output") if where == "folder" else f"s3://{request.getfixturevalue('bucket')}/output"
    store = open_store(url)
    for key, data in (before | {"evaluation/images/mine.jpg": b"a lab's own"}).items():
        store.write(key, data)
    wanted = yaml.safe_dump(tree | {"output": {"url": url}, "privacy": {"report_images": False}})
    said = job("run", JOB_SPEC=wanted)
    assert (said.returncode, "removed images and texts of rows from the report" in said.stderr) == (0, True), (
        said.stderr
    )
    if where == "folder":
        assert "removed images" not in job("run", JOB_SPEC=wanted).stderr
    after = {entry.key: store.read(entry.key) for entry in store.list()}
    gone = before.keys() - after.keys()
    assert gone
    assert all(key.startswith("evaluation/images/") for key in gone)
    assert [key for key in after if key.startswith("evaluation/images/")] == ["evaluation/images/mine.jpg"]
    for page in ("report.html", "data/example.txt"):
        assert CAPTION in before[page].decode().casefold()
        assert CAPTION not in after[page].decode().casefold()
    assert (b"data:image/jpeg" in before["report.html"], b"data:image/jpeg" in after["report.html"]) == (True, False)
    assert yaml.safe_load(after["spec.yaml"])["privacy"]["report_images"] is False
    for key, facts in json.loads(after["RESULT.json"])["files"].items():
        assert facts == {"size": len(after[key]), "sha256": hashlib.sha256(after[key]).hexdigest()}
        assert (before[key] == after[key]) is not key.endswith("README.md")


PLACES = {
    "dataset.path": f"https://user:{SECRET}@example.org/rows.csv",
    "dataset.eval_path": f"https://example.org/rows.csv?token={SECRET}",
    "model.name_or_path": f"s3://key:{SECRET}@bucket/base",
    "lora.init_adapter": f"s3://bucket/adapter?X-Amz-Signature={SECRET}",
    "output.url": f"hf://user:{SECRET}@example.org/out",
}


@pytest.mark.parametrize("field", PLACES)
def test_credentials_in_a_spec_are_refused_without_being_told(tree: dict[str, Any], field: str):
    section, _, name = field.partition(".")
    tree.setdefault(section, {})[name] = PLACES[field]
    with pytest.raises(SpecError, match=f"{field}: .* contains credentials or options") as refused:
        validate(tree)
    assert SECRET not in str(refused.value)


def test_what_libraries_say_of_a_url_is_told_without_its_credentials(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://user:{SECRET}@127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setattr("job.store.connection.ATTEMPTS", 1)
    with pytest.raises(Unavailable, match="Nothing answers at") as away:
        open_store("s3://bucket").read("a")
    monkeypatch.setattr("job.data.remote.TRIES", 1)
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1, which has images of rows") as closed:
        fetched(f"http://127.0.0.1:9/a.png?{SIGNED}", tmp_path, ["127.0.0.1"])
    start_logging()
    logging.getLogger("job").warning("a library says %s", f"https://user:{SECRET}@host/a?token={SECRET}")
    told = [
        str(away.value),
        str(closed.value),
        traced(ValueError(f"http://h/?{SIGNED}"), show=True),
        capfd.readouterr().err,
    ]
    assert "a library says" in told[-1]
    assert [text for text in told if SECRET in text] == []


BROKEN: dict[str, Callable[[str], str]] = {
    "a line that ends too early": lambda line: line[:-9],
    "a line that is a list": lambda line: f"[{line}]",
    "half a character": lambda line: line.replace(CAPTION, f"{CAPTION}\\ud83d"),
    "another encoding": lambda line: line.replace(CAPTION, f"{CAPTION}\udce9"),
    "no picture": lambda line: re.sub(r'"file_name": "[^"]*', f'"file_name": "{CAPTION}', line),
    "turns in a wrong order": lambda line: json.dumps(
        {"messages": [{"role": "user", "content": CAPTION}, {"role": QUESTION, "content": LABEL}]}
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_bad_row_is_told_by_its_place(
    rows: Path, demo: Path, tmp_path: Path, fault: str, capfd: pytest.CaptureFixture[str]
):
    table = rows / "metadata.jsonl"
    lines = "".join(BROKEN[fault](line) + "\n" for line in table.read_text().splitlines())
    table.write_text(lines, errors="surrogateescape")
    with pytest.raises(DataError) as caught:
        prepare(validate(spec_of(rows, demo, tmp_path / "output")), tmp_path / "scratch")
    assert_silent(str(caught.value), "the reason")
    if isinstance(caught.value, BadRows):
        assert_silent(as_jsonl(caught.value.rows).decode(), "the quarantine")
    assert_silent("".join(capfd.readouterr()), "the log")


@pytest.mark.parametrize(
    "row", [f"images/0.png,{CAPTION}", f"1.2.840.10008.1,{CAPTION}", f"left,{CAPTION} {'is seen and ' * 9}"]
)
def test_a_csv_without_names_of_columns_does_not_tell_its_first_row(demo: Path, tmp_path: Path, row: str):
    (tmp_path / "rows.csv").write_text(f"{row}\n{row}\n")
    with pytest.raises(DataError, match=r"rows\.csv cannot be read: its first line is a row") as caught:
        prepare(validate(spec_of(tmp_path / "rows.csv", demo, tmp_path / "output")), tmp_path / "scratch")
    assert_silent(str(caught.value), "the reason")


QUOTING = "{{ raise_exception('cannot take ' + messages[-1]['content'][-1]['text']) }}"
REASON = "the model's chat template refuses the conversation"


QUOTED = {
    QUOTING: f"{REASON}: cannot take …",
    "{{ raise_exception('no') }}": f"{REASON}: no",
    "{{ raise_exception('cannot take ' + messages[-1]['content'][-1]['text'][:20] | upper) }}": f"{REASON}: cannot take …",
    "{{ raise_exception('cannot take ' + (messages[-1]['content'] | tojson)) }}": None,
    "{{ raise_exception('long') if messages[-1]['content'][-1]['text'] | length > 1 }}": REASON,
}


@pytest.mark.parametrize("template", QUOTED)
def test_a_template_that_quotes_a_row_is_not_quoted(demo: Path, template: str):
    from transformers import AutoProcessor

    from job.model.collator import render

    processor = AutoProcessor.from_pretrained(demo / "base")
    processor.chat_template = template
    with pytest.raises(DataError) as caught:
        render(processor, conversation(QUESTION, f"{CAPTION}\nÉtat: “stable”", None))
    assert_silent(str(caught.value), "the reason")
    assert "stable" not in str(caught.value).lower()
    assert QUOTED[template] in (None, str(caught.value))
