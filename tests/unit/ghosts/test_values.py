"""The dry run and values: selections by real masks, reads that decide nothing, and checks that pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torchmetrics.functional as metrics
from torch import nn
from torch.nn import functional as F  # noqa: N812 -- as users import it

from lightning_hybrid.ghosts.dry_run import trace_step
from lightning_hybrid.ghosts.record import Trace
from lightning_hybrid.ghosts.units import CallInterceptor, find_units
from lightning_hybrid.spec.errors import PartitionError

WIDTH = 8
X, Y = torch.randn(6, WIDTH), torch.randn(6, 4)
MASK, LABELS = torch.tensor([True, False, True, True, False, True]), torch.tensor([0, 1, 2, 3, 1, 0])
LENGTHS = torch.tensor([1, 2, 3, 1, 2, 3])


class Net(L.LightningModule):
    """The step is `step(self)`."""

    def __init__(self, step: Callable[[Any], Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)
        self.step, self.kept = step, []

    def hidden(self, x: torch.Tensor, begin: int = 0, end: int = 3) -> torch.Tensor:
        for block in list(self.blocks)[begin:end]:
            x = block(x)
        return x

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self)


def trace(step: Callable[[Any], Any], **options: Any) -> Trace:
    return trace_module(Net(step), **options)


def trace_module(module: Net, **options: Any) -> Trace:
    interceptor = CallInterceptor(module, find_units(module))
    interceptor.install()
    try:
        return trace_step(module, interceptor, module.training_step, (X, 0), device=torch.device("cpu"), **options)
    finally:
        interceptor.remove()


def shape_of(function: Callable[[torch.Tensor], torch.Tensor]) -> tuple[int, ...]:
    """The shape that the dry run finds for a function of ghosts; and that of real tensors, which must be equal."""
    found: list[tuple[int, ...]] = []
    trace(lambda net: (found.append(tuple(function(net.hidden(X)).shape)), net.head(X).mean())[1])
    assert found[0] == tuple(function(X.clone()).shape)
    return found[0]


def assigned(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[MASK] = 0
    x[MASK, 0] = torch.ones(4)
    x[~MASK] = x[~MASK] * 2
    x.index_put_((MASK,), torch.zeros(WIDTH)).masked_scatter_(MASK[:, None], torch.ones(6, WIDTH))
    return x[MASK]


def packed(x: torch.Tensor) -> torch.Tensor:
    steps = x[:, None, :].expand(-1, 3, -1)
    sequence = nn.utils.rnn.pack_padded_sequence(steps, LENGTHS, batch_first=True, enforce_sorted=False)
    return nn.utils.rnn.pad_packed_sequence(sequence, batch_first=True)[0][MASK, :2]


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: x[MASK], (4, WIDTH)),
        (lambda x: x[MASK, 1:3], (4, 2)),
        (lambda x: x.reshape(2, 3, WIDTH)[MASK.reshape(2, 3)], (4, WIDTH)),
        (lambda x: x[:, torch.arange(WIDTH) > 5], (6, 2)),
        (lambda x: x[MASK.nonzero().squeeze(1)], (4, WIDTH)),
        (lambda x: x[torch.where(MASK)], (4, WIDTH)),
        (lambda x: x.masked_select(MASK[:, None]), (4 * WIDTH,)),
        (lambda x: x.repeat_interleave(LENGTHS, 0), (12, WIDTH)),
        (lambda x: x[: int(LENGTHS.max())], (3, WIDTH)),
        (lambda x: torch.cat(x.split(LENGTHS[:3].tolist())), (6, WIDTH)),
        (assigned, (4, WIDTH)),
        (packed, (4, 2, WIDTH)),
    ],
)
def test_real_values_decide_shapes(function: Any, shape: tuple[int, ...]) -> None:
    assert shape_of(function) == shape


def test_what_depends_on_values_of_the_batch_is_known() -> None:
    selections: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: x[MASK],
        lambda x: x[MASK.nonzero().squeeze(1)],
        lambda x: x[torch.where(MASK)],
        lambda x: x[torch.unique(LENGTHS)],
        lambda x: x[: int(LENGTHS.max())],
        lambda x: x[: LENGTHS.max()],
        lambda x: x[: LENGTHS.max().item()],
        lambda x: torch.cat(x.split(LENGTHS[:3].tolist())),
        lambda x: x[np.flatnonzero(MASK.numpy())],
        lambda x: x.repeat_interleave(LENGTHS, 0),
        packed,
    ]
    for select in selections:
        assert trace(lambda net: select(net.head(net.hidden(X))).mean()).depends_on_values  # noqa: B023
    assert not trace(lambda net: net.head(net.hidden(X)).mean()).depends_on_values


def test_cuts_with_shapes_that_differ_between_batches_are_refused() -> None:
    result = trace(lambda net: net.head(net.hidden(X)[MASK]).mean())
    other = trace(lambda net: net.head(net.hidden(X)[~MASK]).mean())
    result.refuse_different_cuts(result, other)
    assert [cut.refusal is None for cut in result.cuts.values()] == [True, True, False]
    assert "depends on values of the batch" in str(result.cuts[3].refusal)


def test_calls_that_depend_on_values_of_the_batch_are_found() -> None:
    def step(mask: torch.Tensor) -> Callable[[Any], Any]:
        return lambda net: net.hidden(X, end=2 if mask.any() else 1).mean()

    first, other = trace(step(MASK)), trace(step(MASK & ~MASK))
    assert first.depends_on_values
    assert first.different_call(other) == (1, "blocks.1", "")
    assert first.different_call(trace(step(~MASK))) is None


def test_a_tensor_that_is_filled_becomes_a_ghost() -> None:
    def step(net: Any) -> Any:
        seen, rows = torch.zeros(6, WIDTH), torch.zeros(6, WIDTH)
        seen += net.hidden(X)
        rows[MASK] = seen[MASK]
        rows[0].copy_(seen[1])
        return net.head(rows).mean()

    result = trace(step)
    assert {call.function for call in result.written} == {"zeros"}
    assert all(cut.refusal is None for cut in result.cuts.values())
    assert [value.source for value in result.cuts[3].values] == [("arg", 3, 0)]


class Filling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(x), WIDTH)
        out[MASK] = super().forward(x)[MASK]
        return out


def test_a_tensor_that_a_block_makes_and_fills_is_its_result() -> None:
    def step(net: Any) -> Any:
        return net.head(net.hidden(X)).mean()

    module = Net(step)
    module.blocks = nn.ModuleList(Filling(WIDTH, WIDTH) for _ in range(3))
    result = trace_module(module)
    assert all(cut.refusal is None for cut in result.cuts.values())
    assert [kind for call in result.calls for kind, _ in call.leaves] == ["ghost"] * 4


# ---- reads


def checked(net: Any, x: torch.Tensor) -> torch.Tensor:
    print(f"{x.mean():.3f}", x.norm().item())  # noqa: T201 -- as users do
    assert not torch.isnan(x).any()
    assert torch.isfinite(x).all()
    assert (x.abs() < 100).all()
    assert x.norm() < 1e3
    if x.max() > 1e6 or x.min().item() < -1e6:
        raise ValueError("it diverges")
    torch.testing.assert_close(x, x.clone())
    net.log("norm", float(x.norm()))
    return torch.distributions.Normal(x, F.softplus(x)).mean


def test_checks_prints_and_logs_decide_nothing(capsys: pytest.CaptureFixture) -> None:
    result = trace(lambda net: net.head(net.hidden(checked(net, net.blocks[0](X)), 1)).mean())
    assert all(cut.refusal is None for cut in result.cuts.values())
    assert result.answers
    assert capsys.readouterr().out == "", "a dry run prints nothing"


def kept(net: Any, x: torch.Tensor) -> torch.Tensor:
    net.kept.append(x.norm().item())
    return x


def branch(net: Any, x: torch.Tensor) -> torch.Tensor:
    return x / 2 if x.norm() > 1000 else x


def scaled_and_checked(net: Any, x: torch.Tensor) -> torch.Tensor:
    bad, norm = x.isnan().any().item(), x.norm().item()
    if bad:
        raise ValueError("it diverges")
    return x * norm


@pytest.mark.parametrize(
    "use",
    [
        kept,
        branch,
        scaled_and_checked,
        lambda net, x: x * float(x.norm()),
        lambda net, x: x * torch.tensor(x.norm().item()),
        lambda net, x: x + [0.5, 0.25, 0.125][int(x.argmax() % 3)],
        lambda net, x: x[x[:, 0] > 0],
    ],
)
def test_a_value_that_decides_something_forbids_the_cuts_after_it(use: Any) -> None:
    result = trace(lambda net: net.head(net.hidden(use(net, net.hidden(X, end=2)), 2)).mean())
    assert result.cuts[1].refusal is None
    assert "test_values.py" in str(result.cuts[2].refusal)
    assert "reads the value" in str(result.cuts[2].refusal)


def test_a_value_in_the_result_of_the_step_decides() -> None:
    def step(net: Any) -> Any:
        x = net.hidden(X, end=2)
        norm = x.norm().item()
        return {"loss": net.head(net.hidden(x, 2)).mean(), "norm": norm}

    assert "reads the value" in str(trace(step).cuts[2].refusal)


@pytest.mark.parametrize(
    "metric",
    [
        lambda out: metrics.accuracy(out.softmax(1), LABELS, task="multiclass", num_classes=4),
        lambda out: metrics.f1_score(out.argmax(1), LABELS, task="multiclass", num_classes=4),
        lambda out: metrics.auroc(out.softmax(1), LABELS, task="multiclass", num_classes=4),
        lambda out: metrics.accuracy(out[:, 0].sigmoid(), MASK.long(), task="binary"),
        lambda out: metrics.accuracy(out.sigmoid(), (Y > 0).long(), task="multilabel", num_labels=4),
        lambda out: metrics.pearson_corrcoef(out[:, 0], Y[:, 0]),
        lambda out: torch.tensor(float(len(torch.unique(out.argmax(1))))),
        lambda out: torch.bincount(out.argmax(1), minlength=4).max(),
    ],
)
def test_metrics_are_computed_in_inference_mode_or_not(metric: Any) -> None:
    def step(net: Any) -> Any:
        out = net.head(net.hidden(X))
        with torch.inference_mode():
            net.log("inside", metric(out))
        net.log("outside", round(float(metric(out)), 2))
        return F.cross_entropy(out, LABELS)

    assert all(cut.refusal is None for cut in trace(step).cuts.values())


class Checked(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not torch.isnan(x).any()
        assert x.abs().mean() > 0.5, "random values are smaller"
        assert torch.isfinite(self.weight).all()
        return super().forward(x)


def test_a_block_whose_checks_fail_on_random_values_runs_on_ghosts() -> None:
    def step(net: Any) -> Any:
        return net.head(net.hidden(X)).mean()

    module = Net(step)
    module.blocks = nn.ModuleList(Checked(WIDTH, WIDTH) for _ in range(3))
    result = trace_module(module)
    assert [call.concrete for call in result.calls] == [True, False, False, False], "the first has real arguments"
    assert all(cut.refusal is None for cut in result.cuts.values())


# ---- failures


def test_an_error_names_the_line_and_the_layouts() -> None:
    with pytest.raises(
        PartitionError, match=r"test_values.py:\d+ \(broken\) with KeyError: 'missing'.* `dp` and `fsdp`"
    ):
        trace(broken)


def broken(net: Any) -> Any:
    return {}["missing"]


def test_a_step_that_fails_runs_again_as_at_the_first_batch() -> None:
    found: list[Any] = []

    @contextmanager
    def begun() -> Any:
        module.__dict__["outputs"] = []
        yield

    def step(net: Any) -> Any:
        net.outputs.append(1)
        found.append(net.outputs)
        return net.head(net.hidden(X)).mean()

    module = Net(step)
    trace_module(module, ready=begun, learn_state=False)
    assert found == [[1]]
    assert "outputs" not in vars(module), "what the hooks have set is undone"
