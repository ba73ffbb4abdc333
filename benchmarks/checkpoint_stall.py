"""How long a save holds up the training thread, and whether that grows when the store is slow.

    python benchmarks/checkpoint_stall.py

A loop trains a model of 67 M parameters with AdamW on the CPU (0.8 GB of state). Every few steps it saves: as the trainer
does, files into a folder on scratch that is handed to the uploader; or as a copy in memory which the uploader's thread
writes to the folder. The store is moto's server, or that of
AWS_ENDPOINT_URL_S3, behind a wire of 1 Gbit/s where each answer takes 0.2 s, then behind one of a quarter of it with
0.8 s. Measured is what the thread that steps spends in the save; the wait for the last upload is not part of it.
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
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import append
from job.checkpoint import Uploader, steps
from job.store import open_store
from tests.s3 import address, make_bucket, moto, point_at
from tests.store.proxy import Proxy

WIRES = {"1 Gbit/s, answers after 0.2 s": (125e6, 0.2), "0.25 Gbit/s, answers after 0.8 s": (31e6, 0.8)}


def clone(state: Any) -> Any:
    """A copy of nested dictionaries and lists with every tensor copied."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: clone(value) for key, value in state.items()}
    return [clone(value) for value in state] if isinstance(state, list) else state


def write(state: tuple[Any, Any], folder: Path) -> None:
    """The two large files of a trainer's checkpoint."""
    save_file(state[0], folder / "model.safetensors")
    torch.save(state[1], folder / "optimizer.pt")


def train(scratch: Path, uploader: Uploader, saves: int, pause: float, copy: bool) -> list[float]:
    """Step and save. Returns the seconds that each save took from the thread."""
    layers = torch.nn.ModuleList([torch.nn.Linear(4096, 4096, bias=False) for _ in range(4)])
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-4)
    held: list[float] = []
    step = 0
    for number in range(saves):
        until = time.perf_counter() + pause
        while time.perf_counter() < until:
            step += 1
            hidden = torch.ones(1, 4096)
            for layer in layers:
                hidden = torch.tanh(layer(hidden))
            hidden.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        folder = scratch / f"snapshot-{number}"
        began = time.perf_counter()
        if copy:
            state = (clone(layers.state_dict()), clone(optimizer.state_dict()))
            uploader.submit(folder, step, epoch=0.0, write=partial(write, state))
        else:
            folder.mkdir()
            write((layers.state_dict(), optimizer.state_dict()), folder)
            uploader.submit(folder, step, epoch=0.0)
        held.append(time.perf_counter() - began)
        print(f"step {step}: the save held the thread for {held[-1]:.2f} s", flush=True)
    return held


@contextlib.contextmanager
def slow_wire(server: str, rate: float, delay: float) -> Iterator[str]:
    """The proxy, in a process of its own: in this one it would take the interpreter's lock from the training thread."""
    here = Path(__file__).resolve()
    process = subprocess.Popen(
        [sys.executable, str(here), "--wire", server, str(rate), str(delay)], stdout=subprocess.PIPE, text=True
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
    with moto() as server, pytest.MonkeyPatch.context() as patch:
        for (name, (rate, delay)), copy in itertools.product(WIRES.items(), medians):
            point_at(server, patch)
            bucket = make_bucket()
            with tempfile.TemporaryDirectory(dir=scratch) as work, slow_wire(server, rate, delay) as wire:
                patch.setenv("AWS_ENDPOINT_URL_S3", wire)
                store = open_store(f"s3://{bucket}/out")
                with Uploader(store, spec_digest="bench", attempt=0, lease=None, keep=1) as uploader:
                    held = train(Path(work), uploader, saves, pause, copy)
                    began = time.perf_counter()
                    assert uploader.wait(900)
                    print(f"the last upload took {time.perf_counter() - began:.0f} s more; committed {steps(store)}")
            medians[copy].append(statistics.median(held))
            case = f"{name}, {'copied in memory' if copy else 'written to scratch'}"
            for which, value in (("median", medians[copy][-1]), (f"worst of {saves}", max(held))):
                append("checkpoint_stall", f"{case}, {which}", value, "s", goal="under 0.5", meets=value < 0.5)
    for copy, (fast, slow) in medians.items():
        case = f"slow store over fast store, {'copied in memory' if copy else 'written to scratch'}"
        append("checkpoint_stall", case, slow / fast, "×", goal="at most 1.25", meets=slow / fast <= 1.25)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--wire"]:
        with Proxy(address(sys.argv[2]), rate=float(sys.argv[3]), delay=float(sys.argv[4])) as proxy:
            print(proxy.url, flush=True)
            threading.Event().wait()
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--saves", type=int, default=6)
    arguments.add_argument("--pause", type=float, default=4.0, help="seconds of training between saves")
    arguments.add_argument("--scratch", type=Path, help="where snapshots are written; default: the temporary folder")
    given = arguments.parse_args()
    main(given.saves, given.pause, given.scratch)
