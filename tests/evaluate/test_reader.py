"""Findings are read from sentences as a careful reader takes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.config.schema import LabelSpec
from job.evaluate.label_metrics import finder
from tests.evaluate.reader_test import FINAL, TUNING, shares


@pytest.mark.parametrize("file", [TUNING, FINAL], ids=lambda file: file.stem)
def test_findings_are_read_right(file: Path) -> None:
    found = shares(file)
    assert found["certain"] >= 0.95
    assert found["uncertain"] >= 0.9


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("opacity", "Opacities at both bases"),
        ("metastasis", "Hepatic metastases"),
        ("mass", "Two masses"),
        ("diverticulum", "Several diverticula"),
        ("nodules", "One nodule"),
        ("bulla", "Apical bullae"),
        ("thrombus", "Thrombi in both veins"),
    ],
)
def test_plurals_are_the_same_finding(value: str, text: str) -> None:
    assert finder(LabelSpec(column="c", values=[value]), [])(text) == {value: "present"}


def test_the_strongest_mention_decides() -> None:
    find = finder(LabelSpec(column="c", values=["effusion", "pleural effusion"]), [])
    assert find("No effusion. An effusion is possible.") == {"effusion": "uncertain"}
    assert find("No effusion on the right. Possible effusion. A left effusion.") == {"effusion": "present"}
    assert find("A pleural effusion") == {"pleural effusion": "present"}
