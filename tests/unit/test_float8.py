"""FP8 by blocks, with the matmul emulated: what is quantised how, and what it does to a loss. The GPU tests run it."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hybrid import Float8Precision, PartitionError
from lightning_hybrid.float8 import float8_forward, float8_linears
from lightning_hybrid.models import CausalLM, TransformerConfig
from tests.distributed.jobs import Classifier

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def rounded(x: Tensor, rows: int, columns: int) -> Tensor:
    """`x` after E4M3 with a scale for every block of `rows` x `columns`."""
    blocks = x.float().unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True).clamp_min(1e-12) / LARGEST
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(2, 3).flatten(0, 1)


class Emulated(torch.autograd.Function):
    """The three products of a linear layer, each of two quantised matrices, summed in float32 (section 3.3)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (rounded(x, 1, 128) @ rounded(weight, 128, 128).T).to(torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight = ctx.saved_tensors
        (g,) = gradients
        grad_x = rounded(g, 1, 128) @ rounded(weight, 128, 128)
        grad_weight = rounded(g, 128, 1).T @ rounded(x, 128, 1)
        return grad_x.to(torch.bfloat16), grad_weight.to(torch.bfloat16)


def emulate(module: nn.Module) -> None:
    for linear in float8_linears(module, ("*head*",)).values():
        linear.forward = lambda x, linear=linear: float8_forward(linear, Emulated.apply, x)  # type: ignore[arg-type]


def test_layers_are_chosen_by_size_and_name() -> None:
    model = CausalLM(TransformerConfig(width=128, blocks=1, heads=2, feed_forward=256))
    inside = "transformer.blocks.0"
    names = [f"{inside}.attention.{n}_proj" for n in ("q", "k", "v", "out")]
    names += [f"{inside}.feed_forward.{n}_proj" for n in ("gate", "up", "down")]
    assert list(float8_linears(model, ("*head*",))) == names
    assert "transformer.head" in float8_linears(model, ())
    assert float8_linears(nn.Sequential(nn.Linear(128, 100), nn.Linear(64, 128)), ()) == {}


def test_any_number_of_rows_and_a_bias() -> None:
    linear, x = nn.Linear(128, 256), torch.randn(3, 5, 128, requires_grad=True)
    y = float8_forward(linear, Emulated.apply, x)  # type: ignore[arg-type]
    assert (y.shape, y.dtype) == ((3, 5, 256), torch.bfloat16)
    torch.testing.assert_close(y.float(), linear(x), rtol=0.1, atol=0.1)
    y.float().square().sum().backward()
    fp8 = [x.grad, linear.weight.grad, linear.bias.grad]
    x.grad = linear.weight.grad = linear.bias.grad = None
    linear(x).square().sum().backward()
    for found, expected in zip(fp8, [x.grad, linear.weight.grad, linear.bias.grad], strict=True):
        assert found is not None
        assert expected is not None
        assert (found - expected).norm() < 0.05 * expected.norm()


def test_a_scale_for_every_block_keeps_outliers_apart() -> None:
    x = torch.randn(1, 256)
    x[0, 0] = 1e6
    kept, lost = rounded(x, 1, 128), rounded(x, 1, 256)
    assert (kept - x)[0, 128:].norm() < 0.05 * x[0, 128:].norm()
    assert (lost - x)[0, 128:].norm() > 0.3 * x[0, 128:].norm()


def test_the_kernel_is_told_the_size_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(x: Tensor, weight: Tensor, block: int, dtype: torch.dtype) -> Tensor:
        return (rounded(x, 1, block) @ rounded(weight, block, block).T).to(dtype)

    kernel = SimpleNamespace(fp8_blockwise_mm=SimpleNamespace(apply=apply))
    monkeypatch.setitem(sys.modules, "torchao.prototype.blockwise_fp8_training.linear", kernel)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    linear, x = nn.Linear(256, 256, bias=False), torch.randn(128, 256)
    nn.init.eye_(linear.weight)
    x[:, 0] = 1e6
    precision = Float8Precision()
    precision.convert_module(nn.Sequential(linear))
    y = linear(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - x)[:, 128:].norm() < 0.05 * x[:, 128:].norm()
    precision.restore()
    assert torch.equal(linear(x), x)


def train(emulated: bool) -> float:
    """The mean loss of the last steps in bfloat16, with or without FP8."""
    torch.manual_seed(0)
    model = CausalLM(TransformerConfig(vocabulary=64, width=128, blocks=2, heads=2, feed_forward=256)).transformer
    if emulated:
        emulate(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(50):
        batch = torch.randint(64, (16, 33), generator=torch.Generator().manual_seed(step))
        batch[:, 1::2] = (batch[:, :-1:2] + 1) % 64  # half of it can be learnt
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10


@pytest.mark.slow
def test_loss_is_that_of_bfloat16_within_a_quarter_of_a_percent() -> None:
    """The bound of DeepSeek-V3, section 3.3."""
    exact, found = train(False), train(True)
    assert exact < 3.8  # of ln 64 = 4.2 before
    assert found != exact
    assert abs(found - exact) < 0.0025 * exact


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_refused_without_a_gpu() -> None:
    trainer = L.Trainer(accelerator="cpu", devices=1, plugins=[Float8Precision()], logger=False, max_steps=1)
    with pytest.raises(PartitionError, match=r"`Float8Precision` needs a GPU .* Got no GPU"):
        trainer.fit(Classifier(), [])
