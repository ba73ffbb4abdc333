"""The one conclusion: what it needs, what forbids it, how often it is wrong, and the words for it."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from math import sqrt
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from job.evaluate import metric_info
from job.evaluate.compare import compare
from job.evaluate.records import Comparison, Gap, Settings, from_json
from job.report.conclusion import conclusion, image_use, tag
from job.report.page import markdown, render
from tests.evaluate import verdict_proof
from tests.evaluate.conftest import answers_of, contents_of, evaluated

FINDING = {"finding": SimpleNamespace(values=None, pattern=None)}
WORDS = ("lung", "heart", "clear", "opacity", "left", "right", "nodule", "rib")


def judged(before: Any, after: Any, labels: Any = (), **more: Any) -> Comparison:
    return compare(answers_of(before), answers_of(after), dict(labels), (), Settings(400, 0.95, 1), **more)


def questions(rows: int = 120) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Questions of which most have the answer "no": a base that rambles, and a tuned model that answers "No" to each."""
    draw, sides = random.Random(0), ([], [])
    for number in range(rows):
        row = {"id": f"row-{number}", "unit": number, "reference": draw.choice(["no", "no", "no", "yes", "left lung"])}
        for side, said in zip(sides, (" ".join(draw.choices(WORDS, k=12)), "No"), strict=True):
            side.append(row | {"generated": said, "loss": draw.expovariate(1), "answer_tokens": 2})
    return sides


def test_a_model_that_answers_no_to_everything_is_not_called_better() -> None:
    found = judged(*questions())
    assert found.change["rougeL"].low > 0.3
    assert (found.verdict.said, found.verdict.doubts, found.verdict.different) == ("unproven", ["constant"], 1)
    said = conclusion(found)
    assert said[0].startswith("Not shown to be better: ROUGE-L changed by +0.")
    assert f"one answer to every sample would score ({found.after['rougeL'].value:.3f})" in said[0]
    assert said[1] == "The tuned model gives one answer to 120 samples."
    page = render(contents_of({"name": "no", "metrics": asdict(found)}))
    assert ">better<" not in page
    assert 'class="tag unproven"' in page
    assert "Not shown to be better" in page
    assert "Not shown to be better" in markdown(found)


def test_the_commonest_label_for_every_row_is_not_called_better() -> None:
    before, after = evaluated(0.0, 120, wordy=False), evaluated(0.0, 120)
    for row in after:
        row["labels"]["finding"] = "effusion" if int(row["id"].split("-")[2][:-4]) % 5 else "nodule"
        row["generated"] = "There is an effusion."
    for row, other in zip(before, after, strict=True):
        row["labels"] = other["labels"]
    found = judged(before, after, FINDING)
    assert found.verdict.metric == "finding_accuracy"
    assert found.verdict.constant == pytest.approx(0.8, abs=0.01)
    assert (found.verdict.said, found.verdict.doubts) == ("unproven", ["constant"])


def test_a_model_that_learned_is_called_better_in_one_place_alone() -> None:
    found = judged(evaluated(0.2, 120), evaluated(0.9, 120), FINDING)
    assert (found.verdict.said, found.verdict.doubts) == ("better", [])
    assert found.verdict.over_constant.low > 0.3
    page = render(contents_of({"name": "well", "metrics": asdict(found)}))
    assert page.count('class="tag better"') == 2  # the card and the row of the one metric
    assert tag(found, "rougeL") == ""
    assert conclusion(found)[0].startswith("Better: Finding correct changed by +")


def test_the_metric_of_the_verdict_can_be_named() -> None:
    found = judged(evaluated(0.2, 120), evaluated(0.9, 120), FINDING, metric="bleu")
    assert found.verdict.metric == "bleu"
    page = render(contents_of({"name": "named", "metrics": asdict(found)}))
    assert page.index("<h3>BLEU</h3>") < page.index("<h3>Finding correct</h3>"), "its card is the first"
    assert found.verdict.constant is not None
    assert judged(evaluated(0.2, 60), evaluated(0.9, 60), FINDING, metric="loss").verdict.constant is None


def test_worse_is_called_worse() -> None:
    found = judged(evaluated(0.9, 120), evaluated(0.2, 120), FINDING)
    assert found.verdict.said == "worse"
    assert conclusion(found)[0].startswith("Worse: Finding correct changed by −")


def test_answers_that_are_all_the_same_are_unchanged_and_not_within_some_interval() -> None:
    rows = evaluated(0.5, 120)
    found = judged(rows, rows, FINDING)
    assert conclusion(found)[0] == "Unchanged: Finding correct is the same before and after in all 120 samples."
    assert "unchanged in all 120 held-out samples" in markdown(found)
    page = render(contents_of({"name": "same", "metrics": asdict(found)}))
    assert "Unchanged in all 120 samples." in page
    assert page.count("<small>the same in all 120</small>") == len(found.change)


def test_an_interval_without_zero_is_no_verdict_where_the_test_disagrees() -> None:
    """Two of 40 answers are better and none is worse: the bootstrap's interval leaves zero out more easily than the test."""
    rows = [{"id": f"row-{n}", "unit": n, "reference": "clear", "generated": "clear"} for n in range(40)]
    worse = [row | {"generated": "opacity" if n < 4 else "clear"} for n, row in enumerate(rows)]
    found = judged(worse, rows)
    assert found.change["rougeL"].low > 0
    assert found.change["rougeL"].p > 0.05
    assert found.verdict.said == "no clear change"
    size = metric_info.noticeable(found.verdict.change, 0.95)
    assert conclusion(found)[1].startswith(
        f"A true change of {size:.3f} would be noticed on so many samples about four times"
    )


