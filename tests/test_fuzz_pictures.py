"""A sample of what `make fuzz` does with pictures, DICOM and archives; and that it would tell."""

from __future__ import annotations

import pytest

from tests import fuzz_pictures
from tests.fuzz_pictures import Verdict


def test_no_damaged_picture_or_archive_ends_the_reader() -> None:
    counts = {"images": 40, "dicom": 40, "archives": 8}
    for target, count in counts.items():
        table = fuzz_pictures.fuzz([target], count, seed=5, workers=1)
        ended = sum(table.ended.values(), start=fuzz_pictures.Counter())
        assert not table.failed, f"{table}"
        assert ended["accepted"] + ended["refused"] + ended["decoder"] == count
        assert ended["accepted"], "nothing good is left, so that little is read"


@pytest.mark.parametrize(
    ("ending", "seconds", "memory", "fault"),
    [
        ("traceback", 0.1, 0, "traceback"),
        ("death", 0.1, 0, "death"),
        ("refused", 9.0, 0, "over 5 s"),
        ("accepted", 0.1, 2**33, "took 8192 MB"),
        ("decoder", 0.1, 0, ""),
        ("refused", 0.1, 0, ""),
    ],
)
def test_a_fault_is_told_from_a_good_ending(ending: str, seconds: float, memory: int, fault: str) -> None:
    found = Verdict("kind", ending, "", seconds, memory).fault
    assert found.startswith(fault)
    assert bool(found) == bool(fault)


def test_the_same_seed_gives_the_same_cases() -> None:
    assert [fuzz_pictures.made("images", 3, n) for n in range(30)] == [
        fuzz_pictures.made("images", 3, n) for n in range(30)
    ]
