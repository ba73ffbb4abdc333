"""RMS norms by torch's kernel give what transformers' own give, within one rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from job.model.patches.rms_norm import fuse_rms_norms

MODELS = (
    *("mllama", "llama", "mistral", "qwen2", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    *("gemma", "gemma3", "gemma3n", "gemma4", "glm4v", "idefics3", "internvl", "llama4", "mistral3", "pixtral"),
)
"""All that hold norms, of the families in tests/families.py and tests/other_families.py."""
ROUNDING = 2**-7  # of bfloat16: the distance of neighbours


def made(address: str, *, weight: torch.dtype = torch.bfloat16, **more: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    norm = resolve_name(f"transformers.models.{address}")(64, eps=1e-5, **more)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    return norm.to(weight)


def changed(norm: Any) -> Any:
    """Return a copy of `norm` after the patch, or None if it was left alone."""
    norm = copy.deepcopy(norm)
    fuse_rms_norms(torch.nn.ModuleList([norm]))
    return norm if "forward" in vars(norm) else None


def seen(norm: Callable[..., Any], dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient, of states as small as eps and of large ones."""
    torch.manual_seed(1)
    states = torch.randn(3, 5, 64) * torch.tensor([3e-3, 1.0, 30.0]).view(3, 1, 1)
    states = states.to(torch.bfloat16).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(states)
    received = torch.linspace(-1, 1, out.numel(), dtype=torch.bfloat16).view(out.shape)
    out.backward(received.to(out.dtype))
    assert states.grad is not None
    return out.detach(), states.grad


def classes(model: str) -> Iterator[str]:
    module = f"{model}.modeling_{model}"
    names = vars(resolve_name(f"transformers.models.{module}"))
    return (f"{module}:{name}" for name in names if name.endswith("RMSNorm"))


@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32], ids=["16 bits", "32 bits"])
@pytest.mark.parametrize("model", MODELS)
def test_output_and_gradient_are_within_a_rounding_of_upstreams(model: str, weight: torch.dtype) -> None:
    found = [made(address, weight=weight) for address in classes(model)]
    assert found, f"transformers' {model} has no RMS norm"
    for before in found:
        theirs, truth = seen(before), seen(copy.deepcopy(before).float(), torch.float32)
        after = changed(before)
        if theirs[0].dtype == torch.float32:
            assert after is None, "states and weight of two types gave the wider one"
            continue
        for own, upstreams, exact in zip(seen(after), theirs, truth, strict=True):
            assert own.dtype == upstreams.dtype == torch.bfloat16
            torch.testing.assert_close(own.float(), exact, rtol=ROUNDING / 2, atol=1e-6)
            assert (own - exact).norm() <= (upstreams - exact).norm() * 1.01
        torch.testing.assert_close(seen(after)[0], theirs[0], rtol=1.5 * ROUNDING, atol=1e-6)


@pytest.mark.parametrize("address", ["llama.modeling_llama:LlamaRMSNorm", "gemma3.modeling_gemma3:Gemma3RMSNorm"])
def test_compiled_and_recomputed_it_gives_the_same(address: str) -> None:
    norm = changed(made(address))
    torch._dynamo.reset()
    ways = [
        torch.compile(norm, backend="aot_eager", fullgraph=True),
        lambda states: checkpoint(norm, states, use_reentrant=False),
        lambda states: checkpoint(norm, states, use_reentrant=True),
    ]
    with torch.compiler.set_stance("default"):
        for way in ways:
            torch.testing.assert_close(seen(way), seen(norm), rtol=ROUNDING, atol=1e-6)


@pytest.mark.parametrize("address", ["llama.modeling_llama:LlamaRMSNorm", "gemma3.modeling_gemma3:Gemma3RMSNorm"])
def test_states_in_32_bits_keep_them(address: str) -> None:
    before = made(address)
    torch.testing.assert_close(seen(changed(before), torch.float32), seen(before, torch.float32))


def test_what_computes_something_else_is_left_alone() -> None:
    class CentredRMSNorm(torch.nn.RMSNorm):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return super().forward(states - states.mean(-1, keepdim=True))

    class OutsideRMSNorm(torch.nn.RMSNorm):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return states / (states.square().mean(-1, keepdim=True).sqrt() + 1e-5) * self.weight

    class ClampedRMSNorm(torch.nn.RMSNorm):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return super().forward(states.clamp(-10, 10))

    class GatedRMSNorm(type(made("qwen3_5.modeling_qwen3_5:Qwen3_5RMSNormGated"))):  # type: ignore[misc]
        """As it is, but for its name."""

    assert changed(made("gemma4.modeling_gemma4:Gemma4RMSNorm", with_scale=False)) is None
    assert changed(made("qwen3_5.modeling_qwen3_5:Qwen3_5RMSNormGated")) is None
    for kind in (CentredRMSNorm, ClampedRMSNorm, OutsideRMSNorm, GatedRMSNorm):
        assert changed(kind(64, eps=1e-5).bfloat16()) is None, kind
    assert changed(torch.nn.RMSNorm(64).bfloat16()) is not None


def test_autocast_casts_nothing_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU autocast lists RMS norms; on a CPU it does not, so what it is asked is looked at instead."""
    asked = list[bool]()
    plain = torch.nn.functional.rms_norm

    def look(*arguments: Any) -> torch.Tensor:
        asked.append(torch.is_autocast_enabled("cpu"))
        return plain(*arguments)

    norm = changed(made("llama.modeling_llama:LlamaRMSNorm"))
    monkeypatch.setattr("job.model.patches.rms_norm.rms_norm", look)
    seen(norm)
    assert asked == [False]
