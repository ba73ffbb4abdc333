"""The disk of the node."""

from pathlib import Path

import pytest

from job.errors import Unavailable
from job.scratch import full_disk_told


def test_a_disk_that_is_full_is_no_bug(tmp_path: Path):
    with pytest.raises(Unavailable, match=f"The disk that holds {tmp_path} is full"), full_disk_told(tmp_path):
        Path("/dev/full").write_bytes(b"x")
    with pytest.raises(FileNotFoundError), full_disk_told(tmp_path):
        (tmp_path / "none").read_bytes()
