"""One family of tests/other_families.py, stopped and killed on its way; `make test-families` does so with each."""

import os
from pathlib import Path
from typing import TextIO

from tests.family_proof import prove
from tests.forked import Forked, Forks


def test_a_family_that_is_stopped_and_killed_ends_published(tmp_path: Path, forks: Forks) -> None:
    """On forks; test_whole_job.py does the same with processes that import their libraries."""

    def start(environment: dict[str, str], log: TextIO) -> Forked:
        return forks.start(["run"], os.environ | environment, log, own_session=True)

    assert prove("idefics3", tmp_path, uncut=False, start=start) == []
