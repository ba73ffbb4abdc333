"""The disk of the node."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from job.errors import Unavailable
from job.scratch import CACHES, COMPILING, full_disk_told, prepare_scratch


def test_a_disk_that_is_full_is_no_bug(tmp_path: Path):
    with pytest.raises(Unavailable, match=f"The disk that holds {tmp_path} is full"), full_disk_told(tmp_path):
        Path("/dev/full").write_bytes(b"x")
    with pytest.raises(FileNotFoundError), full_disk_told(tmp_path):
        (tmp_path / "none").read_bytes()


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


def test_a_restart_on_the_same_node_takes_unsloths_own_functions_from_torchs_cache(tmp_path: Path):
    assert compiling(tmp_path) == [4, {"miss": 1, "saved": 1}]
    assert compiling(tmp_path) == [4, {"hit": 1}]
