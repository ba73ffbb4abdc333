"""On a GPU, where autocast casts layer norms to 32 bits, ours gives the same without."""

from __future__ import annotations

import copy

import pytest
import torch

from job.model.patches.layer_norm import without_casts

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


def test_output_and_gradient_are_those_of_autocast_in_16_bits() -> None:
    torch.manual_seed(0)
    before = torch.nn.LayerNorm(1280, dtype=torch.bfloat16, device="cuda")
    for weight in before.parameters():
        torch.nn.init.normal_(weight)
    changed = copy.deepcopy(before)
    without_casts(changed)
    states = torch.randn(2, 6432, 1280, device="cuda", dtype=torch.bfloat16)
    found = []
    for norm in (before, changed):
        given = states.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            out = norm(given)
        found.append((out.dtype, out.to(torch.bfloat16), torch.autograd.grad(out.float().square().sum(), given)[0]))
    (theirs, expected, gradient), (ours, seen, own) = found
    assert (theirs, ours) == (torch.float32, torch.bfloat16), "autocast leaves layer norms alone: the patch may go"
    torch.testing.assert_close(seen, expected, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(own, gradient, rtol=2**-6, atol=2**-4)
