"""The job on 1, 2 and 4 GPUs of one machine: samples a second, and whether the losses are the same.

    python benchmarks/scaling.py MODEL [--counts 1 2 4] [--batch 32] [--rows 320] [--precision auto] [--folder FOLDER]

MODEL is a Llama 3.2 Vision checkpoint, real or made by models.py; LoRA is trained everywhere. Each count is a job of its own
under torchrun, with the same rows in the same steps; compile caches are shared, and the first steps left out of the speed.
Cards of one kind differ by some per cent, and the slowest sets the pace of all: so one device is tried on every card, each
alone but at the same time, and a count is compared with the mean of its own cards.
Without a GPU it tries the same with gloo and a tiny model (`--side 112`), and records nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from results import append
from throughput import COMPILING, make_data, started

GOALS = {2: 1.9, 4: 3.7}


def steps(
    model: Path, data: Path, folder: Path, batch: int, precision: str, count: int, card: int = 0
) -> list[dict[str, Any]]:
    """The lines of numbers of a job on `count` devices, from the one with the number `card` on."""
    out = folder / f"job-{count}-from-{card}"
    spec = {
        "model": {"name_or_path": str(model), "precision": precision},
        "lora": {"r": 16, "lora_alpha": 16},
        "dataset": {"path": str(data), "eval_fraction": 0},
        "training": {"num_train_epochs": 1, "learning_rate": 1e-4, "effective_batch_size": batch},
        "checkpoint": {"save_steps": 1000},
        "export": {"merged": False},
        "output": {"url": str(out)},
    }
    visible = ",".join(str(card + number) for number in range(count))
    settings = {
        "JOB_SPEC": yaml.safe_dump(spec),
        "JOB_SCRATCH": str(folder / "scratch"),
        "CUDA_VISIBLE_DEVICES": visible,
    }
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

    run = partial(steps, given.model, data, folder, given.batch, given.precision)
    counts = sorted(given.counts)
    cards = range(counts[-1] if device and counts[0] == 1 else 1)
    with ThreadPoolExecutor(len(cards)) as pool:
        alone = list(pool.map(partial(run, counts[0]), cards))
    speeds = [speed(lines, given.batch) for lines in alone]
    for card, each in zip(cards, speeds, strict=True):
        tell(f"{counts[0]} devices" + f", card {card}" * (len(cards) > 1), each, "samples/s")
    for count in counts[1:]:
        lines = run(count)
        found = speed(lines, given.batch)
        tell(f"{count} devices", found, "samples/s")
        ratio, goal = found / statistics.mean(speeds[:count]), GOALS.get(count)
        words = f"at least {goal:g}" if goal else ""
        tell(f"{count} devices over {counts[0]}", ratio, "times", words, ratio >= goal if goal else None)
        waits = [line["rank_wait_seconds"] for line in lines[COMPILING:]]
        for rank, seconds in enumerate(zip(*waits, strict=True)):
            tell(f"{count} devices: rank {rank} waits for the others' gradients", statistics.mean(seconds), "s a step")
        pairs = list(zip(lines, alone[0], strict=True))
        assert all(mine["rows"] == theirs["rows"] for mine, theirs in pairs), "other rows in a step"
        apart = max(abs(mine["loss"] - theirs["loss"]) / theirs["loss"] for mine, theirs in pairs)
        tell(f"{count} devices: largest difference of a loss", 100 * apart, "%", "under 1", apart < 0.01)


def speed(lines: list[dict[str, Any]], batch: int) -> float:
    """Samples a second behind the steps that compile."""
    rest = lines[COMPILING:]
    return batch * len(rest) / float(sum(line["step_seconds"] for line in rest))


if __name__ == "__main__":
    main()
