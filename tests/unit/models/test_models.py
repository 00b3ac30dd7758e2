"""The example transformer: its arithmetic, its training and its generation on one process."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hybrid.models import CausalLM, OptimizerConfig, TransformerConfig
from lightning_hybrid.models.attention import Attention, rotary_table, rotate
from lightning_hybrid.models.feed_forward import swiglu
from lightning_hybrid.models.optimizers import learning_rate_share


def small_model(**kwargs: Any) -> CausalLM:
    seed_everything(0, verbose=False)
    options: dict[str, Any] = {"vocabulary": 32, "width": 32, "blocks": 2, "heads": 2, "context_length": 16, **kwargs}
    optimizer = {key: options.pop(key) for key in ("learning_rate", "weight_decay") if key in options}
    return CausalLM(TransformerConfig(**options), OptimizerConfig(**optimizer, warmup_steps=2))


def counting_batches(batches: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Sequences that count upwards from random starts: a task that a few steps can learn."""
    generator = torch.Generator().manual_seed(0)
    starts_N1 = torch.randint(32, (8 * batches, 1), generator=generator)
    tokens_NT = (starts_N1 + torch.arange(17)) % 32
    return DataLoader(TensorDataset(tokens_NT[:, :-1], tokens_NT[:, 1:]), batch_size=8)


def trainer(directory: Path, steps: int) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        default_root_dir=directory,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_logits_have_one_score_for_each_value_at_each_position() -> None:
    logits_BTV = small_model()(torch.zeros(3, 5, dtype=torch.long))
    assert logits_BTV.shape == (3, 5, 32)


def test_position_sees_itself_and_those_before_it_only() -> None:
    model = small_model().eval()
    tokens_BT = torch.randint(32, (1, 16))
    changed_BT = tokens_BT.clone()
    changed_BT[0, 9] = (changed_BT[0, 9] + 1) % 32
    before_BTV, after_BTV = model(tokens_BT), model(changed_BT)
    torch.testing.assert_close(before_BTV[:, :9], after_BTV[:, :9])
    assert not torch.allclose(before_BTV[:, 9:], after_BTV[:, 9:])


def test_rotation_keeps_lengths_and_makes_products_depend_on_distance() -> None:
    cos_TK, sin_TK = rotary_table(32, 8)
    q_K, k_K = torch.randn(8), torch.randn(8)
    q_BHTK = rotate(q_K.expand(1, 1, 32, 8), cos_TK, sin_TK)
    k_BHTK = rotate(k_K.expand(1, 1, 32, 8), cos_TK, sin_TK)
    torch.testing.assert_close(q_BHTK.norm(dim=-1), q_K.norm().expand(1, 1, 32))
    products_TT = (q_BHTK @ k_BHTK.transpose(-1, -2))[0, 0]
    for distance in (0, 1, 7):
        diagonal = products_TT.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    torch.testing.assert_close(products_TT[0, 0], q_K @ k_K)


def test_attention_matches_its_equation() -> None:
    attention, x_BTD = Attention(width=16, heads=2), torch.randn(2, 8, 16)
    cos_TK, sin_TK = rotary_table(8, 8)
    q, k, v = (
        projection(x_BTD).view(2, 8, 2, 8).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    scores = rotate(q, cos_TK, sin_TK) @ rotate(k, cos_TK, sin_TK).transpose(-1, -2) / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(8, 8, dtype=torch.bool).triu(1), -math.inf)
    expected_BTD = attention.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 8, 16))
    torch.testing.assert_close(attention(x_BTD, cos_TK, sin_TK), expected_BTD)


def test_swiglu_is_that_of_torch_with_its_gradients() -> None:
    inputs = [torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    torch.testing.assert_close(swiglu(*inputs), F.silu(inputs[0]) * inputs[1])
    assert torch.autograd.gradcheck(swiglu, inputs)


def test_width_that_heads_can_not_share_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"`width` must be a multiple of 2 \* `heads`.*Got width 20 with 3 heads\. Use 18"
    ):
        TransformerConfig(width=20, heads=3)


def test_same_seed_gives_the_same_weights_and_an_uncertain_start() -> None:
    first, second = small_model(), small_model()
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
    tokens_BT = torch.randint(32, (4, 16))
    loss = F.cross_entropy(first(tokens_BT).flatten(0, 1), tokens_BT.flatten())
    assert loss.item() == pytest.approx(math.log(32), rel=0.02)