@pytest.mark.parametrize("rows", [1, 9])
def test_few_rows_get_neither_verdict_nor_change(rows: int) -> None:
    found = judged(evaluated(0.0, 2 * rows), evaluated(1.0, 2 * rows), FINDING)
    assert conclusion(found) == [f"Too few to judge by: only {rows} held-out patients or other units."]
    assert "a change of" not in markdown(found)
    assert 'class="card"' not in render(contents_of({"name": "few", "metrics": asdict(found)}))


def test_rows_that_are_also_in_training_are_left_out_of_the_verdict() -> None:
    """Only they got better."""
    before, after = evaluated(0.3, 120), evaluated(0.3, 120)
    for row, other in zip(before[:60], after[:60], strict=True):
        row["generated"], other["generated"] = "nothing", other["reference"]
    found = judged(before, after, FINDING, leaked={row["id"] for row in before[:60]})
    assert found.change["finding_accuracy"].low > 0.3
    assert (found.verdict.said, found.verdict.rows, found.verdict.leaked) == ("unchanged", 60, 60)
    assert conclusion(found)[1].startswith(
        "60 held-out samples are left out of this: the training data hold the same patient"
    )


def test_a_held_out_set_that_is_all_in_training_is_not_judged() -> None:
    before, after = evaluated(0.2, 60), evaluated(1.0, 60)
    found = judged(before, after, FINDING, leaked={row["id"] for row in before})
    assert found.verdict.said == "unproven"
    assert conclusion(found)[0] == "Not judged: no held-out samples are new to the model."


def test_a_model_that_does_not_need_the_images_is_not_called_better() -> None:
    before, after = evaluated(0.2, 120), evaluated(0.9, 120)
    for row in before + after:
        row["swapped_loss"] = row["loss"]
    found = judged(before, after, FINDING)
    assert (found.verdict.said, found.verdict.doubts) == ("unproven", ["images"])
    assert conclusion(found)[0].endswith("but the true answers are predicted as well with the images of other samples.")
    for row in after:
        row["swapped_loss"] = row["loss"] + 1
    found = judged(before, after, FINDING)
    assert found.verdict.said == "better"
    assert found.image_use.after.value == pytest.approx(1, abs=1e-6)
    assert "loss changes by +1.000" in image_use(found)
    assert from_json(Comparison, json.loads(json.dumps(asdict(found)))) == found


def test_the_share_of_the_gain_that_remains_without_the_right_images() -> None:
    rows = evaluated(0.5, 40)
    before = [row | {"loss": 2.0, "swapped_loss": 2.0} for row in rows]
    after = [row | {"loss": 1.0, "swapped_loss": 1.75} for row in rows]
    found = judged(before, after, FINDING)
    assert found.image_use.gain_without == pytest.approx(0.25)
    assert image_use(found).endswith("and 25.0\u00a0% of the gain in loss from tuning remains.")


def test_gaps_are_flagged_after_holms_correction() -> None:
    from job.evaluate.compare import _flagged

    gaps = {"sex": {"a": Gap(p=0.02), "b": Gap(p=0.9)}, "site": {"a": Gap(p=0.012), "b": Gap(p=None)}}
    flags = {(column, metric): gap.flagged for column, of in _flagged(gaps, 0.05).items() for metric, gap in of.items()}
    assert flags == {("sex", "a"): True, ("sex", "b"): False, ("site", "a"): True, ("site", "b"): False}
    assert not _flagged({"sex": {"a": Gap(p=0.02), "b": Gap(p=0.03), "c": Gap(p=0.04)}}, 0.05)["sex"]["a"].flagged


@pytest.mark.parametrize(("metric", "count", "several"), verdict_proof.SETTINGS[::2])
def test_verdicts_on_what_did_not_change_are_rare(metric: str, count: int, several: bool) -> None:
    """A sample of `make verdict-proof`, with three standard errors of it."""
    runs = 120
    tally = verdict_proof.verdicts(metric, count, several, runs)
    assert tally.false <= 0.05 + 3 * sqrt(0.05 * 0.95 / runs)
    assert tally.coverage >= 0.93 - 3 * sqrt(0.07 * 0.93 / runs)


@pytest.mark.parametrize("within", [True, False])
def test_groups_that_mean_nothing_are_rarely_flagged(within: bool) -> None:
    runs = 150
    assert verdict_proof.gaps(within, runs) <= 0.05 + 3 * sqrt(0.05 * 0.95 / runs)


def test_groups_within_patients_that_differ_are_flagged() -> None:
    from job.evaluate import bootstrap
    from job.evaluate.compare import _gap

    draw = np.random.default_rng(3)
    units = verdict_proof.patients(60, True, draw)
    groups = draw.integers(0, 2, len(units))
    own = draw.normal(size=len(units)) + draw.normal(size=60)[units] + 1.5 * groups
    sums = verdict_proof.rouge_l(own, draw)
    gap = _gap(bootstrap.pair(sums, sums), units, np.array(["a", "b"])[groups], Settings(400, 0.95, 1))
    assert gap.p < 0.01
