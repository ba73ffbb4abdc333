"""RadEval itself, in its own environment (`.ci/radeval`), on the smallest models that it accepts: `job score` has its numbers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from job.config.schema import CHEXBERT, ExtraMetric
from job.errors import SpecError
from job.evaluate.extra import model_folders
from job.evaluate.radeval import RADEVAL, ask_radeval
from job.layout import answers_key
from job.report.score import score, text
from job.store import open_store
from tests.conftest import ROOT
from tests.evaluate.conftest import evaluated
from tests.report.test_compare_runs import output

PYTHON = ROOT / "build" / "radeval" / "bin" / "python"
pytestmark = [
    pytest.mark.skipif(not PYTHON.exists(), reason="RadEval is not here (make test-radeval)"),
    pytest.mark.timeout(1800),
]
PAIRS = [  # those of RadEval's own tests (test_radcliq, test_f1chexbert), and what models say
    ("No acute cardiopulmonary process.", "No acute findings."),
    (
        "Small bilateral pleural effusions with bibasilar atelectasis.",
        "Bilateral pleural effusions and basilar atelectasis.",
    ),
    ("Mild cardiomegaly. No pleural effusion.", "Mild cardiomegaly with clear lungs."),
    ("No pleural effusions.", "No pleural effusion. Normal heart size."),
    ("Enlarged heart.", "Normal heart size."),
    ("No evidence of pneumonia. Stable cardiomegaly.", "Increased mild pulmonary edema and left basal atelectasis."),
    ("A large left pneumothorax.", "No"),
    ("No", "A large left pneumothorax."),
    ("A nodule in the right upper lobe.", "A nodule in the right upper lobe."),
    ("There is a severe pneumothorax.", ""),
    ("Moderate edema. Heart size is normal.", "Severe edema."),
]
OWN = """
import json, sys
import radeval, torch
sys.modules["RadEval"] = radeval
from radeval.metrics.f1chexbert import F1CheXbert
F1CheXbert.__init__.__kwdefaults__["device"] = "cpu"
names, refs, hyps = json.load(sys.stdin)
modes = {"detailed": {"detailed": True}, "rows": {"per_sample": True}}
found = {}
for mode, how in modes.items():
    found[mode] = radeval.RadEval(metrics=names, show_progress=False, **how)(refs=refs, hyps=hyps)
print(json.dumps(found, default=float))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("radeval") / "cache"
    subprocess.run(
        [PYTHON, Path(__file__).with_name("radeval_models.py"), folder],
        env=os.environ | caches(folder),
        input=json.dumps([*PAIRS, *turned()]),
        text=True,
        check=True,
        capture_output=True,
    )
    return folder


def turned() -> list[tuple[str, str]]:
    """Each reference with the answer to the next one."""
    return [(one, PAIRS[(place + 1) % len(PAIRS)][1]) for place, (one, _) in enumerate(PAIRS)]


def caches(folder: Path) -> dict[str, str]:
    places = {"XDG_CACHE_HOME": folder, "HF_HOME": folder / "huggingface", "NLTK_DATA": folder / "nltk_data"}
    return {name: str(place) for name, place in places.items()} | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line for each start of RadEval's Python, which has no network where the machine allows that."""
    alone = ["unshare", "-rn"]
    able = (
        shutil.which("unshare") and subprocess.run([*alone, "true"], capture_output=True, check=False).returncode == 0
    )
    starter = tmp_path / "python"
    starter.write_text(f'#!/bin/sh\necho >>{tmp_path}/calls\nexec {" ".join(alone) if able else ""} {PYTHON} "$@"\n')
    starter.chmod(0o755)
    monkeypatch.setenv("JOB_RADEVAL_PYTHON", str(starter))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "calls"


