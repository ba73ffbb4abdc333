"""A base that two GPUs share, as whole jobs: whether it ends, what a card holds, and samples a second.

    python benchmarks/sharding.py MODEL [--card 24] [--cards 2] [--rows 160] [--batch 16] [--folder FOLDER]

MODEL is a Llama 3.2 Vision checkpoint in the 11B shape, real or made by models.py, held in 16 bits under JOB_GPU_MEMORY_GB=CARD,
which one such card cannot. Each job goes from its spec to RESULT.json: shared by all cards; whole on each card with all of its
memory; and in 4 bits on one card of CARD gigabytes. Without a GPU nothing is recorded, and the spec asks for sharding.
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
from results import append
from scaling import speed
from throughput import make_data, started

LOSS = 0.01
"""Share by which a loss of the shared base may differ from that of the whole one."""


def whole_job(
    model: Path, data: Path, out: Path, cards: int, batch: int, given: dict[str, str], **sections: dict[str, Any]
) -> list[dict[str, Any]]:
    """Run one job to its end. Returns the lines of numbers of its steps."""
    spec = {
        "model": {"name_or_path": str(model)} | sections.get("model", {}),
        "lora": {"r": 16, "lora_alpha": 16},
        "dataset": {"path": str(data), "eval_rows": 16},
        "training": {"num_train_epochs": 1, "learning_rate": 1e-4, "effective_batch_size": batch}
        | sections.get("training", {}),
        "checkpoint": {"save_steps": 1000},
        "evaluation": {"explained_rows": 1},
        "output": {"url": str(out)},
    }
    settings = {"JOB_SPEC": yaml.safe_dump(spec), "JOB_SCRATCH": str(out.parent / "scratch")} | given
    launch = ["-m", "job.torchrun", "--standalone", f"--nproc-per-node={cards}", "-m", "job", "run"]
    started([sys.executable, *launch], os.environ | settings, out.with_suffix(".log"))
    assert (out / "RESULT.json").exists()
    lines = map(json.loads, (out / "logs" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--card", type=int, default=24, help="gigabytes of a card")
    parser.add_argument("--cards", type=int, default=2)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=512, help="pixels of a picture")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    import torch

    folder = given.folder or Path(tempfile.mkdtemp(prefix="sharding-"))
    data = make_data(folder / "data", given.rows, given.side)
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    small = {"JOB_GPU_MEMORY_GB": str(given.card)} if device else {}
    wide, four = ("16bit", "4bit") if device else ("32bit", "32bit")

    def tell(case: str, value: float, unit: str, goal: str = "", meets: bool | None = None) -> None:
        if device:
            append("sharding", case, value, unit, goal=goal, meets=meets, device=device)
        else:
            print(f"sharding · {case}: {value:.4g} {unit}", flush=True)

    def run(case: str, cards: int, limits: dict[str, str], precision: str, shard: str) -> list[dict[str, Any]]:
        sections = {"model": {"precision": precision}, "training": {"shard": shard}}
        lines = whole_job(given.model, data, folder / case, cards, given.batch, limits, **sections)
        tell(case, speed(lines, given.batch), "samples/s")
        if peaks := [line["gpu_memory_peak_gb"] for line in lines if "gpu_memory_peak_gb" in line]:
            tell(f"{case}: peak GPU memory of a step on rank 0", max(peaks), "GB")
        return lines

    shared = run("shared", given.cards, small, wide, "auto" if device else "fsdp")
    whole = run("whole", given.cards, {}, wide, "none")
    run("4bit", 1, small, four, "none")
    apart = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(shared, whole, strict=True))
    tell("shared: largest difference of a loss", 100 * apart, "%", f"under {100 * LOSS:g}", apart < LOSS)


if __name__ == "__main__":
    main()
