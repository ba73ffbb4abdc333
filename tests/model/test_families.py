"""What is said of families holds together, and the tests take each of them."""

from __future__ import annotations

import job.model.families as known
from job.report.licences import LICENCES
from tests.families import FAMILIES


def test_every_family_that_is_known_whole_is_in_the_tests() -> None:
    whole = {model_type for model_type, family in known.FAMILIES.items() if family.whole}
    assert whole - {"qwen2_vl"} == set(FAMILIES)  # Qwen2-VL goes as Qwen2.5-VL, which took over its processor


def test_every_licence_is_told() -> None:
    named = {licence for family in known.FAMILIES.values() for _, licence in family.named}
    assert named | {family.maker[1] for family in known.FAMILIES.values() if family.maker} <= LICENCES.keys()
