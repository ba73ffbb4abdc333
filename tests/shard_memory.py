"""The host memory that ranks take while each loads its share of a base: `python -m tests.shard_memory`.

For 1, 2 and 4 processes on the CPU and a base of 636 MB in several files, prints what a process holds and the peak of its
anonymous memory (RssAnon) while it loads, both in MB. One process loads it whole, mapped from its files.
"""

from __future__ import annotations

import os
import tempfile
import threading
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  # imported before memory is first read, as what follows
import torch
from torch import distributed
from torch.distributed import TCPStore, fsdp, tensor  # type: ignore[attr-defined]  # noqa: F401
from transformers import AutoConfig, AutoModelForImageTextToText

from job.model.transformers_backend import load_share, load_weights
from tests.distributed.test_ranks import free_port
from tests.tiny import CPU, job_spec, make_model


def make_base(folder: Path) -> Path:
    """A Qwen3-VL whose text layers are wider, so that they are nearly all of it."""
    config = AutoConfig.from_pretrained(make_model("qwen3_vl", folder))
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10, "num_attention_heads": 8}
    for name, value in (wide | {"num_key_value_heads": 4, "head_dim": 128}).items():
        setattr(config.text_config, name, value)
    config.text_config.rope_parameters["mrope_section"] = [24, 20, 20]
    config.vision_config.out_hidden_size = 1024
    (folder / "model.safetensors").unlink()
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder, max_shard_size="300MB")
    return folder


def anonymous() -> float:
    """This process's anonymous memory in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3


def load(rank: int, world: int, folder: Path, port: int, found: Any) -> None:
    torch.set_num_threads(1)
    if world > 1:
        store = TCPStore("127.0.0.1", port, world, is_master=rank == 0, timeout=timedelta(seconds=60))
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    before, peaks, over = anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            peaks.append(anonymous())

    watching = threading.Thread(target=watch)
    watching.start()
    model = (load_share if world > 1 else load_weights)(job_spec().model, folder, CPU, "32bit")
    over.set()
    watching.join()
    shares = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in model.parameters()]
    found.put((rank, sum(share.nbytes for share in shares) / 1e6, max(peaks) - before))
    if world > 1:
        distributed.barrier()


def main() -> None:
    context = get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = make_base(Path(name))
        for world in (1, 2, 4):
            found, port = context.Queue(), free_port()
            ranks = [context.Process(target=load, args=(rank, world, folder, port, found)) for rank in range(world)]
            for process in ranks:
                process.start()
            for rank, held, peak in sorted(found.get(timeout=120) for _ in ranks):
                print(f"{world} processes, rank {rank}: holds {held:.0f} MB, peak {peak:.0f} MB", flush=True)
            for process in ranks:
                process.join()


if __name__ == "__main__":
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    main()
