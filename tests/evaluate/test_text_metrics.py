"""Known answers, and the libraries' own values for any text."""

from __future__ import annotations

import math
import string
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from job.evaluate import text_metrics
from job.evaluate.compare import compare
from job.evaluate.records import Change, Settings
from tests.evaluate.conftest import answers_of

WORDS = st.sampled_from(["the", "a", "nodule", "left", "Right", "lung.", "no", "effusion,", "is", "seen", "1.5", "cm"])
TEXTS = st.lists(WORDS, max_size=14).map(" ".join)
ASCII = st.text(string.printable, max_size=60)


def row(reference: str, generated: str, **more: Any) -> dict[str, Any]:
    return {"id": "1", "reference": reference, "generated": generated, "labels": {}, "groups": {}, **more}


def value(rows: list[dict[str, Any]], metric: str, labels: Any = None) -> float:
    sums = text_metrics.sample_scores(answers_of(rows), labels or {}, {})[metric]
    return float(sums.finish(sums.rows.sum(axis=0)))


@settings(max_examples=60)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6))
def test_bleu_and_chrf_are_those_of_sacrebleu(pairs: list[tuple[str, str]]) -> None:
    rows = [row(*pair) for pair in pairs]
    references, generated = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    assert value(rows, "bleu") == pytest.approx(BLEU().corpus_score(generated, [references]).score, abs=1e-9)
    assert value(rows, "chrf") == pytest.approx(CHRF().corpus_score(generated, [references]).score, abs=1e-9)


@settings(max_examples=60)
@given(st.lists(st.tuples(ASCII | TEXTS, ASCII | TEXTS), min_size=1, max_size=4))
def test_rouge_is_that_of_rouge_score_on_ascii_text(pairs: list[tuple[str, str]]) -> None:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    expected = [scorer.score(*pair) for pair in pairs]
    for name in ("rouge1", "rouge2", "rougeL"):
        mean = np.mean([one[name].fmeasure for one in expected])
        assert value([row(*pair) for pair in pairs], name) == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize(
    ("reference", "generated", "share"),
    [
        ("Rundherd im linken Oberlappen, größer", "Rundherd im rechten Oberlappen, größer", 0.8),
        ("右上肺结节", "左上肺结节", 0.8),
    ],
)
def test_rouge_counts_words_of_any_script(reference: str, generated: str, share: float) -> None:
    assert value([row(reference, generated)], "rougeL") == pytest.approx(share)


def test_corpus_bleu_is_not_the_mean_of_sentences() -> None:
    rows = [row("the left lung is clear today", "the left lung is clear today"), row("a b c d e f g h", "x a b y")]
    assert value(rows, "bleu") != pytest.approx(np.mean([value([one], "bleu") for one in rows]), abs=1)


def test_exact_match_ignores_case_punctuation_and_articles() -> None:
    assert value([row("The nodule, left.", "nodule left"), row("nodule", "nodules")], "exact_match") == 0.5


def test_token_f1_is_squads() -> None:
    # precision 2/3, recall 2/4 without "the"
    assert value([row("the left upper lung nodule", "left nodule seen")], "token_f1") == pytest.approx(4 / 7)


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ("the lung is clear. the lung is clear. the lung is clear.", True),
        ("no no no no no no", True),
        ("very very very clear", False),
        ("the lung is clear. the heart is clear. the bone is clear.", False),
        ("end " + "left lung " * 9, True),
        ("", False),
    ],
)
def test_a_text_that_is_stuck_is_repeated(text: str, repeated: bool) -> None:
    assert text_metrics.is_repeated(text) is repeated


def test_empty_is_a_text_without_a_word() -> None:
    assert value([row("a", " .\n"), row("a", "a"), row("a", "")], "empty") == pytest.approx(2 / 3)


def test_length_ratio_is_of_all_words() -> None:
    assert value([row("a b c d", "a"), row("a b", "a b c")], "length_ratio") == pytest.approx(4 / 6)


