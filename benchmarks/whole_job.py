"""The whole job on the card it is for, from spec to RESULT.json, stopped and killed on the way.

    python benchmarks/whole_job.py FAMILY --card GB [--precision P] [--rows 96] [--epochs 3] [--model FOLDER] [--folder FOLDER]
                                   [--size full|tiny] [--no-uncut | --single] [--limit SECONDS]

A model of FAMILY in its published shape, with random weights, is made first, unless --model names one; several cases may share
it. The data are ROWS pictures of 512 pixels with captions of 20 to 60 words, three a patient. The job may take GB of the card.
Its spec is the defaults, but for the paths, `dataset.group_column`, what the options name, `dataset.eval_rows: 16`, which is
a full batch of answers, and `checkpoint.save_steps: 4`, since at the default of 50 a killed run of 33 steps would begin anew.
`JOB_LEASE_SECONDS` is 10.

1. The first start is sent SIGTERM at a third of the steps, and must end with 75 within `JOB_GRACE_SECONDS`.
2. The second one, on a new scratch folder, is sent SIGKILL at two thirds, with all its processes.
3. The third one, on a new scratch folder, must publish. It starts once the lease of the killed one has run out; that wait is
   of our making, is printed, and counts nowhere.
4. The same job, uncut and to another output, tells which losses to expect: without merged weights, and measured on one row.

Then the published files are compared with RESULT.json, the headers of `merged/` with the base's, and the losses of each step
with those of the uncut run. Ends with 1 when anything is not as it should be. At --limit what runs is killed, and what was
seen so far is printed; figures of a job that published by then are recorded. Variables of the job go to each start, so
`JOB__SECTION__FIELD` tries a spec that is not the default.

Logs, spec and output stay in the folder; `merged/` goes once it is checked, and scratch after each start. The disk has to hold
the base three times: itself, merged on scratch, and published. Cases in folders of their own can run side by side. On a CPU
(`--size tiny`) figures are printed and not recorded. whole_job_figures.py has the formulas.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import yaml
from results import append
from shapes import FAMILIES
from throughput import make_data, started
from whole_job_figures import Attempt, Figure, apart, figures, read_lines, table, unpublished

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LEASE, SLACK = 10.0, 3.0
"""Seconds of the lease, and how much longer it is waited for than `job.store.lease` does."""
POLL = 0.02
HELD_OUT = 16
"""Rows: as many as are answered at once."""
DEVICE = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"


class Unfinished(Exception):
    """An attempt did not end as it should: what was seen so far is told."""


class Overtime(Unfinished):
    """The time is over, which says nothing about the job."""


def process_of(environment: dict[str, str], log: TextIO) -> subprocess.Popen[str]:
    """Start the job in a session of its own."""
    command = [sys.executable, "-m", "job", "run"]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=log, stderr=log, text=True, start_new_session=True
    )


@dataclass(frozen=True)
class Case:
    """`label` begins the names of all its figures; `deadline` is in seconds of the monotonic clock; `start` starts the job with
    an environment and a log."""

    label: str
    folder: Path
    card: float | None
    deadline: float
    start: Callable[[dict[str, str], TextIO], Any] = process_of


def spec_of(model: Path, data: Path, output: Path, precision: str | None, epochs: int) -> dict[str, Any]:
    return {
        "name": "whole-job",
        "model": {"name_or_path": str(model)} | ({"precision": precision} if precision else {}),
        "dataset": {"path": str(data), "group_column": "patient_id", "eval_rows": HELD_OUT},
        "training": {"num_train_epochs": epochs},
        "checkpoint": {"save_steps": 4},
        "output": {"url": str(output)},
    }


def uncut_spec(spec: dict[str, Any], output: Path) -> dict[str, Any]:
    """The same training, with as little else as can be."""
    little = {"max_rows": 1, "max_new_tokens": 1, "explained_rows": 0}
    return spec | {"evaluation": little, "export": {"merged": False}, "output": {"url": str(output)}}


def attempt(case: Case, name: str, spec: dict[str, Any], cut: signal.Signals | None = None, at: float = 1) -> Attempt:
    """Start the job on a new scratch folder, and send it `cut` at the share `at` of all steps. Raises Overtime at the
    deadline. Its output goes to `NAME.log`."""
    scratch, log, output = case.folder / f"scratch-{name}", case.folder / f"{name}.log", Path(spec["output"]["url"])
    kept = {key: value for key, value in os.environ.items() if not key.endswith(("_CACHE_DIR", "_LOCATION"))}
    settings = {"JOB_SPEC": yaml.safe_dump(spec), "JOB_SCRATCH": str(scratch), "JOB_LEASE_SECONDS": str(LEASE)}
    settings |= {"JOB_GPU_MEMORY_GB": str(case.card)} if case.card else {}
    found = Attempt(name, began=time.monotonic(), resumed=newest_step(output))
    with log.open("w") as stream:
        process = case.start(kept | settings, stream)
    try:
        watch(case, process, found, scratch, log, cut, at)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        found.ended, found.code = time.monotonic(), process.wait()
        with suppress(OSError, ValueError):
            status = json.loads((output / "status.json").read_text())
            found.stages, found.foreseen = status.get("stages", {}), status.get("foreseen", {})
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{name}: {found.told()}", flush=True)
    return found


def watch(
    case: Case,
    process: Any,
    found: Attempt,
    scratch: Path,
    log: Path,
    cut: signal.Signals | None,
    at: float,
) -> None:
    """Note when steps end until the process does. What is cut is cut once."""
    total = None
    while process.poll() is None:
        if time.monotonic() > case.deadline:
            raise Overtime(f"{found.name}: stopped at --limit, after {time.monotonic() - found.began:.0f} s")
        numbers = next(scratch.glob("*/metrics.jsonl"), None)
        lines = [line for line in read_lines(numbers) if line["step"] > found.resumed] if numbers else []
        if len(lines) > len(found.lines):
            found.last = time.monotonic()
            found.first = found.first or found.last
            found.lines = lines
        if total is None:  # the plan's line of the training stage
            said = re.search(r"^ *train\b.*?(\d+) steps", log.read_text(), re.MULTILINE)
            total = int(said[1]) if said else None
        if cut and total and found.cut is None and lines and lines[-1]["step"] >= math.floor(at * total):
            found.cut = time.monotonic()
            (os.killpg if cut == signal.SIGKILL else os.kill)(process.pid, cut)
        time.sleep(POLL)


def newest_step(output: Path) -> int:
    """The step that a start goes on from; 0 when there is none."""
    manifests = output.glob("checkpoints/*/MANIFEST.json")
    return max((int(each.parent.name.removeprefix("step-")) for each in manifests), default=0)


def wait_for_lease(output: Path) -> float:
    """Let the lease of a killed attempt run out. Returns the seconds waited."""
    until = (output / "lease.json").stat().st_mtime + LEASE + SLACK
    seconds = max(0.0, until - time.time())
    time.sleep(seconds)
    return seconds


def whole(case: Case, spec: dict[str, Any], attempts: list[Attempt], *, single: bool) -> None:
    """The three starts, or the last one alone. Raises Unfinished when one ends otherwise than it should."""
    output = Path(spec["output"]["url"])
    plan = (
        ("notice", signal.SIGTERM, 1 / 3, 75),
        ("kill", signal.SIGKILL, 2 / 3, -signal.SIGKILL),
        ("end", None, 1.0, 0),
    )
    for name, cut, at, code in plan[-1:] if single else plan:
        attempts.append(attempt(case, name, spec, cut, at))
        if attempts[-1].code != code or (cut and attempts[-1].cut is None):
            tail = "\n".join((case.folder / f"{name}.log").read_text().splitlines()[-30:])
            raise Unfinished(f"{tail}\n{name}: ended with {attempts[-1].code}, not {code}")
        if cut == signal.SIGKILL:
            print(f"the lease of the killed one ran out after {wait_for_lease(output):.1f} s, which count nowhere")


def wrong_files(output: Path, base: Path) -> list[str]:
    """What is not as RESULT.json, or the base's headers, say."""
    from job.model.base_model import weight_files
    from job.model.header import read_header

    files = json.loads((output / "RESULT.json").read_text())["files"]

    def digest(key: str) -> str:
        with (output / key).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        found = dict(zip(files, pool.map(digest, files), strict=True))
    wrong = [f"{key} is not what RESULT.json says" for key in files if found[key] != files[key]["sha256"]]

    def headers(folder: Path) -> dict[str, Any]:
        return {
            f"{file.name}: {name}": (tensor["dtype"], tensor["shape"])
            for file in weight_files(folder)
            for name, tensor in read_header(file)[0].items()
        }

    if headers(output / "merged") != headers(base):
        wrong.append("merged/ has other tensors than the base")
    return wrong


