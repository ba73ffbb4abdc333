from __future__ import annotations

from pathlib import Path

import pytest

from job.store import Store, open_store
from tests.s3 import SMALL_PART, bucket, new_bucket, s3, s3_server

__all__ = ["bucket", "new_bucket", "s3", "s3_server", "store"]


@pytest.fixture(params=["s3", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Each door in turn. The prefix holds what prefixes may hold."""
    if request.param == "s3":
        store = open_store(f"s3://{request.getfixturevalue('bucket')}/a prefix/ü")
        store.part_size = SMALL_PART  # type: ignore[attr-defined]
        return store
    return open_store(f"file://{tmp_path}/a%20store")
