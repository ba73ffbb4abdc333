"""Ranks that share a base among them do what one process does that holds all of it. `make shard-proof` shows more."""

from __future__ import annotations

from pathlib import Path

from tests.forked import Forks
from tests.shard_proof import make_rows, prove
from tests.tiny import make_model


def test_two_ranks_share_a_base_and_do_what_one_process_does(tmp_path: Path, forks: Forks):
    make_model("qwen3_vl", tmp_path / "base")
    make_rows(tmp_path / "rows")
    assert prove(tmp_path, forks, resumed=False, num_train_epochs=1) == []
