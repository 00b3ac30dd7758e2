"""Latent attention against transformers' DeepSeek-V3 with the same weights, and its cache."""

import pytest
import torch
import transformers as hf
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

from lightning_hybrid.models import LatentAttention, LatentConfig
from lightning_hybrid.models.attention import Cache, rotary_table

WIDTH, HEADS, LENGTH = 48, 4, 12
NAMES = {
    "q_proj": "q_proj",
    "q_down_proj": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "q_up_proj": "q_b_proj",
    "kv_down_proj": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "kv_up_proj": "kv_b_proj",
    "out_proj": "o_proj",
}
"""Ours to theirs."""


def latent(query: int | None) -> LatentConfig:
    return LatentConfig(key_value=24, query=query, rotary=8, head=12, value=20)


def theirs(config: LatentConfig) -> deepseek.DeepseekV3Attention:
    settings = hf.DeepseekV3Config(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=config.query,  # pyright: ignore[reportArgumentType]
        kv_lora_rank=config.key_value,
        qk_rope_head_dim=config.rotary,
        qk_nope_head_dim=config.head,
        v_head_dim=config.value,
        rope_interleave=False,
    )
    settings._attn_implementation = "eager"
    return deepseek.DeepseekV3Attention(settings, 0)


@pytest.mark.parametrize("query", [None, 32])
def test_equal_to_transformers(query: int | None) -> None:
    torch.manual_seed(0)
    config = latent(query)
    ours, reference = LatentAttention(WIDTH, HEADS, config), theirs(config)
    for name, module in ours.named_children():
        getattr(reference, NAMES[name]).load_state_dict(module.state_dict())
    x_BTD = torch.randn(2, LENGTH, WIDTH, requires_grad=True)
    y_BTD = x_BTD.detach().clone().requires_grad_()
    cos_TR, sin_TR = rotary_table(LENGTH, config.rotary)
    hidden = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
    mine, other = ours(x_BTD, cos_TR, sin_TR), reference(y_BTD, (cos_TR[None], sin_TR[None]), hidden)[0]
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    mine.square().sum().backward()
    other.square().sum().backward()
    torch.testing.assert_close(x_BTD.grad, y_BTD.grad, rtol=1e-5, atol=1e-5)
    for name, module in ours.named_children():
        gradient = getattr(reference, NAMES[name]).weight.grad
        torch.testing.assert_close(module.weight.grad, gradient, rtol=1e-5, atol=1e-5)


def test_cache_holds_the_latent_and_gives_the_same_result() -> None:
    torch.manual_seed(0)
    config = latent(None)
    attention, x_BTD, cache = LatentAttention(WIDTH, HEADS, config), torch.randn(2, LENGTH, WIDTH), Cache()
    cos_TR, sin_TR = rotary_table(LENGTH, config.rotary)
    whole_BTD = attention(x_BTD, cos_TR, sin_TR)
    parts = [
        attention(x_BTD[:, i:j], cos_TR[i:j], sin_TR[i:j], cache) for i, j in ((0, 5), (5, 6), (6, 7), (7, LENGTH))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_BTD, rtol=1e-5, atol=1e-6)
    kept = cache.extend(attention, torch.zeros(2, 0, config.key_value), torch.zeros(2, 0, config.rotary))
    assert [tuple(t.shape) for t in kept] == [(2, LENGTH, config.key_value), (2, LENGTH, config.rotary)]


def test_odd_rotary_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`rotary` must be even: .* Got 7\."):
        LatentConfig(key_value=8, rotary=7, head=8, value=8)