def prove(case: Case, spec: dict[str, Any], base: Path, *, single: bool, uncut: bool) -> tuple[list[str], list[Figure]]:
    """What went wrong, and what was measured."""
    from job.runtime.peaks import used_bytes

    output, attempts, wrong = Path(spec["output"]["url"]), list[Attempt](), list[str]()
    try:
        whole(case, spec, attempts, single=single)
    except Unfinished as error:
        print(table(attempts))
        return [str(error)], [] if isinstance(error, Overtime) else [unpublished(attempts)]
    result = json.loads((output / "RESULT.json").read_text())
    attempts[-1].foreseen = attempts[-1].foreseen or result["lineage"].get("foreseen", {})
    attempts[-1].stages["publish"]["output"] = float(used_bytes(output))
    print(table(attempts))
    wrong += wrong_files(output, base)
    shutil.rmtree(output / "merged")
    published, difference = not wrong, None
    if uncut:
        try:
            difference, differs = apart_from_uncut(case, spec)
            wrong += differs
        except Unfinished as error:
            wrong.append(str(error))
    rows = len((output / "evaluation" / "after.jsonl").read_text().splitlines())
    return wrong, figures(attempts, result, rows, difference, published=published)


def apart_from_uncut(case: Case, spec: dict[str, Any]) -> tuple[float, list[str]]:
    """Largest difference of a loss, and what else differs. Raises Unfinished when the uncut run does not end."""
    other = attempt(case, "uncut", uncut_spec(spec, case.folder / "uncut"))
    if other.code:
        raise Unfinished(f"uncut: ended with {other.code}")
    return apart(*(read_lines(case.folder / name / "logs" / "metrics.jsonl") for name in ("output", "uncut")))


