"""Layer norms of 16-bit states give what they give in 32 bits, rounded, whatever autocast would do."""

from __future__ import annotations

import copy

import pytest
import torch

from job.model.patches.layer_norm import without_casts


def norm(dtype: torch.dtype, *, bias: bool = True, affine: bool = True) -> torch.nn.LayerNorm:
    torch.manual_seed(0)
    made = torch.nn.LayerNorm(64, bias=bias, elementwise_affine=affine, dtype=dtype)
    for weight in made.parameters():
        torch.nn.init.normal_(weight)
    return made


def seen(module: torch.nn.Module, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    states = states.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(states)
    (gradient,) = torch.autograd.grad((out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum(), states)
    return out.detach(), gradient


@pytest.mark.parametrize("given", [{}, {"bias": False}, {"affine": False}], ids=["all", "no bias", "no weights"])
def test_output_and_gradient_are_those_of_32_bits_rounded(given: dict[str, bool]) -> None:
    before = norm(torch.bfloat16, **given)
    changed = copy.deepcopy(before)
    without_casts(changed)
    states = (torch.randn(3, 5, 64) * 3).to(torch.bfloat16)
    out, gradient = seen(changed, states)
    truth, true_gradient = seen(before.float(), states.float())
    assert out.dtype == gradient.dtype == torch.bfloat16
    torch.testing.assert_close(out, truth.to(torch.bfloat16), rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(gradient, true_gradient.to(torch.bfloat16), rtol=2**-6, atol=1e-2)


def test_states_in_32_bits_keep_them() -> None:
    changed = norm(torch.bfloat16)
    without_casts(changed)
    states = torch.randn(3, 64)
    torch.testing.assert_close(changed(states), norm(torch.bfloat16).float()(states))


def test_autocast_casts_nothing_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU autocast lists layer norms; on a CPU it does not, so what it is asked is looked at instead."""
    asked = list[bool]()
    plain = torch.nn.functional.layer_norm

    def look(*arguments: object) -> torch.Tensor:
        asked.append(torch.is_autocast_enabled("cpu"))
        return plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("job.model.patches.layer_norm.layer_norm", look)
    changed = norm(torch.bfloat16)
    without_casts(changed)
    seen(changed, torch.randn(3, 64).to(torch.bfloat16))
    assert asked == [False]
