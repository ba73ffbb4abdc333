from __future__ import annotations

import pytest

from job.config.schema import LabelSpec
from job.evaluate import label_metrics
from job.evaluate.records import Answer


def spec(values: list[str] | None = None, pattern: str | None = None) -> LabelSpec:
    return LabelSpec(column="finding", values=values, pattern=pattern)


def read(text: str, values: list[str] | None = None, pattern: str | None = None) -> str:
    return label_metrics.reader(spec(values, pattern), ["nodule"])[1](text)


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("A NODULE is seen", "nodule"),
        ("nodular, noduleless", label_metrics.NONE),
        ("nodule; the nodule again", "nodule"),
        ("nodule and effusion", label_metrics.SEVERAL),
        ("a pleural\n effusion", "pleural effusion"),
        ("a pleural effusion and an effusion", label_metrics.SEVERAL),
        ("an effusion.", "effusion"),
        ("", label_metrics.NONE),
    ],
)
def test_the_values_found_as_whole_words_decide(text: str, stated: str) -> None:
    assert read(text, ["nodule", "effusion", "pleural effusion"]) == stated


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("No pleural effusion.", label_metrics.NONE),
        ("There is no nodule, effusion or pneumothorax.", label_metrics.NONE),
        ("The lungs are clear, without evidence of an effusion", label_metrics.NONE),
        ("A nodule is not seen. Effusion: none.", label_metrics.NONE),
        ("Negative for effusion; nodule has resolved", label_metrics.NONE),
        ("No effusion. A nodule in the left upper zone, 1.5 cm.", "nodule"),
        ("No nodule on the left but a nodule on the right", "nodule"),
        ("No effusion, there is a nodule", "nodule"),
        ("No effusion, and a nodule", "nodule"),
        ("No significant interval change in the effusion", "effusion"),
        ("Not only a nodule", "nodule"),
        ("A nodule without an effusion", "nodule"),
        ("A nodule, which is not calcified", "nodule"),
        ("An effusion cannot be excluded", label_metrics.UNCERTAIN),
        ("no acute finding", "no acute finding"),
        ("No acute finding, no effusion", "no acute finding"),
    ],
)
def test_what_a_text_denies_it_does_not_state(text: str, stated: str) -> None:
    assert read(text, ["nodule", "effusion", "pleural effusion", "no acute finding"]) == stated


def test_values_with_signs_of_regular_expressions_mean_themselves() -> None:
    assert read("grade 1 (a+b) seen", ["1 (a+b)", "."]) == "1 (a+b)"


def test_without_values_the_reference_labels_are_looked_for() -> None:
    assert read("a nodule") == "nodule"


def test_the_first_group_of_the_first_match_of_a_pattern_decides() -> None:
    assert read("Finding: Nodule. Finding: effusion.", ["effusion"], r"finding: (\w+)") == "nodule"


def test_what_a_pattern_finds_besides_the_classes_is_not_repeated() -> None:
    assert read("Finding: Mrs Smith", None, r"finding: (.+)") == label_metrics.OTHER


def test_a_row_without_a_reference_label_does_not_count() -> None:
    rows = [
        Answer(str(place), "", labels, generated="nodule")
        for place, labels in enumerate(({"finding": "Nodule"}, {"finding": None}, dict[str, str | None]()))
    ]
    classes, pairs = label_metrics.stated_and_right(rows, "finding", spec(["nodule", "effusion"]))
    assert classes == ("effusion", "nodule")
    assert pairs == [("nodule", "nodule"), None, None]


def test_confusion_counts_every_labelled_row_once() -> None:
    pairs = [("a", "a"), ("a", "b"), ("a", "b"), None, ("b", label_metrics.NONE)]
    assert label_metrics.confusion(pairs) == {"a": {"a": 1, "b": 2}, "b": {label_metrics.NONE: 1}}
    assert label_metrics.commonest_share(pairs) == 0.75


def test_a_pattern_that_would_take_for_ever_finds_nothing(caplog: pytest.LogCaptureFixture) -> None:
    pattern = "^(?:.*?,){14}(nodule)"
    assert read("clear," * 14 + "nodule", pattern=pattern) == "nodule"
    assert read("clear," * 60, pattern=pattern) == label_metrics.NONE
    assert "took over 1 s on a text of 360 characters" in caplog.text
