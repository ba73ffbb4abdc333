"""How long a save holds up the training thread, and whether that grows when the store is slow.

    python benchmarks/checkpoint_stall.py

A loop trains a model of 67 M parameters with AdamW on the CPU (0.8 GB of state). Every few steps it saves as the trainer
does, files into a folder on scratch, and hands the folder to the uploader. The store is moto's server, or that of
AWS_ENDPOINT_URL_S3, behind a wire of 1 Gbit/s where each answer takes 0.2 s, then behind one of a quarter of it with
0.8 s. Measured is what the thread that steps spends in the save; the wait for the last upload is not part of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

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


def train(scratch: Path, uploader: Uploader, saves: int, pause: float) -> list[float]:
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
        began = time.perf_counter()
        folder = scratch / f"snapshot-{number}"
        folder.mkdir()
        save_file(layers.state_dict(), folder / "model.safetensors")
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        uploader.submit(folder, step, epoch=0.0)
        held.append(time.perf_counter() - began)
        print(f"step {step}: the save held the thread for {held[-1]:.2f} s", flush=True)
    return held


def main(saves: int, pause: float, scratch: Path | None) -> None:
    torch.set_num_threads(1)
    medians = []
    with moto() as server, pytest.MonkeyPatch.context() as patch:
        for name, (rate, delay) in WIRES.items():
            point_at(server, patch)
            bucket = make_bucket()
            with (
                tempfile.TemporaryDirectory(dir=scratch) as work,
                Proxy(address(server), rate=rate, delay=delay) as wire,
            ):
                patch.setenv("AWS_ENDPOINT_URL_S3", wire.url)
                store = open_store(f"s3://{bucket}/out")
                with Uploader(store, spec_digest="bench", attempt=0, lease=None, keep=1) as uploader:
                    held = train(Path(work), uploader, saves, pause)
                    began = time.perf_counter()
                    assert uploader.wait(900)
                    print(f"the last upload took {time.perf_counter() - began:.0f} s more; committed {steps(store)}")
            medians.append(statistics.median(held))
            goal = "under 0.5"
            append("checkpoint_stall", f"{name}, median", medians[-1], "s", goal=goal, meets=medians[-1] < 0.5)
            append("checkpoint_stall", f"{name}, worst of {saves}", max(held), "s", goal=goal, meets=max(held) < 0.5)
    growth = medians[1] / medians[0]
    append("checkpoint_stall", "slow store over fast store", growth, "×", goal="at most 1.25", meets=growth <= 1.25)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--saves", type=int, default=6)
    arguments.add_argument("--pause", type=float, default=4.0, help="seconds of training between saves")
    arguments.add_argument("--scratch", type=Path, help="where snapshots are written; default: the temporary folder")
    given = arguments.parse_args()
    main(given.saves, given.pause, given.scratch)
