"""The mixture of experts against transformers' DeepSeek-V3 and a loop over experts; balancing by bias."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch.nn import functional as F
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

from lightning_hybrid.models import ExpertsConfig, MixtureOfExperts
from lightning_hybrid.models.experts import Experts, Router, max_violation

WIDTH, HIDDEN = 32, 16


def config(**kwargs: Any) -> ExpertsConfig:
    options: dict[str, Any] = {"experts": 8, "chosen": 2, "hidden": HIDDEN, "balance_loss": 0.0}
    return ExpertsConfig(**{**options, **kwargs})


def theirs(settings: ExpertsConfig) -> deepseek.DeepseekV3MoE:
    reference = hf.DeepseekV3Config(
        hidden_size=WIDTH,
        moe_intermediate_size=settings.hidden,
        n_routed_experts=settings.experts,
        num_experts_per_tok=settings.chosen,
        n_shared_experts=settings.shared,
        n_group=settings.groups,
        topk_group=settings.chosen_groups,
        routed_scaling_factor=settings.scale,
        norm_topk_prob=True,
    )
    reference._experts_implementation = "eager"
    return deepseek.DeepseekV3MoE(reference)


def copy_weights(ours: MixtureOfExperts, reference: deepseek.DeepseekV3MoE) -> None:
    assert ours.shared is not None
    reference.gate.weight.data.copy_(ours.router.weight.data)
    reference.gate.e_score_correction_bias.copy_(ours.router.bias)
    reference.experts.load_state_dict(ours.experts.state_dict())
    reference.shared_experts.load_state_dict(ours.shared.state_dict())


@pytest.mark.parametrize(
    "settings",
    [config(), config(groups=4, chosen_groups=2, chosen=3, scale=2.5, shared=2), config(experts=16, chosen=8)],
    ids=["plain", "groups", "many"],
)
def test_equal_to_transformers(settings: ExpertsConfig) -> None:
    torch.manual_seed(0)
    ours, reference = MixtureOfExperts(WIDTH, settings), theirs(settings)
    ours.router.bias.normal_(std=0.1)
    copy_weights(ours, reference)
    x_BTD = torch.randn(3, 20, WIDTH, requires_grad=True)
    y_BTD = x_BTD.detach().clone().requires_grad_()
    mine, other = ours(x_BTD)[0], reference(y_BTD)
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    mine.square().sum().backward()
    other.square().sum().backward()
    torch.testing.assert_close(x_BTD.grad, y_BTD.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.router.weight.grad, reference.gate.weight.grad, rtol=1e-5, atol=1e-5)
    for name, parameter in ours.experts.named_parameters():
        gradient = reference.experts.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5)


def test_weight_is_the_unbiased_score() -> None:
    router = Router(WIDTH, config(chosen=1))
    x_ND = torch.randn(5, WIDTH)
    router.bias[3] = 10.0
    routing = router(x_ND)
    assert routing.index_NA.flatten().tolist() == [3] * 5
    torch.testing.assert_close(routing.weights_NA, torch.ones(5, 1))
    both = Router(WIDTH, config())
    both.bias[3] = both.bias[5] = 10.0
    scores_NE, index_NA, weights_NA = both(x_ND)
    chosen_NA = scores_NE.gather(1, index_NA)
    torch.testing.assert_close(weights_NA, chosen_NA / chosen_NA.sum(dim=1, keepdim=True))


def test_experts_without_tokens_and_without_any_token() -> None:
    experts = Experts(4, WIDTH, HIDDEN)
    x_ND = torch.randn(6, WIDTH)
    index_NA = torch.full((6, 1), 2)
    gate_NF, up_NF = F.linear(x_ND, experts.gate_up_proj[2]).chunk(2, dim=-1)
    expected_ND = F.linear(F.silu(gate_NF) * up_NF, experts.down_proj[2])
    torch.testing.assert_close(experts(x_ND, index_NA, torch.ones(6, 1)), expected_ND)
    assert experts(x_ND[:0], index_NA[:0], torch.ones(0, 1)).shape == (0, WIDTH)


def test_autocast_computes_experts_in_bfloat16_and_the_router_in_float32() -> None:
    torch.manual_seed(0)
    layer, x_BTD = MixtureOfExperts(WIDTH, config()), torch.randn(2, 8, WIDTH)
    exact_BTD, _ = layer(x_BTD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough_BTD, _ = layer(x_BTD)
        scores_NE = layer.router(x_BTD.flatten(0, 1)).scores_NE
    assert scores_NE.dtype == torch.float32
    assert torch.equal(scores_NE, layer.router(x_BTD.flatten(0, 1)).scores_NE)
    assert not torch.equal(rough_BTD, exact_BTD)
    torch.testing.assert_close(rough_BTD.float(), exact_BTD, rtol=0.05, atol=0.02)


def test_balance_loss_is_that_of_the_equations() -> None:
    torch.manual_seed(0)
    settings = config(balance_loss=0.5)
    layer, x_BTD = MixtureOfExperts(WIDTH, settings), torch.randn(2, 10, WIDTH)
    scores = layer.router(x_BTD.flatten(0, 1)).scores_NE.view(2, 10, 8)
    expected = 0.0
    for b in range(2):  # equations 17 to 20, term by term
        for i in range(8):
            f = sum(float(i in scores[b, t].topk(2).indices) for t in range(10)) * 8 / (2 * 10)
            p = sum(scores[b, t, i] / scores[b, t].sum() for t in range(10)) / 10
            expected = expected + 0.5 * f * p / 2
    torch.testing.assert_close(layer(x_BTD)[1], expected)
    assert layer.eval()(x_BTD)[1] == 0


def test_bias_balances_the_load_within_300_steps() -> None:
    """The toy: what all tokens have in common favors some of 16 experts, three times their share for the busiest."""
    torch.manual_seed(0)
    router, common = Router(WIDTH, config(experts=16)), 0.85 * torch.randn(WIDTH)
    violations = []
    for _ in range(300):
        router(common + torch.randn(16_384, WIDTH))
        violations.append(float(max_violation(router.load)))
        router.balance(router.load.clone(), 1e-3)
    assert violations[0] > 1.9
    assert max(violations[-20:]) <= 0.1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"chosen": 9}, r"`chosen` must be at most the experts that are available to a token\. Got 9 of 8"),
        (
            {"groups": 4, "chosen_groups": 1, "chosen": 3},
            r"Got 3 of 2 \(8 experts in 4 groups, of which 1 are chosen\)",
        ),
        ({"groups": 3}, r"`groups` must divide `experts` into groups of at least 2\. Got 3 groups of 8 experts"),
        ({"groups": 2, "chosen_groups": 3}, r"`chosen_groups` must be at most `groups`\. Got 3 of 2"),
        ({"experts": 0}, r"`experts` must be at least 1\. Got 0"),
    ],
)
def test_impossible_choices_are_refused(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**kwargs)


def test_widths_that_a_grouped_matmul_can_not_take_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`hidden` must be a multiple of 8 in a mixture of experts.* Got 13\. Use 16"):
        Experts(4, WIDTH, 13)
