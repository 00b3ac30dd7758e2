"""Multi-token prediction and parallel streams against their equations; opening streams in place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hybrid.models import (
    CausalLM,
    ExpertsConfig,
    LatentConfig,
    OptimizerConfig,
    PredictionConfig,
    StreamsConfig,
    Transformer,
    TransformerConfig,
)
from lightning_hybrid.models.attention import rotate

VOCABULARY, WIDTH, LENGTH = 32, 32, 10
LATENT = LatentConfig(key_value=16, rotary=8, head=8, value=8)


def config(**kwargs: Any) -> TransformerConfig:
    options: dict[str, Any] = {"vocabulary": VOCABULARY, "width": WIDTH, "blocks": 2, "heads": 2, "context_length": 16}
    return TransformerConfig(**{**options, "initial_std": 0.3, **kwargs})


def transformer(**kwargs: Any) -> Any:
    """A transformer whose parts a test may look into."""
    return Transformer(config(**kwargs))


def tokens(count: int = 3, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def test_further_token_is_predicted_as_in_the_equations() -> None:
    torch.manual_seed(0)
    model, text_BT = transformer(prediction=PredictionConfig(depth=2)), tokens()
    losses = model(text_BT[:, :-1], text_BT[:, 1:])
    x, times, expected = model._blocks(text_BT[:, :-1], None)[0], LENGTH - 1, []
    for depth, further in enumerate(model.further, start=1):
        h = []
        for i in range(times - depth):  # equation 21: position i and the token `depth` positions later
            further_token = model.embedding(text_BT[:, i + depth])
            h.append(
                further.projection(torch.cat([further.hidden_norm(x[:, i]), further.token_norm(further_token)], -1))
            )
        x, _ = further.block(torch.stack(h, 1), *model._rotations(0, times - depth))
        scores = model.head(further.final_norm(x))
        expected.append(F.cross_entropy(scores.flatten(0, 1), text_BT[:, 1 + depth :].flatten()))
    torch.testing.assert_close(losses.further_tokens, torch.stack(expected).mean())
    torch.testing.assert_close(
        losses.next_token, F.cross_entropy(model(text_BT[:, :-1]).flatten(0, 1), text_BT[:, 1:].flatten())
    )


def test_further_tokens_do_not_see_what_they_predict() -> None:
    """The last token is a target only, so that its embedding has no gradient."""
    model, text_BT = transformer(prediction=PredictionConfig()), tokens(1)
    text_BT[text_BT == 0] = 1
    text_BT[:, -1] = 0
    losses = model(text_BT[:, :-1], text_BT[:, 1:])
    gradient_VD = torch.autograd.grad(losses.further_tokens, model.embedding.weight)[0]
    assert gradient_VD[0].abs().max() == 0
    assert gradient_VD[text_BT[0, -2]].abs().max() > 0


@pytest.mark.parametrize("latent", [None, LATENT], ids=["full", "latent"])
def test_opening_streams_keeps_the_weights_and_adds_what_differs(latent: LatentConfig | None) -> None:
    torch.manual_seed(0)
    model, text_BT = transformer(latent=latent), tokens()
    before_BTV = model(text_BT)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    model.open_streams(StreamsConfig(count=3, prefix=4))
    assert all(torch.equal(model.get_parameter(n), p) for n, p in weights.items())
    assert not torch.allclose(model(text_BT), before_BTV, atol=1e-4)
    for block in model.blocks:
        block.attention.prefix = None
    torch.testing.assert_close(model(text_BT), before_BTV)  # equal streams: their weighted mean is each of them


def test_prefix_is_earlier_keys_and_values_without_rotation() -> None:
    torch.manual_seed(0)
    model, text_BT = transformer(blocks=1), tokens(2)
    model.open_streams(StreamsConfig(count=2, prefix=3))
    attention = model.blocks[0].attention
    cos, sin = model._rotations(0, LENGTH)
    x = torch.randn(4, LENGTH, WIDTH)
    q, k, v = (
        linear(x).view(4, LENGTH, 2, 16).transpose(1, 2)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    rows = []
    for row, stream in enumerate((0, 0, 1, 1)):
        keys = torch.cat([attention.prefix.keys[stream], k[row]], dim=1)
        values = torch.cat([attention.prefix.values[stream], v[row]], dim=1)
        scores = q[row] @ keys.transpose(1, 2) / 4
        scores = scores.masked_fill(torch.ones(LENGTH, LENGTH + 3, dtype=torch.bool).triu(4), -torch.inf)
        rows.append((scores.softmax(-1) @ values).transpose(0, 1).flatten(1))
    torch.testing.assert_close(attention(x, cos, sin), attention.out_proj(torch.stack(rows)))
    assert model(text_BT).shape == (2, LENGTH, VOCABULARY)


def test_aggregation_is_a_smoothed_mean_of_streams() -> None:
    torch.manual_seed(0)
    model = transformer()
    model.open_streams(StreamsConfig(count=4, smoothing=0.1))
    aggregator = model.aggregator
    x = torch.randn(4, 2, LENGTH, WIDTH)
    expected = torch.zeros(2, LENGTH, WIDTH)
    for b in range(2):
        for t in range(LENGTH):
            inner = F.silu(aggregator.inner(torch.cat([x[p, b, t] for p in range(4)])))
            weights = aggregator.outer(inner).softmax(-1) * 0.9 + 0.1 / 4
            expected[b, t] = sum(weights[p] * x[p, b, t] for p in range(4))
    torch.testing.assert_close(aggregator(x.flatten(0, 1)), expected)


def test_frozen_backbone_trains_prefixes_and_aggregator_only() -> None:
    model = transformer()
    model.open_streams(StreamsConfig(count=2, prefix=4, freeze_backbone=True))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith("aggregator.") or ".prefix." in n}
    text_BT = tokens()
    model(text_BT[:, :-1], text_BT[:, 1:]).next_token.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained


def test_streams_are_opened_once_and_not_beside_further_tokens() -> None:
    model = transformer()
    model.open_streams(StreamsConfig(count=2))
    with pytest.raises(ValueError, match="`streams` can be opened once"):
        model.open_streams(StreamsConfig(count=2))
    with pytest.raises(ValueError, match="`streams` and `prediction` exclude each other"):
        transformer(prediction=PredictionConfig()).open_streams(StreamsConfig(count=2))
    with pytest.raises(ValueError, match=r"`count` must be at least 1\. Got 0"):
        StreamsConfig(count=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"latent": LATENT}, {"key_value_heads": 1}, {"experts": ExpertsConfig(experts=4, chosen=2, hidden=16)}],
    ids=["dense", "latent", "grouped", "experts"],
)
@pytest.mark.parametrize("streams", [1, 2])
def test_generation_with_the_cache_is_that_of_whole_windows(options: dict[str, Any], streams: int) -> None:
    torch.manual_seed(0)
    model = CausalLM(config(**options), streams=StreamsConfig(count=2, prefix=3) if streams > 1 else None).eval()
    text_BT = prompt_BT = tokens(2, 3)
    with torch.no_grad():
        for _ in range(20):  # past the context length
            text_BT = torch.cat([text_BT, model(text_BT[:, -16:])[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(prompt_BT, 20, temperature=0), text_BT)


def test_second_phase_starts_from_the_first_and_learns(tmp_path: Path) -> None:
    text_NT = (torch.randint(VOCABULARY, (64, 1)) + torch.arange(LENGTH + 1)) % VOCABULARY
    loader = DataLoader(TensorDataset(text_NT[:, :-1], text_NT[:, 1:]), batch_size=8)

    def fit(model: CausalLM) -> Trainer:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, loader)
        return trainer

    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=1)
    first = CausalLM(config(initial_std=0.05, prediction=PredictionConfig()), optimizer)
    fit(first).save_checkpoint(tmp_path / "first.ckpt")
    path = str(tmp_path / "first.ckpt")
    second = CausalLM(config(initial_std=0.05), optimizer, StreamsConfig(count=2, prefix=4), initial_weights=path)
    assert torch.equal(second.transformer.head.weight, first.transformer.head.weight)
    trainer = fit(second)
    assert trainer.callback_metrics["train_loss"] < 2.5
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "second.ckpt")  # needs no first file
    torch.testing.assert_close(loaded(text_NT[:2]), second(text_NT[:2]))
    with pytest.raises(ValueError, match="`initial_weights` must fit the transformer"):
        CausalLM(config(latent=LATENT), initial_weights=path)
