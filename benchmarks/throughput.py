"""The job and Unsloth's notebook side by side on one GPU: the same model, images, order, start and effective batch.

    python benchmarks/throughput.py MODEL [--case language|everywhere|generation] [--rows 48] [--epochs 3] [--folder FOLDER]
                                          [--precision 4bit|16bit] [--restart] [--alone] [--card GB]
                                          [--notebooks-layers] [--uncompiled] [--peer plain|tuned]

MODEL is a checkpoint, real or made by models.py. Each flow is a process of its own, as a user starts it, with compile caches of
its own. The job is granted 48 GB of the GPU, as much as an A6000 has; --card says otherwise. The notebook takes what it takes.

With --peer tuned the notebook has what a user would change first: 16 bits, all 8 rows at once, and checkpoints that are not
offloaded. With --uncompiled it runs without torch.compile, whose first step takes minutes in some families. With --alone it is
left out. With --notebooks-layers the job adapts the layers that the notebook chose, for families where it would choose others.
Neither flow adapts the experts of a mixture.

With --restart the job is then started once more as a scheduler would on a new node, from its last checkpoint and with nothing
on scratch. The case `generation` has ROWS captions of 64 tokens generated: one by one as in the notebook, and by the job's
measurement behind training, which also takes the loss of each. Shares of the card's limit are by the formula of flops.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from results import append

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BATCH, TOKENS, A6000 = 8, 64, 48.0
COMPILING = 2
"""First steps left out of the speed: the first compiles, the second compiles again for another number of tokens."""
WORDS = ("lung", "heart", "rib", "left", "right", "upper", "lower", "clear", "effusion", "opacity", "mild", "is", "no")
GOALS = {"plain": {"language": 4.0, "everywhere": 1.5}, "tuned": {"language": 2.5, "everywhere": 2.0}}


def make_data(folder: Path, rows: int, side: int = 512) -> Path:
    """Noise in squares of `side` pixels, and captions of 20 to 60 words; three rows a patient."""
    folder.mkdir(parents=True, exist_ok=True)
    noise, chance = np.random.default_rng(0), random.Random(0)
    lines = []
    for number in range(rows):
        small = noise.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        caption = " ".join(chance.choice(WORDS) for _ in range(chance.randint(20, 60))) + "."
        row = {"file_name": f"{number}.png", "caption": caption, "patient_id": f"patient-{number // 3}"}
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def caches(folder: Path) -> dict[str, str]:
    """Compile caches of one flow alone."""
    names = {
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
        "UNSLOTH_COMPILE_LOCATION": "unsloth",
        "UNSLOTH_MEGA_CACHE_DIR": "mega",
    }
    return {variable: str(folder / name) for variable, name in names.items()}


def notebook(
    model: Path,
    data: Path,
    out: Path,
    case: str,
    epochs: int,
    precision: str,
    generate: int = 0,
    *,
    compiled: bool = True,
    tuned: bool = False,
) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / "notebook.py"), str(model), str(data), str(out)]
    command += ["--vision", "true" if case == "everywhere" else "false", "--epochs", str(epochs)]
    command += ["--generate", str(generate), "--precision", precision]
    if tuned:
        command += ["--micro", str(BATCH), "--accumulation", "1", "--checkpoints", "kept"]
    settings = os.environ | caches(out.parent / "notebook-caches")
    if not compiled:
        settings["UNSLOTH_COMPILE_DISABLE"] = "1"
    started(command, settings, out.with_suffix(".log"))
    lines = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()] if epochs else []
    return {**json.loads((out / "facts.json").read_text()), "steps": lines}


def job(
    model: Path,
    data: Path,
    out: Path,
    case: str,
    epochs: int,
    start: Path | None,
    scratch: Path,
    precision: str,
    generate: int = 0,
    *,
    their_layers: bool = False,
) -> dict[str, Any]:
    """One attempt of the job. `seconds` of a step count from the start of the process, as in the notebook's."""
    spec: dict[str, Any] = {
        "model": {"name_or_path": str(model), "precision": precision},
        "lora": {"r": 16, "lora_alpha": 16, "finetune_vision_layers": case == "everywhere"},
        "dataset": {"path": str(data), "eval_fraction": 0},
        "training": {
            "num_train_epochs": epochs,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0,
            "optim": "adamw_8bit",
            "effective_batch_size": BATCH,
        },
        "checkpoint": {"save_steps": 4},
        "export": {"merged": False},
        "output": {"url": str(out)},
    }
    if generate:
        spec["dataset"] = {"path": str(data), "eval_path": str(data)}
        spec["evaluation"] = {"max_rows": generate, "batch_size": 16, "max_new_tokens": TOKENS}
    if start is not None:
        spec["lora"]["init_adapter"] = str(start)
    if start is not None and their_layers:
        spec["lora"]["target_modules"] = json.loads((start / "adapter_config.json").read_text())["target_modules"]
    settings = {name: value for name, value in os.environ.items() if not name.endswith(("_CACHE_DIR", "_LOCATION"))}
    began = time.time()
    started(
        [sys.executable, "-m", "job", "run"],
        settings | {"JOB_SPEC": yaml.safe_dump(spec), "JOB_SCRATCH": str(scratch)},
        out.with_suffix(f".{scratch.name}.log"),
    )
    lines = [json.loads(line) for line in (out / "logs" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:  # times of day are whole seconds; the steps' own are not
        line["seconds"] = datetime.fromisoformat(line["time"].replace("Z", "+00:00")).timestamp() - began
    for before, line in pairwise(lines):
        if before["seconds"] > 0:  # not of an earlier attempt
            line["seconds"] = before["seconds"] + line["step_seconds"]
    log = out.with_suffix(f".{scratch.name}.log").read_text()
    said = re.search(r"evaluate after: ([\d.]+) s", log)
    foreseen = re.search(r"estimate: GPU memory in all ([\d.]+) GB", log)
    return {
        "steps": lines,
        "peak_gb": max(line.get("gpu_memory_reserved_gb", 0) for line in lines),
        "allocated_gb": max(line.get("gpu_memory_peak_gb", 0) for line in lines),
        "foreseen_gb": float(foreseen[1]) if foreseen else None,
        "generation": float(said[1]) if said else None,
    }


def started(command: list[str], environment: dict[str, str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        code = subprocess.run(command, env=environment, cwd=ROOT, stdout=stream, stderr=stream, check=False).returncode
    if code:
        print("\n".join(log.read_text().splitlines()[-40:]))
        sys.exit(f"{' '.join(command[:4])}… ended with {code}; its output is in {log}")


def speed(steps: list[dict[str, Any]]) -> float:
    """Samples per second behind the steps that compile."""
    rest = steps[COMPILING - 1 :]
    return BATCH * (len(rest) - 1) / float(rest[-1]["seconds"] - rest[0]["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--case", choices=(*GOALS["plain"], "generation"), default="language")
    parser.add_argument("--precision", choices=("4bit", "16bit"), default="4bit")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument(
        "--restart", action="store_true", help="also start again on a new node, from the last checkpoint"
    )
    parser.add_argument("--alone", action="store_true", help="without the notebook")
    parser.add_argument("--card", type=float, default=A6000, help="gigabytes of the GPU that the job is granted")
    parser.add_argument("--notebooks-layers", action="store_true", help="adapt the layers that the notebook chose")
    parser.add_argument("--peer", choices=("plain", "tuned"), default="plain")
    parser.add_argument("--uncompiled", action="store_true", help="the notebook without torch.compile")
    given = parser.parse_args()
    if given.peer == "tuned" and (given.precision != "16bit" or given.case == "generation"):
        parser.error("--peer tuned trains in 16 bits: add --precision 16bit")
    if given.case == "generation" and (given.alone or given.restart):
        parser.error("generation is measured beside the notebook, and once")
    import torch

    from job.planning.optional_packages import uncompiled

    if slow := uncompiled():
        sys.exit(f"starts would be timed with Python's own compiling: {slow}")
    device = f"{torch.cuda.get_device_name(0)}, {given.card:g} GB of it"
    os.environ["JOB_GPU_MEMORY_GB"] = str(given.card)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="throughput-"))
    data = make_data(folder / "data", given.rows)
    if given.case == "generation":
        generation(given, data, folder, device)
        return
    peer, start = None, None
    if not given.alone:
        theirs = folder / f"notebook-{given.case}"
        how = {"compiled": not given.uncompiled, "tuned": given.peer == "tuned"}
        peer = notebook(given.model, data, theirs, given.case, given.epochs, given.precision, **how)
        start = theirs / "start"
    out = folder / f"job-{given.case}"
    same = (given.case, given.epochs, start, folder / "scratch", given.precision)
    ours = job(given.model, data, out, *same, their_layers=given.notebooks_layers)
    report(given, peer, ours, device, cold=given.folder is None or given.restart)
    if given.restart:
        restart(given, data, out, start, folder, ours["steps"][0]["seconds"], device)


def label_of(given: Any) -> str:
    """Begins the names of a case's figures: which model, except for the first one, Llama 3.2 Vision in 4 bits."""
    family = json.loads((given.model / "config.json").read_text())["model_type"]
    first = (family, given.precision) == ("mllama", "4bit")
    label = given.case if first else f"{family} {given.precision}, {given.case}"
    return (
        f"{label}{', tuned peer' if given.peer == 'tuned' else ''}{', notebook uncompiled' if given.uncompiled else ''}"
    )


def generation(given: Any, data: Path, folder: Path, device: str) -> None:
    """The job has generated the same captions once before: before training, which is one epoch here."""
    peer = notebook(given.model, data, folder / "notebook-generation", "everywhere", 0, given.precision, given.rows)
    out = folder / "job-generation"
    ours = job(given.model, data, out, "everywhere", 1, None, folder / "scratch", given.precision, given.rows)
    for name, seconds in (("notebook", peer["generation"]), ("job", ours["generation"])):
        append("throughput", f"{given.rows} captions: {name}", seconds, "s", device=device)
    ratio = peer["generation"] / ours["generation"]
    case = f"{given.rows} captions: notebook's time over the job's"
    append("throughput", case, ratio, "times", goal="at least 4", meets=ratio >= 4, device=device)


def report(given: Any, peer: dict[str, Any] | None, ours: dict[str, Any], device: str, *, cold: bool) -> None:
    """`cold`: no earlier case compiled for this one."""
    case, first, mine = label_of(given), ours["steps"][0]["seconds"], speed(ours["steps"])
    append("throughput", f"{case}: job", mine, "samples/s", device=device)
    if peer is not None:
        beside(given, peer, ours, device)
    limits(given, {"notebook": peer, "job": ours}, ours["steps"], device)
    append(
        "throughput",
        f"{case}: job, GPU memory reserved",
        ours["peak_gb"],
        "GB",
        goal=f"under {given.card:g}",
        meets=ours["peak_gb"] < given.card,
        device=device,
    )
    if ours["foreseen_gb"]:
        share = ours["foreseen_gb"] / ours["allocated_gb"]
        append(
            "throughput",
            f"{case}: memory that check foresees over the peak allocated",
            share,
            "times",
            goal="within 15 %",
            meets=abs(share - 1) <= 0.15,
            device=device,
        )
    if cold and peer is not None:
        theirs = peer["steps"][0]["seconds"]
        append("throughput", f"{case}: notebook, start to first step, cold", theirs, "s", device=device)
        append(
            "throughput",
            f"{case}: job, start to first step, cold",
            first,
            "s",
            goal="no more than the notebook",
            meets=first <= theirs,
            device=device,
        )
    elif cold:
        append("throughput", f"{case}: job alone, start to first step, cold", first, "s", device=device)


def limits(given: Any, flows: dict[str, dict[str, Any] | None], lines: list[dict[str, Any]], device: str) -> None:
    """Of each flow, the share of the card's bf16 limit, and the seconds from its start to the 100th and 742nd step at its steady
    pace: three epochs of Radiology_mini have 742."""
    from flops import share_of_peak

    from job.model.base_model import base_facts

    facts, last = base_facts(given.model), lines[-1]
    text = last["tokens_per_second"] / last["samples_per_second"]
    for name, flow in flows.items():
        if flow is None:
            continue
        case, steps, fast = f"{label_of(given)}: {name}", flow["steps"], speed(flow["steps"])
        gpu = device.partition(",")[0]
        vision = given.case == "everywhere"
        share = share_of_peak(facts.config, facts.linears, text, fast, vision=vision, gpu=gpu)
        if share is not None:
            goal, meets = ("at least 40", share >= 0.4) if name == "job" and vision else ("", None)
            append(
                "throughput", f"{case}, share of bf16 limit", 100 * share, "%", goal=goal, meets=meets, device=device
            )
        for step in (100, 742):
            seconds = steps[COMPILING - 1]["seconds"] + (step - COMPILING) * BATCH / fast
            append("throughput", f"{case}, start to step {step}, projected", seconds, "s", device=device)


def beside(given: Any, peer: dict[str, Any], ours: dict[str, Any], device: str) -> None:
    """Speed and losses, of both flows."""
    theirs, mine = speed(peer["steps"]), speed(ours["steps"])
    case, goal = label_of(given), GOALS[given.peer][given.case]
    append("throughput", f"{case}: notebook", theirs, "samples/s", device=device)
    append(
        "throughput",
        f"{case}: job over notebook",
        mine / theirs,
        "times",
        goal=f"at least {goal:g}",
        meets=mine >= goal * theirs,
        device=device,
    )
    gaps = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(ours["steps"], peer["steps"], strict=True)]
    append(
        "throughput",
        f"{case}: first loss apart",
        100 * gaps[0],
        "%",
        goal="under 1",
        meets=gaps[0] < 0.01,
        device=device,
    )
    append("throughput", f"{case}: losses apart, median", 100 * statistics.median(gaps), "%", device=device)
    append("throughput", f"{case}: losses apart, largest", 100 * max(gaps), "%", device=device)
    append("throughput", f"{case}: notebook, GPU memory reserved", peer["peak_gb"], "GB", device=device)


def restart(given: Any, data: Path, out: Path, start: Path | None, folder: Path, cold: float, device: str) -> None:
    """As on a new node behind a preemption: the result is not there yet, scratch is empty, some steps are left."""
    (out / "RESULT.json").unlink()
    manifests = sorted((out / "checkpoints").glob("*/MANIFEST.json"))
    for later in manifests[1:]:
        later.unlink()
    first = int(manifests[0].parent.name.removeprefix("step-"))
    scratch = folder / "scratch-of-a-new-node"
    same = (given.case, given.epochs, start, scratch, given.precision)
    again = job(given.model, data, out, *same, their_layers=given.notebooks_layers)
    seconds = next(line["seconds"] for line in again["steps"] if line["step"] == first + 1)
    append(
        "throughput",
        f"{label_of(given)}: job, start to first step, on a new node",
        seconds,
        "s",
        goal=f"at most 60 % of cold, {0.6 * cold:.0f} s",
        meets=seconds <= 0.6 * cold,
        device=device,
    )


if __name__ == "__main__":
    main()
