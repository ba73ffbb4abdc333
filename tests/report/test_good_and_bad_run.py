"""What a reader must be able to read: the report of a good run, and of one that is contaminated, collapsed and blind."""

from __future__ import annotations

import html
import re
from dataclasses import replace

import numpy as np
import pytest

from job.evaluate.error_groups import error_groups
from job.evaluate.records import Answer
from job.report import model_card
from job.report.contents import Contents, Privacy
from job.report.gallery import stands_out
from job.report.page import render
from tests.report.conftest import LABELS


def words(contents: Contents, until: str = "</html>") -> str:
    """The words of the page, one blank between two of them and between two elements."""
    body = render(contents, {}).replace("<wbr>", "").partition("<body>")[2].partition(until)[0]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def top(contents: Contents) -> str:
    """What stands above the first heading of a part."""
    return words(contents, until="<h2")


def test_the_top_says_when_what_and_what_follows(good_run: Contents) -> None:
    said = top(good_run)
    for part in (
        "chest-captions",
        "Report of 2026-11-30",
        "Not a medical device. Findings need a qualified reader.",
        "Better: Finding correct changed by +",
    ):
        assert part in said, part


def test_the_top_of_a_bad_run_says_all_that_is_wrong(bad_run: Contents) -> None:
    said = top(bad_run)
    assert "Better:" not in said
    for part in (
        "Not shown to be better: Finding correct changed by +",
        "that is not clearly more than one answer to every sample would score",
        "the true answers are predicted as well with the images of other samples",
        "60 held-out samples are left out of this: the training data hold the same patient or image",
        "The tuned model gives one answer to 120 samples.",
        "Refused. merged weights differ from base + adapter",
    ):
        assert part in said, part
    limits = model_card.render(bad_run, "merged").partition("## Limits")[2]
    assert "Of the held-out samples, 60 share a patient or an image with the training data" in limits


def test_every_gate_is_passed_or_failed_with_its_limit_in_words(good_run: Contents, bad_run: Contents) -> None:
    good, bad = words(good_run), words(bad_run)
    for part in (
        r"passed Finding correct finding_accuracy is 0\.9\d+ \(95 % interval .*\), at least evaluation.require.*= 0\.7\.",
        r"passed Merged weights: numbers 0 of 224 compared tensors are not base \+ adapter; none may be\.",
        r"passed Merged weights: logits .* by 0\.12 % of their spread on average; at most 5 % is allowed\.",
        r"passed Merged weights: answers At 100 % of the tokens .*; at least 97 % is required\.",
        r"passed merged_fp8/ It keeps 95 % of the gain in Loss; at least 80 % must be left\.",
        r"passed Served: merged/ At 99\.5 % of the tokens vLLM 0\.32\.0 .*; at least 98 % is required\.",
    ):
        assert re.search(part, good), part
    assert "failed" not in good.partition("Results")[0]
    for part in (
        r"failed Finding correct finding_accuracy is 0\.2\d+ .*, below evaluation.require.finding_accuracy.min_value = 0\.7\.",
        r"failed Merged weights: numbers 1 of 224",
        r"failed Merged weights: logits .* by 31 %",
        r"failed Merged weights: answers At 62 %",
    ):
        assert re.search(part, bad), part


def test_what_choosing_cost_is_said_in_report_and_card(good_run: Contents) -> None:
    said = "64 rows of 31 groups (patients) choose the step by their loss. They are neither trained on nor held out"
    assert said in words(good_run)
    assert said in model_card.render(good_run, "adapter")
    assert "validation loss" in words(good_run)
    plain = replace(good_run, data={"train": 10})
    assert "choose the step" not in words(plain) + model_card.render(plain, "adapter")
    assert "held-out loss" in words(plain)


def test_samples_have_their_question_and_their_file(good_run: Contents) -> None:
    said = words(good_run)
    assert len(set(re.findall(r"Question What is seen in film \d+\?", said))) == 16
    assert len(set(re.findall(r"row-\d+ · chest/2026/PA_\w+\.png · Finding", said))) == 16
    asked = words(replace(good_run, instruction="Describe what you see."))
    assert "Every sample was asked: “Describe what you see.”" in asked


def test_a_map_in_which_nothing_stands_out_says_so_and_is_not_drawn(good_run: Contents) -> None:
    page = render(good_run, {each.id: b"" for each in good_run.after})
    assert page.count("Where the model looked") == 1
    assert page.count("<strong>Nothing stands out.</strong>") == 2
    assert "Covering any part of the image left the answer as likely." in page


def test_maps_of_noise_do_not_stand_out_and_a_spot_does() -> None:
    random = np.random.default_rng(0)
    noise = random.normal(0, 1, (20_000, 6, 6))
    assert np.mean([stands_out(cells) for cells in noise]) < 0.01
    noise[:, 2, 2] += 9
    assert np.mean([stands_out(cells) for cells in noise]) > 0.98
    assert not stands_out(np.full((6, 6), 0.4)), "everything mattered as much"
    spot = np.zeros((6, 6))
    spot[0, 0] = 0.001
    assert not stands_out(spot), "too little to matter"


@pytest.mark.parametrize(
    ("reference", "generated", "truth", "kinds"),
    [
        ("A nodule.", "A nodule.", "nodule", {}),
        ("A nodule.", "No acute finding.", "nodule", {"missed": ["nodule"]}),
        ("No acute finding.", "A nodule.", "no acute finding", {"invented": ["nodule"]}),
        ("A nodule.", "A pneumothorax.", "nodule", {"missed": ["nodule"], "invented": ["pneumothorax"]}),
        ("A nodule on the left.", "A nodule on the right.", "nodule", {"side": ["right"]}),
        ("A nodule on the left.", "A nodule.", "nodule", {}),
        ("A nodule on the left.", "Bilateral nodules.", "nodule", {"side": ["right"]}),
        ("Bilateral nodules.", "A nodule on the left.", "nodule", {}),
        ("A mild nodule.", "A severe nodule.", "nodule", {"degree": ["large"]}),
        ("A mild nodule.", "A small nodule.", "nodule", {}),
        ("A nodule.", "A large nodule.", "nodule", {}),
    ],
)
def test_errors_are_grouped(reference: str, generated: str, truth: str, kinds: dict[str, list[str]]) -> None:
    found = error_groups([Answer("row-1", reference, {"finding": truth}, generated=generated)], LABELS)
    assert {kind: sorted(each.values) for kind, each in found.items() if each.rows} == kinds
    assert all(each.rows in ([], ["row-1"]) for each in found.values())


def test_several_findings_of_a_row_are_grouped_and_uncertain_ones_are_neither() -> None:
    labels = {"finding": ["nodule"], "finding (uncertain)": ["pneumothorax"]}
    said = "A pleural effusion. Possible pneumothorax."
    found = error_groups([Answer("row-1", "A nodule.", labels, generated=said)], LABELS)
    assert {kind: list(each.values) for kind, each in found.items() if each.rows} == {
        "missed": ["nodule"],
        "invented": ["pleural effusion"],
    }


def test_errors_are_counted_before_and_after_and_withheld_rows_are_not_named(bad_run: Contents) -> None:
    said = words(bad_run)
    missed = sum(row.labels["finding"] != "no acute finding" for row in bad_run.after)
    assert re.search(rf"Missed finding {missed} {missed} {missed} (\w| )+ \(\d+\), .* row-\d+", said)
    assert re.search(r"Invented finding 0 0 120 –", said)
    private = words(replace(bad_run, privacy=Privacy(report_images=False)))
    assert "Missed finding" in private
    assert not re.search(r"row-\d|film|\.png", private)
