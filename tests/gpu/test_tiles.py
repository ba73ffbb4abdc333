"""Attention over Llama 3.2's tiles by the kernels that a GPU really takes, against float64: `make test-gpu`."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
import torch

if not torch.cuda.is_available():
    pytest.skip("there is no NVIDIA GPU here", allow_module_level=True)

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.mllama.modeling_mllama import _prepare_aspect_ratio_attention_mask

from job.model.patches import mllama_attention

BACKENDS = {
    "chosen": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def right(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    out = torch.empty(query.shape, dtype=torch.float64, device=query.device)
    for row in range(len(query)):
        for head in range(query.shape[1]):
            scores = query[row, head].double() @ key[row, head].double().T * query.shape[-1] ** -0.5
            out[row, head] = (scores + mask[row, 0].double()).softmax(dim=-1) @ value[row, head].double()
    return out


@pytest.mark.parametrize(
    ("patches", "heads", "width"), [(1601, 16, 80), (26, 4, 16), (17, 4, 12)], ids=["real shape", "small", "odd width"]
)
def test_attention_without_a_mask_is_as_near_to_the_truth_as_with_it(patches: int, heads: int, width: int) -> None:
    """Pictures in one tile of four, in two and in all; bf16, with gradients."""
    torch.manual_seed(0)
    seen = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]], device="cuda")
    length = -(-patches // 8) * 8
    mask = _prepare_aspect_ratio_attention_mask(seen, patches, length, torch.bfloat16)
    shape = (3, heads, 4 * length, width)
    given = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    query, key, value = given
    weights = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        truth = right(query, key, value, mask)

    def apart(one: torch.Tensor) -> float:
        return float((one.double() - truth).norm() / truth.norm())

    def ours() -> torch.Tensor:
        arranged = mllama_attention.arrangement(mask)
        q, k, v = (
            arranged.arrange(each.transpose(1, 2).flatten(2)).unflatten(2, (heads, width)).transpose(1, 2)
            for each in given
        )
        said, _ = mllama_attention.attention(None, q, k, v, arranged, scaling=width**-0.5)
        return arranged.put_back(said.flatten(2)).unflatten(2, (heads, width)).transpose(1, 2)

    def theirs() -> torch.Tensor:
        return scaled_dot_product_attention(*given, attn_mask=mask.expand(-1, heads, -1, -1), scale=width**-0.5)

    found, gradients = {}, {}
    for who, compute in (("ours", ours), ("theirs", theirs)):
        for name, backend in BACKENDS.items():
            try:
                with sdpa_kernel(list(SDPBackend.__members__.values()) if backend is None else backend):
                    out = compute()
                    grads = torch.autograd.grad((out * weights).float().sum(), given)
            except RuntimeError:  # this backend takes no mask, or no such shape
                continue
            found[who, name] = apart(out.detach())
            gradients[who, name] = torch.cat([each.flatten().float() for each in grads])
    math = gradients["theirs", "math"]
    for who, each in gradients.items():
        print(*who, f"{found[who]:.5f}, gradients from those by math {float((each - math).norm() / math.norm()):.5f}")
    assert found["ours", "chosen"] < 0.01
    assert float((gradients["ours", "chosen"] - math).norm() / math.norm()) < 0.02
