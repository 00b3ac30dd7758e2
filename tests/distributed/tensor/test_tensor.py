"""Losses and gradients under tensor parallelism equal those of one process, also with `fully_shard` on top."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import default_collate

from lightning_hybrid.ghosts.dry_run import trace_step
from lightning_hybrid.ghosts.record import UnitCall
from lightning_hybrid.ghosts.units import CallInterceptor, find_units
from lightning_hybrid.tensor.apply import TensorParallel, apply_tensor_plan
from lightning_hybrid.tensor.infer import infer_tensor_plan
from tests.harness import RankGroup
from tests.pairwise import slow
from tests.zoo.cases import CASES

TOLERANCE = 1e-11
"""In float64, relative to the largest entry: far above rounding, far below any wrong number."""
FLOAT32_TOLERANCE = 1e-5
"""For models that compute in float32 inside, whatever their weights are."""


class Divided:
    """A model under a plan, in float64, and what one process gives for it."""

    def __init__(self, root: Any, batch: Any, mesh: Any, loss: Callable[[], torch.Tensor] | None = None) -> None:
        for name, module in root.named_modules():
            if isinstance(module, nn.Dropout) and "drop" in name:
                module.p = 0.0
        self.root, self.loss = root.double(), loss or (lambda: root.training_step(batch, 0))
        root.__dict__["log"] = lambda *args, **kwargs: None
        units = find_units(root)
        interceptor = CallInterceptor(root, units)
        interceptor.install()
        step = getattr(root, "training_step", self.loss)
        arguments = (batch, 0) if loss is None else ()
        trace = trace_step(root, interceptor, step, arguments, device=torch.device("cpu"), use_of=units.names)
        interceptor.remove()
        self.before = {name: p.detach().clone() for name, p in root.named_parameters()}
        self.expected_loss = self.loss()
        self.expected_loss.backward()
        self.expected = {name: p.grad for name, p in root.named_parameters() if p.grad is not None}
        root.zero_grad()
        self.plan = infer_tensor_plan(root, trace.calls, mesh.size(), None, trace.use)
        self.handle: TensorParallel = apply_tensor_plan(root, self.plan, mesh)

    def step(self) -> torch.Tensor:
        """Forward and backward."""
        with self.handle.root_context():
            loss = self.loss()
        loss.backward()
        return loss

    def check(self, loss: torch.Tensor, tolerance: float = TOLERANCE) -> None:
        """Loss and gradients are those of one process."""
        torch.testing.assert_close(loss, self.expected_loss, rtol=tolerance, atol=tolerance)
        largest = max(float(g.abs().max()) for g in self.expected.values())
        for name, parameter in self.root.named_parameters():
            assert (parameter.grad is None) == (name not in self.expected), name
            if parameter.grad is not None:
                gradient = self.handle.full_tensor(name, parameter.grad)
                error = (gradient - self.expected[name]).abs().max().item()
                assert error <= max(tolerance * largest, 1e-8 * self.expected[name].abs().max().item()), name

    def remove(self) -> None:
        """The plan is taken off; the weights are as they were, bit by bit."""
        kept = {name for name, module in self.root.named_modules() if module._forward_hooks}
        self.handle.remove()
        assert kept
        assert not [n for n, m in self.root.named_modules() if m._forward_hooks or m._forward_pre_hooks]
        for name, parameter in self.root.named_parameters():
            assert type(parameter) is nn.Parameter
            assert torch.equal(parameter, self.before[name]), name


def _mesh(size: int) -> Any:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))


def _case(name: str, mesh: Any, samples: int = 4) -> Divided:
    torch.manual_seed(0)
    root: Any = CASES[name].build()
    if name in ("deepseek_v3", "mixtral"):
        root.net.set_experts_implementation("eager")  # the default has no float64
    generator = torch.Generator().manual_seed(1)
    batch = default_collate([CASES[name].sample(generator) for _ in range(samples)])
    batch = (
        {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        if isinstance(batch, dict)
        else [
            v.double() if v.is_floating_point() else v for v in (batch if isinstance(batch, (list, tuple)) else [batch])
        ]
    )
    return Divided(root, batch[0] if isinstance(batch, list) and len(batch) == 1 else batch, mesh)


def _run_case(name: str, size: int) -> float:
    divided = _case(name, _mesh(size))
    assert all(isinstance(p, DTensor) for p in divided.root.parameters())
    divided.check(divided.step(), FLOAT32_TOLERANCE if name == "mamba" else TOLERANCE)
    divided.root.zero_grad()
    divided.remove()
    assert torch.equal(divided.loss(), divided.expected_loss)
    return divided.plan.fraction


@pytest.mark.parametrize(
    ("name", "fraction"),
    [
        ("llama", 0.98),  # grouped queries
        ("gpt2", 0.98),  # fused q-k-v, transposed weights, tied head
        ("bert", 0.95),  # head with a shared bias
        ("bloom", 0.98),  # position biases by head as an argument
        ("falcon", 0.8),  # multi-query: fused q-k-v stays whole
        ("qwen3", 0.98),  # norms of queries and keys
        ("deepseek_v3", 0.3),  # latent attention
        ("bart", 0.9),  # cross-attention
        slow("t5", 0.5),  # weights shared three times
        ("mamba", 0.95),  # two rows in a region
        ("mixtral", 0.1),  # routed experts stay whole
        ("encoder", 0.95),  # nn.TransformerEncoder
        ("lstm", 0.3),  # a second list of weights
        ("resnet", 0.9),  # convolutions with gathered output
        ("tied", 0.95),  # width read from a shape
    ],
)
def test_one_step_equals_one_process(ranks2: RankGroup, name: str, fraction: float) -> None:
    assert ranks2.call(_run_case, name, 2)[0] > fraction


def test_fewer_key_heads_than_ranks(ranks4: RankGroup) -> None:
    assert ranks4.call(_run_case, "llama", 4)[0] > 0.8


class Recomputed(nn.Module):
    """A block of which a part, or all, is recomputed in the backward pass."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        if self.how == "inside":
            return x + checkpoint(self.mlp, x, use_reentrant=False)
        return x + self.mlp(x)


