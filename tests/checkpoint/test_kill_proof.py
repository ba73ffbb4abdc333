"""A sample of `make kill-proof`."""

from __future__ import annotations

from pathlib import Path

from tests.checkpoint.kill_proof import prove


def test_a_writer_killed_at_any_moment_tears_and_loses_nothing(bucket: str, tmp_path: Path) -> None:
    assert prove(20, [f"s3://{bucket}/out", str(tmp_path / "out")]) == (0, 0)
