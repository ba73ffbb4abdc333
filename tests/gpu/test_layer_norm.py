"""On a GPU, where autocast casts layer norms to 32 bits, ours give the same without; RMS norms by one kernel, too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

from job.model.patches.layer_norm import without_casts
from job.model.patches.rms_norm import fuse_rms_norms

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


@pytest.mark.parametrize(
    ("kind", "patch", "cast", "apart"),
    [
        (torch.nn.LayerNorm, without_casts, torch.float32, 2**-4),
        (Qwen3VLTextRMSNorm, fuse_rms_norms, torch.bfloat16, 2**-2),
        (Gemma3RMSNorm, fuse_rms_norms, torch.bfloat16, 2**-2),
    ],
)
def test_output_and_gradient_are_those_of_autocast_in_16_bits(
    kind: type[Any], patch: Callable[[Any], None], cast: torch.dtype, apart: float
) -> None:
    torch.manual_seed(0)
    before = kind(1280).to("cuda", torch.bfloat16)
    for weight in before.parameters():
        torch.nn.init.normal_(weight)
    changed = copy.deepcopy(before)
    patch(changed)
    assert "forward" in vars(changed)
    states = torch.randn(2, 6432, 1280, device="cuda", dtype=torch.bfloat16)
    found = []
    for norm in (before, changed):
        given = states.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            out = norm(given)
        found.append((out.dtype, out.to(torch.bfloat16), torch.autograd.grad(out.float().square().sum(), given)[0]))
    (theirs, expected, gradient), (ours, seen, own) = found
    assert (theirs, ours) == (cast, torch.bfloat16), "autocast casts otherwise: the patch may go"
    torch.testing.assert_close(seen, expected, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(own, gradient, rtol=2**-6, atol=apart)
