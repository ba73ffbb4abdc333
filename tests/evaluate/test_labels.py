from __future__ import annotations

import pytest

from job.evaluate import labels
from job.spec import LabelSpec


def spec(values: list[str] | None = None, pattern: str | None = None) -> LabelSpec:
    return LabelSpec(column="finding", values=values, pattern=pattern)


def read(text: str, values: list[str] | None = None, pattern: str | None = None) -> str:
    return labels.reader(spec(values, pattern), ["nodule"])[1](text)


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("A NODULE is seen", "nodule"),
        ("nodules, noduleless", labels.NONE),
        ("nodule; the nodule again", "nodule"),
        ("nodule and effusion", labels.SEVERAL),
        ("a pleural\n effusion", "pleural effusion"),
        ("a pleural effusion and an effusion", labels.SEVERAL),
        ("an effusion.", "effusion"),
        ("", labels.NONE),
    ],
)
def test_the_values_found_as_whole_words_decide(text: str, stated: str) -> None:
    assert read(text, ["nodule", "effusion", "pleural effusion"]) == stated


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("No pleural effusion.", labels.NONE),
        ("There is no nodule, effusion or pneumothorax.", labels.NONE),
        ("The lungs are clear, without evidence of an effusion", labels.NONE),
        ("A nodule is not seen. Effusion: none.", labels.NONE),
        ("Negative for effusion; nodule has resolved", labels.NONE),
        ("No effusion. A nodule in the left upper zone, 1.5 cm.", "nodule"),
        ("No nodule on the left but a nodule on the right", "nodule"),
        ("No effusion, there is a nodule", "nodule"),
        ("No effusion, and a nodule", "nodule"),
        ("No significant interval change in the effusion", "effusion"),
        ("Not only a nodule", "nodule"),
        ("A nodule without an effusion", "nodule"),
        ("A nodule, which is not calcified", "nodule"),
        ("An effusion cannot be excluded", "effusion"),
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
    assert read("Finding: Mrs Smith", None, r"finding: (.+)") == labels.OTHER


def test_a_row_without_a_reference_label_does_not_count() -> None:
    rows = [
        {"labels": {"finding": "Nodule"}, "generated": "nodule"},
        {"labels": {"finding": None}, "generated": "nodule"},
        {"labels": {}, "generated": "nodule"},
    ]
    classes, pairs = labels.stated_and_right(rows, "finding", spec(["nodule", "effusion"]))
    assert classes == ("effusion", "nodule")
    assert pairs == [("nodule", "nodule"), None, None]


def test_confusion_counts_every_labelled_row_once() -> None:
    pairs = [("a", "a"), ("a", "b"), ("a", "b"), None, ("b", labels.NONE)]
    assert labels.confusion(pairs) == {"a": {"a": 1, "b": 2}, "b": {labels.NONE: 1}}
    assert labels.commonest_share(pairs) == 0.75


def test_a_pattern_that_would_take_for_ever_finds_nothing(caplog: pytest.LogCaptureFixture) -> None:
    pattern = "^(?:.*?,){14}(nodule)"
    assert read("clear," * 14 + "nodule", pattern=pattern) == "nodule"
    assert read("clear," * 60, pattern=pattern) == labels.NONE
    assert "took over 1 s on a text of 360 characters" in caplog.text
