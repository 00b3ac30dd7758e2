"""User code that acts on gradients within the backward pass: exact, or a warning where replicas make it differ."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hybrid import Layout
from tests.distributed.engine.state_jobs import WIDTH, Plain
from tests.distributed.jobs import quiet, verified_trainer_for, weights
from tests.harness import RankError, RankGroup
from tests.pairwise import quick
from tests.support import refused

BATCH = 8


def clamped(gradient: Tensor) -> Tensor:
    return gradient.clamp(-0.01, 0.01)


class Hooked(Plain):
    """A hook on an activation."""

    def change(self, gradient: Tensor) -> Tensor:
        return clamped(gradient)

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        out.register_hook(self.change)
        return F.mse_loss(out, batch[1])


class Scaled(Hooked):
    def change(self, gradient: Tensor) -> Tensor:
        return gradient * 0.5


class Normalized(Hooked):
    """By all samples."""

    def change(self, gradient: Tensor) -> Tensor:
        return gradient / gradient.norm() * 0.1


class NormalizedRows(Hooked):
    """By the norm of each sample's gradient, to a fixed one."""

    def change(self, gradient: Tensor) -> Tensor:
        return F.normalize(gradient, dim=1) * 0.02


class Normed(Hooked):
    """With BatchNorm."""

    def build(self):
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return super().forward(self.norm(x))


class NormedScaled(Normed, Scaled):
    change = Scaled.change


class Single(Hooked):
    """One sample per replica, so that there are no parts to compare."""

    batch = 2


class SingleScaled(Scaled):
    batch = 2


class OnNode(Plain):
    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        out.grad_fn.register_prehook(lambda gradients: tuple(map(clamped, gradients)))
        return F.mse_loss(out, batch[1])


class OnInputs(Plain):
    def build(self):
        self.blocks[2].register_full_backward_hook(lambda _, inputs, __: tuple(g.clamp(-2e-3, 2e-3) for g in inputs))


class OnOutputs(Plain):
    def build(self):
        self.blocks[2].register_full_backward_pre_hook(lambda _, outputs: tuple(g.clamp(-2e-3, 2e-3) for g in outputs))


class OnWeight(Plain):
    def build(self):
        self.head.weight.register_hook(clamped)


class Decayed(Plain):
    """A constant is added to the gradient of a weight."""

    def build(self):
        self.head.weight.register_hook(lambda gradient: gradient + 0.1)


class Watched(Plain):
    """Hooks that change nothing, also on modules that are never called."""

    def build(self):
        for module in self.blocks.modules():
            module.register_full_backward_hook(lambda *_: None)


class OnModule(Plain):
    """A hook on the module that a pipeline divides."""

    def build(self):
        self.register_full_backward_pre_hook(lambda _, outputs: tuple(map(clamped, outputs)))


class Late(Plain):
    """Its hook is on a module that has been divided already."""

    def on_train_start(self):
        self.blocks[2].register_full_backward_hook(lambda _, inputs, __: tuple(map(clamped, inputs)))


class LaterEpoch(Plain):
    """A hook that the first step has not."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.head.weight.register_hook(clamped)


class _Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return clamped(gradient)


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Own(Plain):
    """With a function whose backward is the user's."""

    function: Any = _Clamped

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.function.apply(self(batch[0])), batch[1])


class Reversal(Own):
    function = _Reversed


class StraightThrough(Own):
    function = _Straight


class SignOfGradient(Plain):
    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss((x, batch[1])), x)
        return self.loss((batch[0] + 0.1 * gradient.sign(), batch[1]))


class SizeOfGradient(Plain):
    """The loss of a batch is not the mean of those of its parts, whose gradients are larger."""

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss((x, batch[1])), x)
        return self.loss((batch[0] + 10 * gradient, batch[1]))


class Manual(Hooked):
    """Two backward passes through one graph."""

    def build(self):
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss * 2)
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)
        optimizer.step()


class ManualScaled(Manual, Scaled):
    change = Scaled.change


TEXTS = ("differs from one process by about", "From here on 1 is used")


