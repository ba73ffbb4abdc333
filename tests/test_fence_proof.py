"""A sample of `make fence-proof`."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT


def test_a_frozen_job_spoils_nothing_of_the_one_that_took_over():
    """In a process without other threads, since the jobs are forked."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fence_proof", "1", "4"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("runs=1 differed=0")
