"""The demo from nothing: does it learn, and how long does it take?

    python benchmarks/demo.py

Makes base and data in a fresh folder, runs the job twice as `make demo` does, and records what came out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import append

ROOT = Path(__file__).resolve().parent.parent


def timed(command: list[str], **environment: str) -> float:
    """Wall seconds of a command that must succeed."""
    began = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True)
    return time.monotonic() - began


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        making = timed([sys.executable, "examples/make_demo.py", name])
        environment = {
            "OMP_NUM_THREADS": "1",
            "JOB_SPEC": "examples/demo.yaml",
            "JOB_SCRATCH": str(folder / "scratch"),
            "JOB__MODEL__NAME_OR_PATH": str(folder / "base"),
            "JOB__DATASET__PATH": str(folder / "data"),
            "JOB__OUTPUT__URL": str(folder / "output"),
        }
        running = timed([sys.executable, "-m", "job", "run"], **environment)
        again = timed([sys.executable, "-m", "job", "run"], **environment)
        metrics = json.loads((folder / "output/evaluation/metrics.json").read_text())
    whole = making + running
    accuracy = metrics["after"]["finding_accuracy"]["value"]
    commonest = metrics["labels"]["finding"]["commonest_share"]
    gain = metrics["change"]["rougeL"]["value"]
    append("demo", "base, data and job, after installation", whole, "s", goal="under 360", meets=whole < 360)
    append("demo", "run again when published", again, "s", goal="under 2", meets=again < 2)
    append("demo", "finding_accuracy after", accuracy, "share", goal="at least 0.80", meets=accuracy >= 0.80)
    append("demo", "commonest finding", commonest, "share", goal="at most 0.35", meets=commonest <= 0.35)
    append("demo", "rougeL, change", gain, "of 1", goal="at least 0.3", meets=gain >= 0.3)


if __name__ == "__main__":
    main()
