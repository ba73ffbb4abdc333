"""One family of tests/other_families.py, stopped and killed on its way; `make test-families` does so with each."""

from pathlib import Path

from tests.family_proof import prove


def test_a_family_that_is_stopped_and_killed_ends_published(tmp_path: Path) -> None:
    assert prove("idefics3", tmp_path, uncut=False) == []