class Stack(nn.Module):
    """Blocks in a list, the blocks recomputed or not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Recomputed(how) for _ in range(2))
        self.x = torch.randn(2, 6, 16, dtype=torch.float64)
        self.scale = nn.Parameter(torch.ones(16))

    def loss(self) -> torch.Tensor:
        x = self.x * self.scale
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if layer.how == "around" else layer(x)
        return x.square().mean()


def _recompute(how: str) -> None:
    mesh = _mesh(2)
    torch.manual_seed(0)
    root = Stack(how)
    divided = Divided(root, None, mesh, root.loss)
    assert len(divided.plan.attention) == 2
    divided.check(divided.step())


@pytest.mark.parametrize("how", ["none", "inside", "around"])
def test_recomputed_activations(ranks2: RankGroup, how: str) -> None:
    ranks2.call(_recompute, how)


class Regularised(Stack):
    """A loss that also looks at weights of the blocks: at a norm's and at a linear's."""

    def loss(self) -> torch.Tensor:
        block: Any = self.layers[0]
        return super().loss() + block.norm.weight.square().sum() + block.up.weight.square().sum()


def _weights_in_the_loss() -> None:
    torch.manual_seed(0)
    root = Regularised("none")
    divided = Divided(root, None, _mesh(2), root.loss)
    assert "layers.0.up.weight" not in divided.plan.parameters
    assert "layers.1.up.weight" in divided.plan.parameters
    divided.check(divided.step())


def test_weights_that_the_loss_looks_at(ranks2: RankGroup) -> None:
    ranks2.call(_weights_in_the_loss)


def _attention(kind: str) -> None:
    group = _mesh(2)
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "separate": {"kdim": 8, "vdim": 12},
        "sequence_first": {"batch_first": False},
        "no_bias": {"bias": False},
    }.get(kind, {})
    module = nn.MultiheadAttention(16, 4, **{"batch_first": True, **options}).double()
    batched = kind != "unbatched"

    def made(width: int) -> torch.Tensor:
        return torch.randn(*((3, 5, width) if batched else (5, width)), dtype=torch.float64, requires_grad=True)

    query = made(16)
    key, value = (made(8), made(12)) if kind == "separate" else (query, query) if kind == "self" else (made(16),) * 2
    arguments: dict[str, Any] = {
        "padding": {"key_padding_mask": torch.tensor([[False] * 4 + [True]] * 3)},
        "mask": {"attn_mask": torch.ones(5, 5).triu(1).bool(), "need_weights": False},
        "mask_by_head": {"attn_mask": torch.randn(12, 5, 5).double()},
        "causal": {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True, "need_weights": False},
        "weights_by_head": {"average_attn_weights": False},
    }.get(kind, {})
    root = nn.ModuleDict({"layers": nn.ModuleList([module])})
    tensors = list({id(t): t for t in (query, key, value)}.values())

    def run() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        out, weights = module(query, key, value, **arguments)
        loss = out.square().sum()
        if weights is not None:
            loss = loss + (weights * torch.arange(weights.shape[-1])).square().sum()
        loss.backward()
        gradients = [t.grad.clone() for t in tensors if t.grad is not None]
        for tensor in tensors:
            tensor.grad = None
        return [out.detach(), *([] if weights is None else [weights.detach()])], gradients

    expected = run()
    weights_expected = {n: p.grad for n, p in root.named_parameters()}
    root.zero_grad()
    call = UnitCall(name="layers.0", args=(query, key, value), kwargs=arguments)
    plan = infer_tensor_plan(root, [call], 2)
    assert plan.attention == ("layers.0",)
    handle = apply_tensor_plan(root, plan, group)
    torch.testing.assert_close(run(), expected)
    for name, parameter in root.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(handle.full_tensor(name, parameter.grad), weights_expected[name])


@pytest.mark.parametrize(
    "kind",
    [
        "self", "cross", "separate", "sequence_first", "no_bias", "unbatched", "padding", "mask", "mask_by_head",
        "causal", "weights_by_head",
    ],
)  # fmt: skip
def test_multihead_attention(ranks2: RankGroup, kind: str) -> None:
    ranks2.call(_attention, kind)


def _evaluate_encoder() -> None:
    mesh = _mesh(2)
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).double().eval()
    root = nn.ModuleDict({"encoder": encoder})
    x = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    call = UnitCall(name="encoder", args=(x,), kwargs={"src_key_padding_mask": padding})
    expected = encoder(x, src_key_padding_mask=padding)
    handle = apply_tensor_plan(root, infer_tensor_plan(root, [call], 2), mesh)
    for context in (nullcontext(), torch.no_grad()):
        with context, handle.root_context():
            found = encoder(x, src_key_padding_mask=padding)
        torch.testing.assert_close(found[~padding], expected[~padding])


def test_evaluation_takes_no_fast_path(ranks2: RankGroup) -> None:
    ranks2.call(_evaluate_encoder)


def _with_fully_shard(name: str) -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    divided = _case(name, mesh["tp"])
    root = divided.root

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.root = root

        def forward(self) -> torch.Tensor:
            with divided.handle.root_context():
                return divided.loss()

    for unit, plan in divided.plan.units.items():
        if plan.rowwise:
            fully_shard(root.get_submodule(unit), mesh=mesh["fsdp"])
    step = Step()
    fully_shard(step, mesh=mesh["fsdp"])
    loss = step()
    loss.backward()
    divided.check(loss)
    optimizer = torch.optim.AdamW(root.parameters(), lr=1e-2, foreach=True)
    torch.nn.utils.clip_grad_norm_(root.parameters(), 1.0)
    optimizer.step()


@pytest.mark.parametrize("name", [slow("llama"), slow("gpt2")])
def test_under_fully_shard(ranks4: RankGroup, name: str) -> None:
    ranks4.call(_with_fully_shard, name)


def _layouts_of_a_tensor() -> None:
    divided = _case("gpt2", _mesh(2))
    name = "net.transformer.h.0.attn.c_attn.weight"
    full = divided.before[name]
    part = divided.handle.shard(name, full)
    assert isinstance(part, DTensor)
    parameter = dict(divided.root.named_parameters())[name]
    assert torch.equal(part.to_local(), parameter.to_local())  # type: ignore[attr-defined]  -- a DTensor here
    assert torch.equal(divided.handle.full_tensor(name, part), full)
    assert torch.equal(divided.handle.full_tensor(name, part.to_local()), full)


def test_a_tensor_is_divided_and_joined(ranks2: RankGroup) -> None:
    ranks2.call(_layouts_of_a_tensor)


def _id_out_of_range() -> None:
    divided = _case("gpt2", _mesh(2))
    with divided.handle.root_context():
        divided.root.net.transformer.wte(torch.tensor([[10_000]]))


def test_an_id_out_of_range_is_an_error_on_every_rank(ranks2: RankGroup) -> None:
    with pytest.raises(RuntimeError, match="is out of range"):
        ranks2.call(_id_out_of_range)
