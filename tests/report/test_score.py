"""`job score`: answers that a run stored, scored later by a metric that needs a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from job.errors import DataError, SpecError
from job.layout import answers_key
from job.report.score import asked_for, score
from job.store import open_store
from tests.conftest import Job
from tests.evaluate.conftest import evaluated
from tests.evaluate.test_extra import encoder  # noqa: F401 - a fixture
from tests.report.test_compare_runs import output


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = output(tmp_path / "run", 1.0, rows=12)
    before = evaluated(0.0, 12, wordy=False)
    (folder / answers_key("before")).write_text("\n".join(json.dumps(row) for row in before))
    return folder


def test_stored_answers_are_scored_and_nothing_is_changed(run: Path, encoder: Path, tmp_path: Path, job: Job) -> None:  # noqa: F811
    there = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    measured = score(open_store(str(run)), {"bertscore": str(encoder)}, tmp_path)
    assert measured.after["bertscore"].value == pytest.approx(1, abs=1e-5)
    assert measured.change["bertscore"].value == pytest.approx(1 - (measured.before["bertscore"].value or 0), abs=1e-5)
    done = job("score", str(run), f"bertscore={encoder}")
    assert done.returncode == 0, done.stderr
    assert "| BERTScore |" in done.stdout
    assert "| 1.000 |" in done.stdout
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == there


def test_what_cannot_be_scored_is_refused_in_one_sentence(run: Path, tmp_path: Path) -> None:
    store = open_store(str(run))
    for wrong in ("bertscore", "bertscore=", "rougeL=/models"):
        with pytest.raises(SpecError, match=f"^METRIC=FOLDER: {wrong} is none; METRIC is one of bertscore, "):
            asked_for((wrong,))
    with pytest.raises(SpecError, match="^METRIC=FOLDER: bertscore: .*is not here; name an encoder"):
        score(store, {"bertscore": str(tmp_path / "none")}, tmp_path)
    (run / answers_key("before")).unlink()
    with pytest.raises(DataError, match="no answers before and after training"):
        score(store, {"bertscore": str(tmp_path)}, tmp_path)