def fit(layout: str | None, kind: type, **options: Any) -> dict[str, Any]:
    """Trains a module: weights, warnings, and rows of the verification."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = kind()
    trainer, replicas = verified_trainer_for(layout, strategy_options=options or None, max_epochs=2)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(*(torch.randn(24, width, generator=generator) for width in (WIDTH, 4)))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(data, batch_size=getattr(kind, "batch", BATCH) // replicas))
    verifier: Any = getattr(trainer.strategy, "_verifier", None)
    return {
        "weights": weights(trainer, module),
        "warnings": [str(w.message) for w in found if any(text in str(w.message) for text in TEXTS)],
        "rows": {} if verifier is None else dict(verifier.rows),
    }


@functools.cache
def expected_of(kind: type) -> dict[str, Tensor]:
    return fit(None, kind)["weights"]


def run(request: pytest.FixtureRequest, layout: str, kind: type, **options: Any) -> dict[str, Any]:
    ranks: RankGroup = request.getfixturevalue("ranks2" if Layout.parse(layout).devices == 2 else "ranks4")
    return ranks.call(fit, layout, kind, **options)[0]


def check_exact(found: dict[str, Any], kind: type) -> None:
    assert found["warnings"] == []
    for name, value in expected_of(kind).items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-4, atol=1e-6, msg=name)


ROW = "gradients as means over samples"
FEATURE = "hooks and functions that act on gradients in the backward pass"
LINEAR = (
    Scaled, NormedScaled, SingleScaled, Decayed, Watched, Reversal, StraightThrough, ManualScaled, SignOfGradient,
)  # fmt: skip
OTHERS = (Hooked, Normalized, NormalizedRows, Normed, Single, OnNode, OnInputs, OnOutputs, OnWeight, Own, Manual)


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize(
    ("kind", "layout"), quick([(k, y) for k in LINEAR for y in ("dp2", "fsdp2")], (Decayed, "fsdp2"))
)
def test_code_proportional_to_gradients_is_exact(request: pytest.FixtureRequest, kind: type, layout: str) -> None:
    found = run(request, layout, kind, verify="strict")
    check_exact(found, kind)
    assert "largest relative difference" in found["rows"][ROW]


@pytest.mark.parametrize(("kind", "layout"), quick([(k, y) for k in OTHERS for y in ("dp2", "fsdp2")], (Own, "fsdp2")))
def test_other_code_warns(request: pytest.FixtureRequest, kind: type, layout: str) -> None:
    found = run(request, layout, kind)
    assert any((found["weights"][n] - w).norm() > 1e-3 * w.norm() for n, w in expected_of(kind).items())
    (message,) = found["warnings"]
    assert "test_gradient_code.py:" in message
    assert "acts on gradients within the backward pass" in message
    assert "see the warning" in found["rows"][ROW]


@pytest.mark.parametrize("kind", quick([Hooked, OnInputs, Own, Single], Hooked))
def test_other_code_is_refused_if_strict(ranks2: RankGroup, kind: type) -> None:
    with pytest.raises(RankError, match=r"`verify='strict'`: .*test_gradient_code.py:\d+ .* acts on") as error:
        ranks2.call(fit, "dp2", kind, verify="strict")
    assert error.value.kind == "PartitionError"


@pytest.mark.slow
def test_each_replica_of_a_pipeline_warns(request: pytest.FixtureRequest) -> None:
    assert len(run(request, "dp2-pp2", Hooked)["warnings"]) == 1


@pytest.mark.feature(FEATURE)
@pytest.mark.parametrize(
    ("kind", "layout"),
    quick(
        [(k, y) for k in (*LINEAR, *OTHERS) for y in ("pp2", "tp2-pp2")
         if k not in (OnNode, Manual, ManualScaled, SignOfGradient)],
        (OnInputs, "pp2"),
    ),
)  # fmt: skip
def test_a_pipeline_is_exact(request: pytest.FixtureRequest, kind: type, layout: str) -> None:
    check_exact(run(request, layout, kind), kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Normalized, OnWeight, Decayed])
def test_requested_microbatches_are_refused(ranks2: RankGroup, kind: type) -> None:
    with pytest.raises(RankError, match="`microbatches=4`: .* Use `microbatches=1`") as error:
        ranks2.call(fit, "pp2", kind, microbatches=4)
    assert error.value.kind == "PartitionError"


@pytest.mark.feature("a backward hook of a module that a pipeline divides")
@pytest.mark.parametrize("layout", ["pp2"])
def test_a_hook_of_a_divided_module_is_refused(request: pytest.FixtureRequest, layout: str) -> None:
    with pytest.raises(RankError, match=r"`layout='pp2'` divides `OnModule`.*test_gradient_code.py:\d+") as error:
        run(request, layout, OnModule)
    assert error.value.kind == "PartitionError"
    refused(request)


@pytest.mark.slow
def test_a_hook_of_a_divided_module_is_refused_later(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match=r"`layout='pp2'` divides `blocks.2`.*test_gradient_code.py:\d+") as error:
        ranks2.call(fit, "pp2", Late)
    assert error.value.kind == "PartitionError"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "fsdp2", "pp2"])
def test_hooks_of_later_steps_are_verified(request: pytest.FixtureRequest, layout: str) -> None:
    (message,) = run(request, layout, LaterEpoch)["warnings"]
    assert ("From here on 1 is used" if layout == "pp2" else "acts on gradients") in message


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "fsdp2"])
def test_a_loss_with_gradients_inside_is_compared(request: pytest.FixtureRequest, layout: str) -> None:
    found = run(request, layout, SizeOfGradient)
    assert "computes a loss that is not the mean over the samples" in found["warnings"][0]
    assert ROW not in found["rows"]
