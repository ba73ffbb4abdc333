"""Train tiny models whose base several processes share, and compare with one process that holds all of it.

    python -m tests.shard_proof [FAMILY …]

For each family, by default three: a job of one process; one of 2 processes; and one that begins with 4, one of which is sent
SIGTERM, goes on with 2, one of which is sent SIGKILL, and ends with 1. Losses of all must be equal to 1e-5, and so must adapters,
answers, losses of answers and occlusion maps; `merged/` must be, to the byte, what merging the same adapter makes of the base.
Closes with `families=N proved=N`.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from job.export.merge import merge_to_folder, recipe
from job.export.tensor_map import changes, read_adapter
from job.model.weight_map import read_base
from tests.distributed.test_ranks import Run
from tests.forked import Forks
from tests.resume_proof import trajectory
from tests.tiny import make_model, picture

FAMILIES = ("mllama", "qwen3_vl", "gemma3")
CLOSE = 1e-5


def make_rows(folder: Path) -> Path:
    """Fourteen pictures, three of them to be held out."""
    folder.mkdir()
    captions = [
        {"file_name": f"{n}.png", "caption": f"There is a nodule. {'It is large. ' * (n % 3)}"} for n in range(14)
    ]
    for number, each in enumerate(captions):
        picture(number, 60 + 8 * (number % 4), 60).save(folder / each["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, captions)))
    return folder


def spec_of(folder: Path, output: Path, shard: str, **training: Any) -> str:
    """Six steps of four rows; the last of an epoch has three, so that of four ranks one has none."""
    tree = {
        "model": {"name_or_path": str(folder / "base")},
        "lora": {"r": 4},
        "dataset": {"path": str(folder / "rows"), "eval_rows": 3},
        "training": {"num_train_epochs": 2, "effective_batch_size": 4, "per_device_train_batch_size": 1}
        | {"learning_rate": 0.01, "gradient_checkpointing": True, "shard": shard}
        | training,
        "checkpoint": {"save_steps": 1, "keep": 9},
        "evaluation": {"max_new_tokens": 6, "explained_rows": 1, "eval_steps": 3, "eval_samples": 1, "batch_size": 2},
        "export": {"gate": {"rows": 2}},
        "output": {"url": str(output)},
    }
    return yaml.safe_dump(tree)


def ended(run: Run, codes: list[int]) -> list[str]:
    """What is wrong with how the ranks of a run ended."""
    found = run.end()
    return [] if found == codes else [f"{found} in place of {codes}: {run.words()[-2000:]}"]


def apart(one: Path, other: Path) -> list[str]:
    """Where two outputs differ by more than rounding."""
    ours, theirs = (trajectory((output / "logs/metrics.jsonl").read_bytes()) for output in (one, other))
    wrong = [] if [line[4] for line in ours] == [line[4] for line in theirs] else ["other rows"]
    gaps = {"losses": max(abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=True))}
    first, second = (load_file(output / "adapter/adapter_model.safetensors") for output in (one, other))
    gaps["adapters"] = max(float((first[name] - second[name]).abs().max()) for name in second)
    for when in ("before", "after"):
        answers = [
            [json.loads(line) for line in (output / f"evaluation/{when}.jsonl").read_text().splitlines()]
            for output in (one, other)
        ]
        wrong += [f"answers {when}" for a, b in zip(*answers, strict=True) if a["generated"] != b["generated"]]
        for name in ("loss", "swapped_loss"):
            pairs = [(a[name] or 0.0, b[name] or 0.0) for a, b in zip(*answers, strict=True)]
            gaps[f"{name} {when}"] = max(abs(a - b) for a, b in pairs)
    maps = [json.loads((output / "evaluation/occlusion.json").read_text()) for output in (one, other)]
    for name in maps[0].keys() - {"run"}:
        gaps["maps"] = float((torch.tensor(maps[0][name]) - torch.tensor(maps[1][name])).abs().max())
    return wrong + [f"{name} by {gap:.1g}" for name, gap in gaps.items() if not gap <= 2 * CLOSE]


def merged_otherwise(folder: Path, output: Path) -> list[str]:
    """Files of `merged/` that are not what one process makes of the same adapter."""
    base, adapter = read_base(folder / "base"), output / "adapter"
    todo = recipe(base, adapter, changes(base, *read_adapter(adapter)), torch.device("cpu"))
    merge_to_folder(todo, folder / "again")
    return [
        file for file in base.files if (folder / "again" / file).read_bytes() != (output / "merged" / file).read_bytes()
    ]


def prove(folder: Path, forks: Forks, *, resumed: bool = True, **training: Any) -> list[str]:
    """Return what is not as it should be with the base and the rows in `folder`."""
    alone, two, stopped = (folder / name for name in ("alone", "two", "stopped"))
    wrong = ended(Run(forks, 1, spec_of(folder, alone, "none", **training), folder), [0])
    run = Run(forks, 2, spec_of(folder, two, "fsdp", **training), folder)
    wrong += ended(run, [0, 0])
    if wrong:
        return wrong
    wrong += [] if "sharded over 2 devices" in run.words() else ["not sharded"]
    wrong += apart(two, alone) + merged_otherwise(folder, two)
    if resumed:
        spec = spec_of(folder, stopped, "fsdp")
        run = Run(forks, 4, spec, folder)
        run.send(signal.SIGTERM, 1, 1)
        wrong += ended(run, [75] * 4)
        run = Run(forks, 2, spec, folder)
        run.send(signal.SIGKILL, 1, 3)
        wrong += ended(run, [69, -signal.SIGKILL])
        wrong += [] if "rank 1 on" in run.words() else [f"the dead rank is not named: {run.words()}"]
        wrong += ended(Run(forks, 1, spec, folder), [0])
        wrong += apart(stopped, alone) if not wrong else []
    return wrong


def main() -> None:
    families, proved = sys.argv[1:] or FAMILIES, 0
    forks = Forks()
    for family in families:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_model(family, folder / "base")
            make_rows(folder / "rows")
            wrong = prove(folder, forks)
        print(f"{family}: {'; '.join(wrong) or 'as it should be'}, {time.monotonic() - began:.0f} s", flush=True)
        proved += not wrong
    forks.close()
    print(f"families={len(families)} proved={proved}")
    sys.exit(proved != len(families))


if __name__ == "__main__":
    main()