def test_loss_is_weighted_by_answer_tokens() -> None:
    rows = [
        row("a", "a", loss=1.0, answer_tokens=30),
        row("a", "a", loss=2.0, answer_tokens=10),
        row("a", "a", loss=None),
    ]
    assert value(rows, "loss") == pytest.approx(1.25)
    assert value(rows, "perplexity") == pytest.approx(math.exp(1.25))


def test_macro_f1_is_that_of_scikit_learn() -> None:
    # the example of sklearn.metrics.f1_score: 0.266…
    truth, stated = [0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1]
    rows = [row("", f"class{b}", labels={"kind": f"class{a}"}) for a, b in zip(truth, stated, strict=True)]
    labels = {"kind": SimpleNamespace(values=None, pattern=None)}
    assert value(rows, "kind_macro_f1", labels) == pytest.approx(0.8 / 3)
    assert value(rows, "kind_accuracy", labels) == pytest.approx(2 / 6)


def test_what_is_not_defined_has_no_p() -> None:
    rows = [{"id": str(n), "reference": "?", "generated": "clear lungs"} for n in range(12)]
    change = compare(answers_of(rows), answers_of(rows), {}, (), Settings(100, 0.95, 1)).change["length_ratio"]
    assert change == Change(None, None, None, 12, None, 0)


def test_no_text_at_all_scores_nothing_and_does_not_fail() -> None:
    rows = [row("", ""), row("", "")]
    measured = {name: value(rows, name) for name in text_metrics.sample_scores(answers_of(rows), {}, {})}
    assert measured["bleu"] == measured["chrf"] == measured["rougeL"] == 0
    assert measured["empty"] == 1
    assert math.isnan(measured["length_ratio"])


def test_chexberts_f1_counts_all_rows_and_labels_that_are_nowhere_as_nought() -> None:
    """Cardiomegaly is right in one row and missed in another, edema invented, a fracture (not of the five) right."""
    none, heart, edema, fracture = ([int(place == index) for place in range(14)] for index in (None, 1, 4, 11))
    rows = [[*heart, *heart], [*heart, *none], [*none, *edema], [*fracture, *fracture]]
    values = {
        name: float(each.finish(each.rows.sum(axis=0))) for name, each in text_metrics.chexbert_sums(rows).items()
    }
    assert values == pytest.approx(
        {
            "chexbert_14_micro_f1": 2 * 2 / (2 * 2 + 1 + 1),
            "chexbert_14_macro_f1": (2 / 3 + 0 + 1) / 14,
            "chexbert_5_micro_f1": 2 * 1 / (2 * 1 + 1 + 1),
            "chexbert_5_macro_f1": (2 / 3) / 5,
        }
    )


def test_closed_and_open_questions_are_scored_apart() -> None:
    said = [
        ("yes", "Yes."),
        ("No", "No, there is none"),
        ("no", "not seen"),
        ("the left lung", "in the left upper lobe"),
        ("effusion", "yes"),
    ]
    rows = [row(*each) for each in said]
    assert value(rows, "closed_accuracy") == pytest.approx(2 / 3)
    assert value(rows, "open_recall") == pytest.approx((1 / 2 + 0) / 2)
    assert value(rows, "open_token_f1") == pytest.approx((2 / 6 + 0) / 2)
    assert "closed_accuracy" not in text_metrics.sample_scores(answers_of(rows[3:]), {}, {})
    found = compare(
        answers_of([each | {"id": str(n)} for n, each in enumerate(rows * 12)]),
        answers_of([each | {"id": str(n)} for n, each in enumerate(rows * 12)]),
        {},
        (),
        Settings(100, 0.95, 1),
        metric="closed_accuracy",
    )
    assert (found.verdict.rows, found.verdict.constant) == (36, pytest.approx(2 / 3, abs=1e-6))
