"""Progress is shown on a terminal, and nowhere else."""

from __future__ import annotations

import os
import pty
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest

from job.runtime.staging import local_path
from job.store import open_store


@pytest.mark.parametrize("terminal", [True, False])
def test_a_fetch_shows_its_bytes_on_a_terminal(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], terminal: bool
):
    open_store(f"s3://{bucket}/rows").write("a.bin", bytes(40_000))
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with os.fdopen(theirs, "w") as shown, monkeypatch.context() as there:
        if terminal:
            there.setattr(sys, "stderr", shown)
        local_path(f"s3://{bucket}/rows", tmp_path, "dataset.path")
    said = b""
    with suppress(OSError):  # the end, once the other side is closed
        while piece := os.read(ours, 10_000):
            said += piece
    os.close(ours)
    assert (b"fetch dataset.path: 100%" in said) is terminal
    assert terminal or (said, capfd.readouterr().err) == (b"", "")
