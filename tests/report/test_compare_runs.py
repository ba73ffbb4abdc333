"""`job compare`: runs beside each other by their answers to the same rows, in text and as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.errors import DataError, SpecError
from job.layout import FACTS_KEY, METRICS_KEY, SPEC_KEY, STATUS_KEY, answers_key
from job.report import compare_runs as shown
from job.report.compare_runs import Runs, compare_runs
from job.store import open_store
from tests.conftest import Job
from tests.evaluate.conftest import FINDINGS, evaluated

LABELS = {"finding": {"column": "finding", "values": FINDINGS}}


def output(folder: Path, share_known: float, *, rows: int = 48, held_out: str = "a" * 64, **given: Any) -> Path:
    """A published output as far as a comparison reads it: a model right about `share_known` of the findings."""
    made = evaluated(share_known, rows)
    spec = {
        "name": given.pop("name", folder.name),
        "model": {"name_or_path": "base"},
        "dataset": {"path": "rows"},
        "lora": {"r": given.pop("r", 16)},
        "evaluation": {"labels": LABELS, "bootstrap_samples": 400},
        "output": {"url": str(folder)},
    }
    facts = {"name": spec["name"], "lineage": {"held_out_sha256": held_out}, "privacy": {"report_images": True}} | given
    files = {
        STATUS_KEY: "{}",
        SPEC_KEY: yaml.safe_dump(spec),
        FACTS_KEY: json.dumps(facts),
        METRICS_KEY: "{}",
        answers_key("before"): "",
        answers_key("after"): "\n".join(json.dumps(row) for row in made),
    }
    for key, text in files.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_text(text)
    return folder


def compared(*folders: Path, metric: str | None = None) -> Runs:
    return compare_runs([open_store(str(folder)) for folder in folders], metric)


def test_a_better_run_is_called_better_and_its_other_fields_are_listed(tmp_path: Path) -> None:
    runs = compared(output(tmp_path / "low", 0.3), output(tmp_path / "high", 0.95, r=32))
    other = runs.others[0]
    assert other.measured.verdict.said == "better"
    assert other.said.startswith("B is better than A: Finding correct changed by +")
    assert other.fields == ["lora.r: 16 → 32"]
    back = compared(tmp_path / "high", tmp_path / "low").others[0]
    assert back.said.startswith("B is worse than A")
    text = shown.text(runs)
    assert "| Finding correct |" in text
    assert str(tmp_path / "high") in text.replace("\\", "")


def test_a_run_beside_its_own_copy_scores_the_same(tmp_path: Path) -> None:
    runs = compared(output(tmp_path / "one", 0.6), output(tmp_path / "two", 0.6))
    assert runs.others[0].said.startswith("B scores as A in every sample")
    assert "trained with the same spec" in shown.text(runs)
    assert runs.samples == []


def test_the_finished_runs_of_a_sweep_are_compared(tmp_path: Path, job: Job, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("10", "2"):
        output(tmp_path / name, 0.6)
    (output(tmp_path / "3", 0.6) / FACTS_KEY).unlink()
    found = shown.finished_below(open_store(str(tmp_path)))
    assert [Path(store.url).name for store in found] == ["2", "10"]
    assert caplog.messages == ["left out, for there is no report yet: 3"]
    done = job("compare", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "B scores as A in every sample" in done.stdout


def test_intervals_of_several_runs_hold_together(tmp_path: Path) -> None:
    folders = [output(tmp_path / str(share), share) for share in (0.3, 0.6, 0.9)]
    alone, both = compared(*folders[:2]).others[0], compared(*folders).others[0]
    assert both.measured.settings.confidence == pytest.approx(0.975)
    narrow, wide = (each.measured.change["finding_accuracy"] for each in (alone, both))
    assert None not in (narrow.low, narrow.high, wide.low, wide.high)
    assert wide.low < narrow.low < narrow.high < wide.high  # type: ignore[operator]


def test_the_page_shows_the_samples_that_differ_and_escapes_texts(tmp_path: Path) -> None:
    runs = compared(output(tmp_path / "low", 0.3, name="<b>low</b>"), output(tmp_path / "high", 0.95))
    page = shown.page(runs)
    assert "Samples that differ most" in page
    assert "&lt;b&gt;low" in page
    assert "<b>low" not in page
    assert page.count("<article") == 8


def test_no_texts_are_shown_if_one_run_keeps_them_private(tmp_path: Path) -> None:
    private = output(tmp_path / "low", 0.3, privacy={"report_images": False})
    runs = compared(output(tmp_path / "high", 0.95), private)
    assert runs.samples == []
    assert "zone" not in shown.page(runs)


@pytest.mark.parametrize("other", [{"held_out": "b" * 64}, {"rows": 40}])
def test_runs_of_other_rows_are_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="measured on other held-out rows than"):
        compared(output(tmp_path / "one", 0.6), output(tmp_path / "two", 0.6, **other))


def test_what_cannot_be_compared_is_refused_in_one_sentence(tmp_path: Path) -> None:
    one = output(tmp_path / "one", 0.6)
    with pytest.raises(SpecError, match="two and 26 different outputs"):
        compared(one, one)
    with pytest.raises(SpecError, match="two and 26 different outputs"):
        compared(one)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no job has written a report there yet"):
        compared(one, tmp_path / "empty")
    with pytest.raises(
        SpecError, match="--metric: nothing was not measured in these runs; choose one of finding_accuracy,"
    ):
        compared(one, output(tmp_path / "two", 0.7), metric="nothing")


def test_the_command_prints_the_comparison_and_writes_the_page(tmp_path: Path, job: Job) -> None:
    folders = [str(output(tmp_path / "low", 0.3)), str(output(tmp_path / "high", 0.95))]
    done = job("compare", *folders, "--metric", "rougeL", "--to", str(tmp_path / "page.html"))
    assert done.returncode == 0, done.stderr
    assert "B is better than A: ROUGE-L changed by +" in done.stdout
    assert "<!doctype html>" in (tmp_path / "page.html").read_text()
    refused = job("compare", folders[0])
    assert refused.returncode == 78
    assert "name between two" in refused.stderr
