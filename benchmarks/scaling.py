"""The job on 1, 2 and 4 GPUs of one machine: samples a second, and whether the losses are the same.

    python benchmarks/scaling.py MODEL [--counts 1 2 4] [--batch 32] [--rows 320] [--precision auto] [--folder FOLDER]

MODEL is a Llama 3.2 Vision checkpoint, real or made by models.py; LoRA is trained everywhere. Each count is a job of its own
under torchrun, with the same rows in the same steps; compile caches are shared, and the first steps left out of the speed.
Without a GPU it tries the same with gloo and a tiny model (`--side 112`), and records nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from record import append
from throughput import COMPILING, make_data, started

GOALS = {2: 1.9, 4: 3.7}


def steps(model: Path, data: Path, folder: Path, count: int, batch: int, precision: str) -> list[dict[str, Any]]:
    """The lines of numbers of a job on `count` devices."""
    out = folder / f"job-{count}"
    spec = {
        "model": {"name_or_path": str(model), "precision": precision},
        "lora": {"r": 16, "lora_alpha": 16},
        "dataset": {"path": str(data), "eval_fraction": 0},
        "training": {"num_train_epochs": 1, "learning_rate": 1e-4, "effective_batch_size": batch},
        "checkpoint": {"save_steps": 1000},
        "export": {"merged": False},
        "output": {"url": str(out)},
    }
    settings = {"JOB_SPEC": yaml.safe_dump(spec), "JOB_SCRATCH": str(folder / "scratch")}
    launch = ["-m", "job.torchrun", "--standalone", f"--nproc-per-node={count}", "-m", "job", "run"]
    started([sys.executable, *launch], os.environ | settings, out.with_suffix(".log"))
    lines = map(json.loads, (out / "logs" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--side", type=int, default=512, help="pixels of a picture")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    import torch

    folder = given.folder or Path(tempfile.mkdtemp(prefix="scaling-"))
    data = make_data(folder / "data", given.rows, given.side)
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""

    def tell(case: str, value: float, unit: str, goal: str = "", meets: bool | None = None) -> None:
        if device:
            append("scaling", case, value, unit, goal=goal, meets=meets, device=device)
        else:
            print(f"scaling · {case}: {value:.4g} {unit}", flush=True)

    found = {count: steps(given.model, data, folder, count, given.batch, given.precision) for count in given.counts}
    first = given.counts[0]
    speeds = {}
    for count, lines in found.items():
        rest = lines[COMPILING:]
        speeds[count] = given.batch * len(rest) / sum(line["step_seconds"] for line in rest)
        tell(f"{count} devices", speeds[count], "samples/s")
    for count in given.counts[1:]:
        ratio, goal = speeds[count] / speeds[first], GOALS.get(count)
        words = f"at least {goal:g}" if goal else ""
        tell(f"{count} devices over {first}", ratio, "times", words, ratio >= goal if goal else None)
        pairs = list(zip(found[count], found[first], strict=True))
        assert all(mine["rows"] == theirs["rows"] for mine, theirs in pairs), "other rows in a step"
        apart = max(abs(mine["loss"] - theirs["loss"]) / theirs["loss"] for mine, theirs in pairs)
        tell(f"{count} devices: largest difference of a loss", 100 * apart, "%", "under 1", apart < 0.01)


if __name__ == "__main__":
    main()
