"""Merged weights in 4 bits, in FP8 and in INT4, by the libraries themselves."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

FORMATS = ROOT / "build" / "formats"


@pytest.mark.skipif(not FORMATS.exists(), reason="make test brings bitsandbytes and llmcompressor")
@pytest.mark.timeout(600)
def test_merged_weights_in_fewer_bits_are_right_and_load_again() -> None:
    """In a process of its own: whatever imports peft would wait seconds for these libraries."""
    command = [sys.executable, "-m", "pytest", "tests/export/fewer_bits.py"]
    paths = f"{FORMATS}:{os.environ.get('PYTHONPATH', '')}"
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout
    assert "10 passed" in ended.stdout
