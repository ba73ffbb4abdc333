"""Keys and values in buffers, and heads that read them together, give the answers that transformers does. The graphs
themselves want a GPU: tests/gpu."""

from __future__ import annotations

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from job.model.collator import encode, render
from job.model.decoding import Buffer, Pictures, buffers
from job.model.loaded import Loaded
from job.model.patches.sdpa_attention import grouped_heads
from tests.tiny import batch

TOKENS = 12


def test_buffers_give_the_same_answers(loaded: Loaded) -> None:
    processor, bare = loaded.processor, loaded.model.get_base_model()
    prompts = [render(processor, each["messages"][:-1], prompt=True) for each in batch()]
    inputs = encode(processor, prompts, [each["images"] for each in batch()], side="left")
    cache = buffers(bare.config, inputs["input_ids"].shape[1] + TOKENS)
    if cache is None:  # and then it grows by itself
        assert "linear_attention" in bare.config.get_text_config().layer_types
        return
    crossing = getattr(bare.config.get_text_config(), "cross_attention_layers", [])
    assert [type(layer) is Pictures for layer in cache.layers] == [n in crossing for n in range(len(cache.layers))]
    ends = {"pad_token_id": processor.tokenizer.pad_token_id, "eos_token_id": -1, "max_new_tokens": TOKENS}
    with torch.inference_mode():
        grown = bare.generate(**inputs, **ends)
        with grouped_heads():
            buffered = bare.generate(**inputs, **ends, past_key_values=cache)
    assert torch.equal(grown, buffered)
    assert {layer.count for layer in cache.layers if isinstance(layer, Buffer)} == {grown.shape[1] - 1}


def test_heads_that_share_keys_read_them_together() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 8, 1, 16), torch.randn(3, 2, 40, 16), torch.randn(3, 2, 40, 16)
    mask = torch.rand(3, 1, 1, 40) > 0.3
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 4, True  # type: ignore[assignment]
    for given in (mask, torch.zeros(3, 1, 1, 40).masked_fill(~mask, -torch.inf)):
        expected, _ = sdpa_attention_forward(module, query, key, value, given, scaling=0.3)
        with torch.inference_mode(), grouped_heads():
            made, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, given, scaling=0.3)
        torch.testing.assert_close(made, expected)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
