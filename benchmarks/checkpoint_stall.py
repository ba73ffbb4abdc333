"""How long a save holds up the training thread, and whether that grows when the store is slow.

    python benchmarks/checkpoint_stall.py

A loop trains a model of 67 M parameters with AdamW on one core (0.8 GB of state). Every few steps it saves: as this job
does, a copy in host memory that another thread writes to scratch; and as transformers does, straight to scratch. Either
way the uploader's thread then sends the files. The store is moto's server behind a wire of 1 Gbit/s where each answer
takes 0.2 s, then behind one of a quarter of it with 0.8 s. Store and wire run at nice 15, since a real store is another
machine; hashing and sending share the two cores with training. Measured is what the thread that steps spends in a save,
and, beside it, by how much the steps behind a save are slower than before the first.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import append

from job.checkpoint import Uploader, steps
from job.store import open_store
from job.train.snapshot import Snapshot
from tests.s3 import address, make_bucket, moto, point_at
from tests.store.proxy import Proxy

WIRES = {"1 Gbit/s, answers after 0.2 s": (125e6, 0.2), "0.25 Gbit/s, answers after 0.8 s": (31e6, 0.8)}
ASIDE = ("nice", "-n", "15")


class Held(NamedTuple):
    """Seconds that each save took from the thread, and that steps were slower on top, by save."""

    saves: list[float]
    slower: float


class Training:
    """The loop, and what it knows of its steps."""

    def __init__(self) -> None:
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4096, 4096, bias=False) for _ in range(4)])
        self.optimizer = torch.optim.AdamW(self.layers.parameters(), lr=1e-4)
        self.steps: list[float] = []

    def train(self, seconds: float) -> None:
        until = time.perf_counter() + seconds
        while (began := time.perf_counter()) < until:
            hidden = torch.ones(1, 4096)
            for layer in self.layers:
                hidden = torch.tanh(layer(hidden))
            torch.autograd.backward(hidden.sum())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps.append(time.perf_counter() - began)

    def states(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"adapter_model.safetensors": self.layers.state_dict(), "optimizer.pt": self.optimizer.state_dict()}


def run(scratch: Path, uploader: Uploader, saves: int, pause: float, ours: bool) -> Held:
    """Step and save."""
    (scratch / "unchanging").mkdir()
    training, snapshot = Training(), Snapshot(scratch / "unchanging")
    training.train(0.1)
    if ours:
        snapshot.prepare(training.states())
        snapshot.written.result()
    training.steps.clear()
    training.train(pause)
    quiet = statistics.median(training.steps)
    training.steps.clear()
    held: list[float] = []
    for number in range(saves):
        folder = scratch / f"snapshot-{number}"
        began = time.perf_counter()
        folder.mkdir()
        if ours:
            snapshot.take(folder, training.states())
            uploader.submit(folder, number + 1, epoch=0.0, written=snapshot.written)
        else:
            states = training.states()
            save_file(states["adapter_model.safetensors"], folder / "adapter_model.safetensors")
            torch.save(states["optimizer.pt"], folder / "optimizer.pt")
            uploader.submit(folder, number + 1, epoch=0.0)
        held.append(time.perf_counter() - began)
        print(f"the save held the thread for {held[-1]:.2f} s", flush=True)
        training.train(pause)
    return Held(held, sum(step - quiet for step in training.steps) / saves)


@contextlib.contextmanager
def slow_wire(server: str, rate: float, delay: float) -> Iterator[str]:
    """The proxy, in a process of its own: in this one it would take the interpreter's lock from the training thread."""
    here = Path(__file__).resolve()
    process = subprocess.Popen(
        [*ASIDE, sys.executable, str(here), "--wire", server, str(rate), str(delay)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def main(saves: int, pause: float, scratch: Path | None) -> None:
    torch.set_num_threads(1)
    medians: dict[bool, list[float]] = {False: [], True: []}
    with moto(*ASIDE) as server, pytest.MonkeyPatch.context() as patch:
        for (name, (rate, delay)), ours in itertools.product(WIRES.items(), medians):
            point_at(server, patch)
            bucket = make_bucket()
            with tempfile.TemporaryDirectory(dir=scratch) as work, slow_wire(server, rate, delay) as wire:
                patch.setenv("AWS_ENDPOINT_URL_S3", wire)
                store = open_store(f"s3://{bucket}/out")
                with Uploader(store, spec_digest="bench", attempt=0, lease=None, keep=1) as uploader:
                    held = run(Path(work), uploader, saves, pause, ours)
                    began = time.perf_counter()
                    assert uploader.wait(900)
                    print(f"the last upload took {time.perf_counter() - began:.0f} s more; committed {steps(store)}")
            medians[ours].append(statistics.median(held.saves))
            case = (
                f"{name}, {'copied, written by another thread' if ours else 'written to scratch as transformers does'}"
            )
            goal = "under 0.5" if ours else ""
            for which, value in (("median", medians[ours][-1]), (f"worst of {saves}", max(held.saves))):
                append(
                    "checkpoint_stall", f"{case}, {which}", value, "s", goal=goal, meets=value < 0.5 if ours else None
                )
            append("checkpoint_stall", f"{case}, steps slower while it is written and sent, a save", held.slower, "s")
    fast, slow = medians[True]
    goal = "at most 1.25"
    append("checkpoint_stall", "slow store over fast store", slow / fast, "×", goal=goal, meets=slow / fast <= 1.25)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--wire"]:
        with Proxy(address(sys.argv[2]), rate=float(sys.argv[3]), delay=float(sys.argv[4])) as proxy:
            print(proxy.url, flush=True)
            threading.Event().wait()
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--saves", type=int, default=6)
    arguments.add_argument("--pause", type=float, default=8.0, help="seconds of training between saves")
    arguments.add_argument("--scratch", type=Path, help="where snapshots are written; default: the temporary folder")
    given = arguments.parse_args()
    main(given.saves, given.pause, given.scratch)
