"""SIGTERM at random moments of the small job: how long until it is gone, and how much work is lost.

    python benchmarks/preemption.py [N]

Each of N attempts (default 40) on a fresh output is stopped once, in a stage that is chosen in turn. What is lost is the
half-made step: its micro-batches are counted.
"""

from __future__ import annotations

import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import append

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
STAGES = ("stage in", "load", "evaluate before", "train", "evaluate after", "export")


def stage_of(output: Path) -> str | None:
    try:
        status = json.loads((output / "status.json").read_text())
    except (OSError, ValueError):
        return None
    return str(status["stage"])


def stopped(demo: Path, folder: Path, stage: str, chance: random.Random) -> tuple[float, int | None]:
    """Seconds from SIGTERM to the end, and lost micro-batches when it came in training (None elsewhere)."""
    from tests.conftest import job_environment
    from tests.resume_proof import small_spec

    output = folder / "output"
    environment = job_environment(folder, JOB_SPEC=small_spec(demo, str(output), merged=True))
    command = [sys.executable, "-m", "job", "run"]
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and stage_of(output) != stage:
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.8 if stage == "train" else 0.3))
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    seconds = time.monotonic() - began
    if process.returncode not in (0, 75):
        raise SystemExit(f"ended with {process.returncode}: {stderr}")
    left = re.search(r"notice → commit: .* at step (\d+), (\d+) micro-batches dropped", stderr)
    return seconds, int(left[2]) if left else None


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    demo = ROOT / "build" / "tests" / "demo"
    subprocess.run([sys.executable, "examples/make_demo.py", str(demo), "--small"], cwd=ROOT, check=True)
    times: dict[str, list[float]] = {stage: [] for stage in STAGES}
    lost: list[int] = []
    for number in range(runs):
        stage = STAGES[number % len(STAGES)]
        with tempfile.TemporaryDirectory() as name:
            seconds, dropped = stopped(demo, Path(name), stage, random.Random(number))
        times[stage].append(seconds)
        lost += [dropped] if dropped is not None else []
        print(f"{stage}: {seconds:.2f} s" + (f", {dropped} micro-batches dropped" if dropped is not None else ""))
    for stage, measured in times.items():
        append("preemption", f"SIGTERM → exit, {stage}, median of {len(measured)}", statistics.median(measured), "s")
    everything = sorted(second for measured in times.values() for second in measured)
    p99 = everything[min(len(everything) - 1, int(0.99 * len(everything)))]
    append("preemption", f"SIGTERM → exit, p99 of {len(everything)}", p99, "s", goal="under 5", meets=p99 < 5)
    if lost:
        case = f"micro-batches of a half-made step dropped, most of {len(lost)} (4 make a step)"
        append("preemption", case, max(lost), "micro-batches", goal="at most 1", meets=max(lost) <= 1)


if __name__ == "__main__":
    main()
