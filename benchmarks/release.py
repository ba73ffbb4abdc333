"""The whole jobs that every release runs on a GPU, each by whole_job.py, as many at a time as there are GPUs.

    python benchmarks/release.py [CASE ...] [--folder FOLDER] [--epochs 2] [--limit SECONDS]

A CASE is a family and gigabytes of the card, `mllama@48`, or `mllama@24:4bit`; without any all of `CASES` run. Models are made
first, one for each family, two at a time on each GPU. Cases are taken longest first, each by the next GPU that is free; the one
that is compared with an uncut run is `UNCUT`. What each printed is in `FOLDER/CASE.out`. Ends with 1 when a job did not end
published. The disk has to hold all models, and for each GPU two more.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from shapes import FAMILIES

HERE = Path(__file__).resolve().parent
CASES = (
    "mllama@48",
    "mllama@24:4bit",
    "mllama@80",
    "qwen2_5_vl@24",
    "qwen2_5_vl@48",
    "qwen3_vl@24",
    "qwen3_vl@48",
    "gemma3@24",
)
UNCUT = "mllama@48"


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    card: str
    precision: str | None

    @classmethod
    def of(cls, name: str) -> Case:
        """Raises ValueError for what is no case."""
        family, at, rest = name.partition("@")
        card, _, precision = rest.partition(":")
        if family not in FAMILIES or not at or float(card) <= 0:
            raise ValueError(name)
        return cls(name, family, card, precision or None)


def on(gpu: str) -> dict[str, str]:
    return os.environ | {"CUDA_VISIBLE_DEVICES": gpu}


def make(family: str, folder: Path, gpu: str) -> None:
    """The model in its published shape, unless it is there."""
    if (folder / "config.json").exists():
        return
    command: list[str | Path] = [sys.executable, HERE / "models.py", family, folder, "--dtype", "bfloat16"]
    subprocess.run(command, env=on(gpu), check=True, stdout=subprocess.DEVNULL)


def whole_job(case: Case, models: Path, folder: Path, gpu: str, given: argparse.Namespace) -> bool:
    """Run the case on one GPU. Returns whether it ended as it should; its outputs are removed then."""
    own = folder / case.name.replace("@", "-").replace(":", "-")
    command: list[str | Path] = [sys.executable, HERE / "whole_job.py", case.family, "--card", case.card]
    command += ["--epochs", str(given.epochs), "--model", models / case.family, "--folder", own]
    command += ["--precision", case.precision] if case.precision else []
    command += [] if case.name == UNCUT else ["--no-uncut"]
    command += ["--limit", str(given.limit)] if given.limit else []
    with (folder / f"{own.name}.out").open("w") as stream:
        code = subprocess.run(command, env=on(gpu), check=False, stdout=stream, stderr=stream).returncode
    print(f"{case.name}: {'published' if code == 0 else f'ended with {code}'}; see {stream.name}", flush=True)
    if code == 0:
        shutil.rmtree(own / "output", ignore_errors=True)
        shutil.rmtree(own / "uncut", ignore_errors=True)
    return code == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", type=Case.of, default=[Case.of(name) for name in CASES])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--limit", type=float, help="seconds after which a case is killed")
    given = parser.parse_args()
    import torch

    count = torch.cuda.device_count()
    if not count:
        sys.exit("there is no GPU here; benchmarks/whole_job.py FAMILY --size tiny tries a whole job on a CPU")
    folder = (given.folder or Path(tempfile.mkdtemp(prefix="release-"))).resolve()
    models, families = folder / "models", sorted({case.family for case in given.cases})
    models.mkdir(parents=True, exist_ok=True)
    free: Queue[str] = Queue()
    for number in range(count):
        free.put(str(number))

    def run(case: Case) -> bool:
        gpu = free.get()
        try:
            return whole_job(case, models, folder, gpu, given)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(2 * count) as threads:
        jobs = [threads.submit(make, each, models / each, str(n % count)) for n, each in enumerate(families)]
        for job in jobs:
            job.result()
    with ThreadPoolExecutor(count) as threads:
        sys.exit(not all(list(threads.map(run, given.cases))))


if __name__ == "__main__":
    main()
