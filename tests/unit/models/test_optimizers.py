"""AdamW with moments in bfloat16, and learning rates."""

import copy

import pytest
import torch
from torch import nn

from lightning_hybrid.models import AdamWBF16, CausalLM, ExpertsConfig, Muon, OptimizerConfig, TransformerConfig
from lightning_hybrid.models.optimizers import learning_rate_share, make_optimizer, orthogonalize


def trained(optimizer_class: type[torch.optim.Optimizer], steps: int) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Linear(32, 32)
    optimizer = optimizer_class(module.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)  # type: ignore[call-arg]
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(16, 32)).square().mean().backward()
        optimizer.step()
    return module, optimizer


def test_first_step_is_that_of_adamw() -> None:
    ours, reference = trained(AdamWBF16, 1)[0], trained(torch.optim.AdamW, 1)[0]
    torch.testing.assert_close(ours.weight, reference.weight)


def test_many_steps_stay_near_adamw_in_half_the_memory() -> None:
    (ours, optimizer), (reference, _) = trained(AdamWBF16, 100), trained(torch.optim.AdamW, 100)
    moved = (trained(AdamWBF16, 0)[0].weight - reference.weight).norm()
    assert (ours.weight - reference.weight).norm() < 0.02 * moved
    state = optimizer.state[ours.weight]
    assert {state[k].dtype for k in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}


def test_state_comes_back_in_bfloat16_and_goes_on_exactly() -> None:
    module, optimizer = trained(AdamWBF16, 5)
    other = copy.deepcopy(module)
    again = AdamWBF16(other.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.state[other.weight]["exp_avg"].dtype == torch.bfloat16
    for net, stepping in ((module, optimizer), (other, again)):
        stepping.zero_grad()
        net(torch.ones(1, 32)).sum().backward()
        stepping.step()
    assert torch.equal(module.weight, other.weight)


@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 48)])
def test_muon_is_that_of_torch(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon([{"params": [ours], "matrices": True}], lr=1e-2, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(10):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    # torch iterates in bfloat16
    assert (ours - theirs).norm() < 0.03 * (theirs - start).norm()


def test_muon_takes_every_matrix_of_a_stack_by_itself_and_the_rest_is_adamw() -> None:
    torch.manual_seed(0)
    stack, other = nn.Parameter(torch.randn(3, 8, 12)), nn.Parameter(torch.randn(8, 12))
    single, vector = nn.Parameter(stack.detach()[1].clone()), nn.Parameter(torch.randn(5))
    twin = nn.Parameter(vector.detach().clone())
    both = Muon([{"params": [stack, other], "matrices": True}, {"params": [vector]}], lr=1e-2)
    alone = Muon([{"params": [single], "matrices": True}], lr=1e-2)
    adamw = torch.optim.AdamW([twin], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(5):
        for p in (stack, other, vector):
            p.grad = torch.randn_like(p)
        single.grad, twin.grad = stack.grad[1].clone(), vector.grad.clone()  # type: ignore[index, union-attr]
        for optimizer in (both, alone, adamw):
            optimizer.step()
    torch.testing.assert_close(stack[1], single)
    torch.testing.assert_close(vector, twin)


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalize(torch.randn(4, 24, 40)))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_matrices_of_blocks_go_to_muon() -> None:
    mixture = ExpertsConfig(experts=4, chosen=2, hidden=16)
    model = CausalLM(TransformerConfig(width=32, blocks=2, heads=2, experts=mixture))
    optimizer = make_optimizer(model, OptimizerConfig(name="muon"))
    names = {id(p): n for n, p in model.named_parameters()}
    chosen = {names[id(p)] for g in optimizer.param_groups if g["matrices"] for p in g["params"]}
    assert "transformer.blocks.1.feed_forward.experts.gate_up_proj" in chosen
    assert "transformer.blocks.0.attention.q_proj.weight" in chosen
    assert not any("embedding" in n or "head" in n or "router" in n or "norm" in n for n in chosen)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(names)


def test_stable_schedule_is_flat_and_then_falls_to_zero() -> None:
    config = OptimizerConfig(schedule="stable", warmup_steps=4, decay_share=0.25)
    shares = [learning_rate_share(step, config, total_steps=40) for step in range(41)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(shares[4:31]) == {1.0}
    assert shares[30:] == pytest.approx([1 - i / 10 for i in range(11)])


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`schedule` must be one of cosine, stable\. Got 'linear'"):
        OptimizerConfig(schedule="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`decay_share` must be above 0 and at most 1\. Got 0"):
        OptimizerConfig(decay_share=0)
