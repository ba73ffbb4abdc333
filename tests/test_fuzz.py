"""A sample of `make fuzz`; and that it would tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import fuzz, fuzz_inputs


def test_no_wrong_input_ends_as_a_bug() -> None:
    table = fuzz.fuzz([*fuzz.TARGETS], 6, seed=1, specs=100)
    assert table.tried.total() == 6 * len(fuzz.TARGETS) + 100
    assert not table.failed, f"\n{table}"


@pytest.mark.parametrize(
    ("code", "said", "fault"),
    [
        (70, "exit 70: a bug: ValueError\n", "exit 70"),
        (78, "Traceback (most recent call last):\nexit 78: the spec\n", "a traceback"),
        (-6, "", "died of SIGABRT"),
        (78, "something else\n", "no sentence"),
        (78, "exit 78: the spec has 1 problem\n", ""),
        (0, "", ""),
    ],
)
def test_a_fault_is_told_from_a_good_ending(code: int, said: str, fault: str) -> None:
    assert fuzz.Verdict("kind", code, 0.1, 0, said).fault == fault


def test_seconds_and_memory_are_bounded() -> None:
    assert fuzz.Verdict("kind", 0, fuzz.SECONDS + 1, 0, "").fault == "over 5 s"
    assert fuzz.Verdict("kind", 0, 0.1, 2 * fuzz.MEMORY, "").fault == "took 2048 MB"


def test_the_same_seed_gives_the_same_cases(tmp_path: Path) -> None:
    import random

    (tmp_path / "case").mkdir()
    ground = fuzz_inputs.Ground(tmp_path / "base", tmp_path / "adapter", tmp_path / "data", tmp_path / "case")

    def cases() -> list[str]:
        made = []
        for number in range(20):
            ground.clear()
            case = fuzz_inputs.spec_case(random.Random(f"7 {number}"), ground)
            made.append(json.dumps([case.kind, case.arguments]))
        return made

    assert cases() == cases()
