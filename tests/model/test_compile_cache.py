"""Compiled files travel through the output to a new node, and nothing that goes wrong with them stops a run."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from job.model.compile_cache import CompileCache
from job.scratch import CACHES, COMPILING, prepare_scratch
from job.store import open_store


def compiled(folder: Path) -> Path:
    for name in ("inductor/ab/code.py", "triton/kernel/x.cubin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "inductor" / "being-written.tmp").write_text("half")
    (folder / "datasets").mkdir()
    (folder / "datasets" / "rows.arrow").write_text("not code")
    return folder


# Products of matrices only: torch compiles no C++ for them.
COMPILES = """
import json, torch
from torch._dynamo.utils import counters

class Layer(torch.autograd.Function):  # as Unsloth's for weights in 4 bits
    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x @ weight

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.weight.T, None

def applied(function, *inputs):
    return function.apply(*inputs)

@torch.compile
def layers(x, weight):
    return applied(Layer, x @ weight, weight)

x = torch.ones(4, 4, requires_grad=True)
layers(x, torch.full((4, 4), 0.5)).backward(torch.ones(4, 4))
found = {name.removeprefix("autograd_cache_"): count for name, count in counters["aot_autograd"].items() if "cache" in name}
print(json.dumps([x.grad[0, 0].item(), found]))
"""


def compiling(folder: Path) -> list[object]:
    """The gradient, and what torch found in its cache, in a process with scratch in `folder`."""
    environment = {name: value for name, value in os.environ.items() if name not in CACHES | COMPILING}
    environment["JOB_SCRATCH"] = str(folder)
    prepare_scratch(environment)
    ended = subprocess.run(
        [sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True, check=True
    )
    found: list[object] = json.loads(ended.stdout.splitlines()[-1])
    return found


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_new_node_finds_what_the_last_one_compiled(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    CompileCache(store, compiled(tmp_path / "old"), "card").keep()  # nothing is new since it began
    assert not list(store.list("cache/"))
    cache = CompileCache(store, tmp_path / "fresh", "card")
    compiled(tmp_path / "fresh")
    cache.keep()
    CompileCache(store, tmp_path / "new", "card").restore()
    assert files(tmp_path / "new") == {"inductor/ab/code.py", "triton/kernel/x.cubin"}
    CompileCache(store, tmp_path / "other card", "another card").restore()
    assert files(tmp_path / "other card") == set()


def test_a_new_node_takes_unsloths_own_functions_from_the_cache(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    cache = CompileCache(store, tmp_path / "old" / "cache", "card")
    assert compiling(tmp_path / "old") == [4, {"miss": 1, "saved": 1}]
    cache.keep()
    CompileCache(store, tmp_path / "new" / "cache", "card").restore()
    assert compiling(tmp_path / "new") == [4, {"hit": 1}]


def test_a_broken_archive_or_one_that_reaches_outside_is_told_and_left(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    cache = CompileCache(store, tmp_path / "node" / "cache", "card")
    store.write(cache.key, b"not a tar")
    cache.restore()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        entry = tarfile.TarInfo("../../escaped")
        entry.size = 1
        tar.addfile(entry, io.BytesIO(b"x"))
    store.write(cache.key, stream.getvalue())
    cache.restore()
    assert files(tmp_path / "node") == set()
    assert not (tmp_path / "escaped").exists()
