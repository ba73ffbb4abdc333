"""Kill whole jobs at random moments and compare what they did with a job that nobody disturbed.

    python -m tests.resume_proof N [SEED]

Each run is a complete small job on an S3 server: stopped by SIGTERM or SIGKILL, or cut off from the store for a moment, at
a random time, up to three times, then run to its end. Every other one measures held-out loss while it trains; for every
third one, listings of the store are seconds late. Losses, learning rates and the rows of every step must equal those of the
undisturbed job, and so must the adapter and every answer, to the last bit. Closes with `runs=N identical=N`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
WAYS = ("SIGTERM", "SIGKILL", "cut off")
MOST_STOPS = 3
PATIENCE = 12  # attempts
STUCK = 300
"""Seconds after which a job tells where each of its threads is, and counts as one that never ended."""
LAG = 3.0
"""Seconds by which a listing is late: longer than the job takes from one checkpoint to the next."""


def trajectory(metrics: bytes) -> list[tuple[Any, ...]]:
    """Step, loss, learning rate, gradient norm and rows of every step's line of `logs/metrics.jsonl`."""
    lines = [line for line in map(json.loads, metrics.decode().splitlines()) if "loss" in line]
    assert all(line["rows"] for line in lines)
    return [(line["step"], line["loss"], line["learning_rate"], line["grad_norm"], line["rows"]) for line in lines]


def small_spec(demo: Path, url: str, *, merged: bool = False, eval_steps: int | None = None) -> str:
    """24 steps over three epochs that end inside a step's accumulation, with dropout: about ten seconds."""
    return yaml.safe_dump(
        {
            "model": {"name_or_path": str(demo / "base")},
            "lora": {"r": 4, "lora_dropout": 0.1},
            "dataset": {"path": str(demo / "data"), "group_column": "patient_id", "max_rows": 70},
            "training": {"num_train_epochs": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 2},
            "checkpoint": {"save_steps": 5},
            "preemption": {"max_attempts_without_progress": PATIENCE},
            "evaluation": {
                "max_rows": 8,
                "max_new_tokens": 8,
                "batch_size": 4,
                "explained_rows": 0,
                "eval_steps": eval_steps,
            },
            "export": {"merged": merged, "gate": {"rows": 40}},
            "output": {"url": url},
        }
    )


def outcome(url: str) -> dict[str, Any]:
    """What a job did, from its output."""
    from job.store import open_store

    store = open_store(url)
    keys = ("adapter/adapter_model.safetensors", "evaluation/before.jsonl", "evaluation/after.jsonl")
    digests = {key: hashlib.sha256(store.read(key)).hexdigest() for key in keys}
    return {"trajectory": trajectory(store.read("logs/metrics.jsonl")), **digests}


def real_process(environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "job", "run"]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)


class Stage:
    """One small job on a store: `attempt` starts it, `undisturbed` knows what it should have done."""

    def __init__(self, demo: Path, bucket: str, endpoint: str, scratch: Path, start: Callable[..., Any]) -> None:
        self.demo, self.bucket, self.endpoint, self.scratch, self.start = demo, bucket, endpoint, scratch, start
        began = time.monotonic()
        code, tail = self.attempt("undisturbed", None, random.Random(0))
        assert code == 0, tail
        self.seconds = time.monotonic() - began
        self.expected = outcome(f"s3://{bucket}/undisturbed")

    def attempt(self, name: str, way: str | None, chance: random.Random) -> tuple[int, str]:
        """Run once; stopped in this way at a random moment, or to its end. Returns exit code and last lines."""
        from job.store import open_store
        from tests.s3 import address
        from tests.store.lagging import Lagging
        from tests.store.proxy import Message, Proxy

        url = f"s3://{self.bucket}/{name}"
        moment = chance.uniform(0.1, 1.1) * getattr(self, "seconds", 0)
        began, cut = time.monotonic(), chance.uniform(0.2, 2.0) if way == "cut off" else 0.0

        listings = Lagging(open_store(f"s3://{self.bucket}"), LAG, f"{name}/") if name[-1] in "258" else None

        def between(request: Message) -> bytes | None:
            """Every connection to the store breaks for `cut` seconds, whatever it is in the middle of."""
            if moment < time.monotonic() - began < moment + cut:
                raise ConnectionResetError
            return listings.before(request) if listings else None

        with Proxy(address(self.endpoint), before=between) as proxy:
            environment = {
                **os.environ,
                "JOB_SPEC": small_spec(self.demo, url, eval_steps=self.eval_steps(name)),
                "JOB_SCRATCH": str(self.scratch / name),
                "JOB_LEASE_SECONDS": "4",
                "PYTHONFAULTHANDLER": "1",
                "AWS_ENDPOINT_URL_S3": proxy.url,
            }
            process = self.start(environment)
            if way in ("SIGTERM", "SIGKILL"):
                try:
                    process.wait(moment)
                except subprocess.TimeoutExpired:
                    process.send_signal(getattr(signal, way))
            try:
                _, stderr = process.communicate(timeout=STUCK)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGABRT)
                _, stderr = process.communicate()
                return process.returncode, f"stuck for {STUCK} s at\n{stderr[-20_000:]}"
        return process.returncode, "\n".join(stderr.splitlines()[-5:])

    def eval_steps(self, name: str) -> int | None:
        """Every other disturbed job measures held-out loss on its way, which must change nothing."""
        return 7 if name[-1] in "13579" else None

    def one(self, name: str, chance: random.Random) -> list[str]:
        """A job stopped up to three times; the differences from the undisturbed one, none when it is identical."""
        ways: list[str | None] = [chance.choice(WAYS) for _ in range(chance.randint(1, MOST_STOPS))]
        said = []
        for way in ways + [None] * PATIENCE:
            code, tail = self.attempt(name, way, chance)
            said.append(f"{way}:{code}")
            if code == 0:
                break
            if code not in (75, 69, -signal.SIGKILL):
                return [f"{name} ended with {code} after {' '.join(said)}: {tail}"]
        else:
            return [f"{name} never ended: {' '.join(said)}: {tail}"]
        found = outcome(f"s3://{self.bucket}/{name}")
        print(f"{name}: {' '.join(said)}", flush=True)
        return [f"{name}: {key} differs after {' '.join(said)}" for key in found if found[key] != self.expected[key]]


def prove(
    runs: int, demo: Path, bucket: str, endpoint: str, seed: int = 0, start: Callable[..., Any] = real_process
) -> int:
    """How many of `runs` disturbed jobs, which `start` starts, were identical; the others are printed."""
    with tempfile.TemporaryDirectory() as scratch:
        stage = Stage(demo, bucket, endpoint, Path(scratch), start)
        identical = 0
        for number in range(runs):
            differences = stage.one(f"run-{number}", random.Random(f"{seed} {number}"))
            identical += not differences
            for difference in differences:
                print(difference, flush=True)
    print(f"runs={runs} identical={identical}")
    return identical


def main() -> None:
    from tests.s3 import CREDENTIALS, make_bucket, moto

    runs, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**6)
    print(f"seed {seed}")
    demo = ROOT / "build" / "tests" / "demo"
    subprocess.run([sys.executable, "examples/make_demo.py", str(demo), "--small"], cwd=ROOT, check=True)
    with moto() as endpoint:
        os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL_S3=endpoint, AWS_EC2_METADATA_DISABLED="true")
        sys.exit(prove(runs, demo, make_bucket(), endpoint, seed) != runs)


if __name__ == "__main__":
    main()
