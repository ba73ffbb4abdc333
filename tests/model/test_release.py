"""A released model takes no memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, job_environment

PROGRAM = """
import torch
from pathlib import Path
from job.model.loaded import release

def anonymous():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024

torch.ones(30_000_000, dtype=torch.uint8)  # once this is freed, malloc takes smaller blocks from its heap
weights, between = [], []
for _ in range(200):
    weights.append(torch.nn.Parameter(torch.ones(250_000)))
    between.append(torch.ones(1000))  # these stay, so the heap does not shrink by itself
before = anonymous()
release(torch.nn.ParameterList(weights))
print(before - anonymous())
"""


def test_the_memory_of_a_released_model_goes_back_to_the_system(tmp_path: Path) -> None:
    """malloc does not keep it."""
    environment = job_environment(tmp_path, PYTHONPATH=str(ROOT))
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(said.stdout) > 0.95 * 200 * 1_000_000