def test_built_late_is_built_in_configure_model_with_the_same_weights() -> None:
    early = small_model()
    seed_everything(0, verbose=False)
    late = CausalLM(early.config, build_late=True)
    assert not list(late.parameters())
    late.configure_model()
    late.configure_model()
    for name, weight in early.state_dict().items():
        assert torch.equal(weight, late.state_dict()[name])


def test_subclass_may_have_a_configure_model_of_its_own() -> None:
    class Frozen(CausalLM):
        def configure_model(self) -> None:
            self.transformer.requires_grad_(self.device.type != "cpu")

    model = Frozen(TransformerConfig(width=16, blocks=1, heads=1))
    assert all(p.requires_grad for p in model.parameters())
    model.configure_model()
    assert not any(p.requires_grad for p in model.parameters())


def test_residual_projections_start_smaller() -> None:
    model = small_model(width=128, blocks=8)
    std = {name: weight.std().item() for name, weight in model.state_dict().items()}
    assert std["transformer.blocks.0.attention.q_proj.weight"] == pytest.approx(0.02, rel=0.05)
    assert std["transformer.blocks.0.attention.out_proj.weight"] == pytest.approx(0.005, rel=0.05)
    assert std["transformer.blocks.7.feed_forward.down_proj.weight"] == pytest.approx(0.005, rel=0.05)


def test_training_learns_and_logs(tmp_path: Path) -> None:
    model = small_model(learning_rate=1e-2)
    fit = trainer(tmp_path, steps=60)
    fit.fit(model, counting_batches(60), counting_batches(2))
    assert fit.callback_metrics["train_loss"] < 1.0
    assert fit.callback_metrics["val_bits_per_byte"] < 1.0 / math.log(2)
    (tested,) = fit.test(model, counting_batches(2), verbose=False)
    predicted = fit.predict(model, counting_batches(2))
    assert predicted is not None
    bits_B = torch.cat([batch for batch in predicted if isinstance(batch, torch.Tensor)])
    assert bits_B.shape == (16,)
    assert bits_B.mean().item() == pytest.approx(tested["test_bits_per_byte"], rel=1e-5)


def test_weight_decay_is_for_matrices_only(tmp_path: Path) -> None:
    model = small_model(weight_decay=0.3)
    fit = trainer(tmp_path, steps=1)
    fit.fit(model, counting_batches(1))
    groups = fit.optimizers[0].param_groups
    assert {(p.dim() > 1, group["weight_decay"]) for group in groups for p in group["params"]} == {
        (True, 0.3),
        (False, 0.0),
    }
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_learning_rate_rises_then_falls_to_a_tenth() -> None:
    shares = [learning_rate_share(step, OptimizerConfig(warmup_steps=4), total_steps=20) for step in range(25)]
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(later < earlier for earlier, later in zip(shares[4:20], shares[5:21], strict=True))
    assert shares[20:] == pytest.approx([0.1] * 5)
    assert learning_rate_share(0, OptimizerConfig(warmup_steps=0), total_steps=0) > 0


def test_generation_continues_the_prompt_by_the_likeliest_token() -> None:
    model = small_model().eval()
    prompt_BT = torch.tensor([[1, 2, 3], [4, 5, 6]])
    tokens_BT = model.generate(prompt_BT, 20, temperature=0)
    assert tokens_BT.shape == (2, 23)
    assert torch.equal(tokens_BT[:, :3], prompt_BT)
    with torch.no_grad():
        for time in (3, 15, 22):  # the last is past the context length of 16
            logits_BTV = model(tokens_BT[:, max(0, time - 16) : time])
            assert torch.equal(tokens_BT[:, time], logits_BTV[:, -1].argmax(-1))


def test_generation_repeats_with_the_same_generator_seed() -> None:
    model = small_model()
    prompt_BT = torch.tensor([[1, 2, 3]])
    samples = [model.generate(prompt_BT, 30, 1.0, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_checkpoint_rebuilds_the_model_from_its_hyperparameters(tmp_path: Path) -> None:
    model = small_model()
    fit = trainer(tmp_path, steps=1)
    fit.fit(model, counting_batches(1))
    fit.save_checkpoint(tmp_path / "model.ckpt")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "model.ckpt")
    tokens_BT = torch.randint(32, (2, 16))
    assert torch.equal(loaded(tokens_BT), model(tokens_BT))