def prepared(given: argparse.Namespace, folder: Path, on_gpu: bool) -> tuple[Path, Path]:
    """Base model and data; what an earlier run left in the folder is deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in ("output", "uncut", *(each.name for each in folder.glob("scratch-*"))):
        place = (folder / old).resolve()  # `output` may be a link to another disk
        shutil.rmtree(place, ignore_errors=True)
        if (folder / old).is_symlink():
            place.mkdir()
    base = given.model or folder / "model"
    if given.model is None:
        shutil.rmtree(base, ignore_errors=True)
        command = [sys.executable, str(ROOT / "benchmarks" / "models.py"), given.family, str(base)]
        command += ["--size", given.size, "--dtype", "bfloat16" if on_gpu else "float32"]
        started(command, dict(os.environ), folder / "model.log")
    return base, make_data(folder / "data", given.rows)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--card", type=float, help="gigabytes of the GPU that the job may take")
    parser.add_argument("--precision", choices=("4bit", "16bit"), help="default: the job chooses")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a base model made before")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--no-uncut", action="store_true", help="leave out the uncut run")
    parser.add_argument("--single", action="store_true", help="one start, neither stopped nor killed")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which all is killed")
    return parser.parse_args()


def main() -> None:
    began, given = time.monotonic(), parsed()
    gpu = subprocess.run([sys.executable, "-c", DEVICE], check=True, capture_output=True, text=True).stdout.strip()
    if gpu and given.card is None:
        sys.exit("--card says how many gigabytes of the GPU the job may take")
    from job.planning.optional_packages import uncompiled

    if gpu and (slow := uncompiled()):
        sys.exit(f"starts would be timed with Python's own compiling: {slow}")
    folder = (given.folder or Path(tempfile.mkdtemp(prefix="whole-job-"))).resolve()
    card = f"{given.card:g} GB" if gpu else "CPU"
    label = " ".join(part for part in (given.family, given.precision, card, given.single and "one start") if part)
    base, data = prepared(given, folder, bool(gpu))
    case = Case(label, folder, given.card if gpu else None, began + given.limit)
    spec = spec_of(base.resolve(), data, folder / "output", given.precision, given.epochs)
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    wrong, found = prove(case, spec, base, single=given.single, uncut=not (given.no_uncut or given.single))
    for figure in found:
        figure = replace(figure, case=f"{label}: {figure.case}")
        if gpu and given.size == "full":
            append("whole job", **vars(figure), device=f"{gpu}, {card} of it")
        else:
            print(figure)
    for each in wrong:
        print(f"WRONG: {each}")
    print(f"{label}: {'not as it should be' if wrong else 'published'}; logs and output are in {folder}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