def own(cache: Path, metrics: list[str], pairs: list[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """What RadEval says of these pairs by itself."""
    refs, hyps = map(list, zip(*pairs, strict=True))
    done = subprocess.run(
        [PYTHON, "-c", OWN],
        input=json.dumps([metrics, refs, hyps]),
        env=os.environ | caches(cache),
        text=True,
        capture_output=True,
        check=True,
    )
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An output whose answers before are of the next row."""
    folder = output(tmp_path / "run", 1.0, rows=len(PAIRS))
    for when, turn in (("before", 1), ("after", 0)):
        rows = evaluated(1.0, len(PAIRS))
        for place, row in enumerate(rows):
            row["reference"], row["generated"] = PAIRS[place][0], PAIRS[(place + turn) % len(PAIRS)][1]
        (folder / answers_key(when)).write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_scores_of_a_stored_run_are_radevals_own(cache: Path, calls: Path, run: Path, tmp_path: Path) -> None:
    metrics: list[ExtraMetric] = [metric for metric in RADEVAL if metric != "ratescore"]
    measured = score(open_store(str(run)), {metric: str(cache) for metric in [*metrics, "ratescore"]}, tmp_path)
    assert len(calls.read_text().splitlines()) == 1, "one process for all metrics of a cache"
    sides = [(pairs, own(cache, [RADEVAL[metric][0] for metric in metrics], pairs)) for pairs in (turned(), PAIRS)]
    unread = {place for _, own_of in sides for place, value in enumerate(own_of["rows"]["green"]) if value == 0}
    assert len(unread) in (1, 2), "of an answer of its judge that GREEN cannot read, it makes 0"
    for (pairs, theirs), estimates in zip(sides, (measured.before, measured.after), strict=True):
        values = {name: each.value for name, each in estimates.items()}
        detailed, rows = theirs["detailed"], theirs["rows"]
        assert values["radgraph"] == pytest.approx(detailed["radgraph_partial"], abs=1e-6)
        assert 1 / values["radcliq"] == pytest.approx(detailed["radcliq_v1"], rel=1e-4)
        for ours, name in zip(CHEXBERT, ("all_micro", "all_macro", "5_micro", "5_macro"), strict=True):
            assert values[ours] == pytest.approx(detailed[f"f1chexbert_{name}_f1"], abs=1e-6), ours
        for metric in ("chexbert", "srrbert", "crimson"):
            of_rows = rows[RADEVAL[metric][1]]
            assert values[metric] == pytest.approx(sum(of_rows) / len(of_rows), abs=1e-6), metric
        judged = [value for place, value in enumerate(rows["green"]) if place not in unread]
        assert values["green"] == pytest.approx(sum(judged) / len(judged), abs=1e-6)
        assert estimates["green"].n == len(judged)
        sentences = [pair for pair in pairs if min(map(len, pair)) > 2]
        scored = ask_radeval(["ratescore"], cache, [([one for one, _ in sentences], [other for _, other in sentences])])
        assert scored["ratescore"]["ratescore"][0] == pytest.approx(
            own(cache, ["ratescore"], sentences)["rows"]["ratescore"]
        )
    told_apart = [*metrics[:3], "green", "crimson"]
    assert all(len(set(rows[RADEVAL[metric][1]])) > 1 for metric in told_apart), "the same of every text shows nothing"
    table = text(measured)
    for title in (
        "RadGraph F1",
        "CheXbert micro-F1, 14",
        "CheXbert macro-F1, 5",
        "RaTEScore",
        "RadCliQ-v1",
        "SRR-BERT F1",
        "GREEN",
        "CRIMSON",
    ):
        assert f"| {title} |" in table


def test_a_text_without_a_sentence_shifts_no_other_row(cache: Path, calls: Path) -> None:
    """RadEval itself leaves such a text out, and then compares each reference with another answer."""
    refs, hyps = map(list, zip(*PAIRS, strict=True))
    (values,) = ask_radeval(["ratescore"], cache, [(refs, hyps)])["ratescore"]["ratescore"]
    same = PAIRS.index(("A nodule in the right upper lobe.", "A nodule in the right upper lobe."))
    assert values[same] == pytest.approx(1, abs=1e-4)
    assert [values[place] for place, pair in enumerate(PAIRS) if min(map(len, pair)) < 3] == [0.5] * 3


def test_a_cache_without_the_models_is_refused_by_name(cache: Path, calls: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for metric in ("radgraph", "chexbert"):
        with pytest.raises(
            SpecError, match=rf"extra_metrics.{metric}: RadEval ended with [\w.]+; check that .*empty holds"
        ):
            ask_radeval([metric], tmp_path / "empty", [(["A nodule."], ["A nodule."])])


def test_a_python_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_RADEVAL_PYTHON", str(tmp_path / "python"))
    with pytest.raises(SpecError, match="^JOB_RADEVAL_PYTHON: .*python is not here"):
        model_folders({"green": str(tmp_path)}, tmp_path)
