"""LightningModules whose values cross pipeline stages in unusual ways, and loaders of unusual batches."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

D = 16
SAMPLES = 24


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Net(L.LightningModule):
    """Four blocks and a head on rows of numbers."""

    lr = 0.2

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def loss_of(self, batch: Any) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss_of(batch)
        self.log("loss", loss, on_epoch=True, on_step=False, batch_size=self.size_of(batch))
        return loss

    def size_of(self, batch: Any) -> int:
        return len(batch[0])

    def on_train_epoch_end(self) -> None:
        self.losses.append(float(self.trainer.callback_metrics["loss"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


# ---- batches


class Graph:
    """A batch of graphs, as of PyTorch Geometric: nodes of all graphs in one tensor."""

    def __init__(self, nodes: Tensor, graph_of: Tensor, targets: Tensor) -> None:
        self.nodes, self.graph_of, self.targets = nodes, graph_of, targets

    def to(self, device: Any, **_: Any) -> Graph:
        return Graph(self.nodes.to(device), self.graph_of.to(device), self.targets.to(device))

    @classmethod
    def of(cls, samples: list[Any]) -> Graph:
        counts = torch.tensor([1 + int(i) % 3 for _, _, i in samples])
        shifts = [torch.arange(c)[:, None] * 0.1 for c in counts.tolist()]
        nodes = torch.cat([x + shift for (x, _, _), shift in zip(samples, shifts, strict=True)])
        return cls(nodes, torch.arange(len(samples)).repeat_interleave(counts), torch.stack([y for _, y, _ in samples]))


class OnGraphs(Net):
    def loss_of(self, batch: Any) -> Tensor:
        out = self(batch.nodes)
        mean = torch.zeros(len(batch.targets), 4).index_add(0, batch.graph_of, out)
        return F.mse_loss(mean, batch.targets)

    def size_of(self, batch: Any) -> int:
        return len(batch.targets)


class BesideTensor(Net):
    def loss_of(self, batch: Any) -> Tensor:
        out = self(batch["x"])
        return F.mse_loss(out, batch["graph"].targets) + out[batch["graph"].graph_of].square().sum() / len(out)

    def size_of(self, batch: Any) -> int:
        return len(batch["x"])


class Lists(Net):
    def loss_of(self, batch: Any) -> Tensor:
        x, picks = batch
        out = self(x)
        return torch.stack([out[j, k] ** 2 for j in range(len(x)) for k in picks[j]]).sum() / len(x)


class Targets(Net):
    """As in detection: a dictionary of tensors of any length for each sample."""

    def loss_of(self, batch: Any) -> Tensor:
        out = self(torch.stack(batch[0]))
        parts = [(row - target["rows"]).square().sum() for row, target in zip(out, batch[1], strict=True)]
        return torch.stack(parts).mean()


@dataclass
class Pair:
    x: Tensor
    y: Tensor
    source: str = "here"

    def to(self, device: Any, **_: Any) -> Pair:
        return Pair(self.x.to(device), self.y.to(device), self.source)


class OnPairs(Net):
    def loss_of(self, batch: Any) -> Tensor:
        assert batch.source == "here"
        return F.mse_loss(self(batch.x), batch.y)

    def size_of(self, batch: Any) -> int:
        return len(batch.x)


class Encoding(UserDict):
    """As the BatchEncoding of transformers, with an attribute."""

    scale = 0.0


class OnEncodings(Net):
    def loss_of(self, batch: Any) -> Tensor:
        return F.mse_loss(self(batch["x"]) * batch.scale, batch["y"])

    def size_of(self, batch: Any) -> int:
        return len(batch["x"])


class Packed(Net):
    def loss_of(self, batch: Any) -> Tensor:
        data = batch[0].data
        return (self(data) - data[:, :4]).square().sum() / len(batch[1])

    def size_of(self, batch: Any) -> int:
        return len(batch[1])


class Sparse(Net):
    def loss_of(self, batch: Any) -> Tensor:
        return F.mse_loss(torch.sparse.mm(batch["adjacent"], self(batch["x"])), batch["y"])

    def size_of(self, batch: Any) -> int:
        return len(batch["x"])


class Views(Net):
    """Two views of each sample, one after the other in one tensor."""

    def loss_of(self, batch: Any) -> Tensor:
        first, second = self(batch).chunk(2)
        return (first * second.detach()).square().mean()

    def size_of(self, batch: Any) -> int:
        return len(batch) // 2


class Tasks(Net):
    """A text in the batch decides which modules are called."""

    def loss_of(self, batch: Any) -> Tensor:
        x = batch["x"]
        for block in self.blocks:
            x = block(x)
        if batch["task"] == "b":
            x = self.blocks[3](x)
        return F.mse_loss(self.head(x), batch["y"])

    def size_of(self, batch: Any) -> int:
        return len(batch["x"])


def _stacked(samples: list[Any]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _, _ in samples]), torch.stack([y for _, y, _ in samples])


def _encoding(samples: list[Any]) -> Encoding:
    x, y = _stacked(samples)
    made = Encoding({"x": x, "y": y})
    made.scale = 2.0
    return made


def _sparse(samples: list[Any]) -> dict[str, Tensor]:
    x, y = _stacked(samples)
    return {"x": x, "y": y, "adjacent": torch.diag(x[:, 0]).to_sparse()}


COLLATES: dict[type[Net], Callable[[list[Any]], Any]] = {
    OnGraphs: Graph.of,
    BesideTensor: lambda samples: {"x": _stacked(samples)[0], "graph": Graph.of(samples)},
    Lists: lambda samples: (_stacked(samples)[0], [[int(i) % 4] * (1 + int(i) % 3) for _, _, i in samples]),
    Targets: lambda samples: (
        [x for x, _, _ in samples],
        [{"rows": y.repeat(1 + int(i) % 3, 1), "index": i} for _, y, i in samples],
    ),
    OnPairs: lambda samples: Pair(*_stacked(samples)),
    OnEncodings: _encoding,
    Packed: lambda samples: (
        nn.utils.rnn.pack_sequence([x.repeat(1 + int(i) % 3, 1) for x, _, i in samples], enforce_sorted=False),
        [int(i) for _, _, i in samples],
    ),
    Sparse: _sparse,
    Views: lambda samples: torch.cat([_stacked(samples)[0], _stacked(samples)[0].roll(1, 1)]),
    Tasks: lambda samples: dict(
        zip(("x", "y", "task"), (*_stacked(samples), "ab"[int(samples[0][2]) // 8 % 2]), strict=True)
    ),
}


def loader_of(kind: type[Net], batch_size: int) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(SAMPLES, D, generator=generator), torch.randn(SAMPLES, 4, generator=generator)
    rows: Any = list(zip(x, y, torch.arange(SAMPLES), strict=True))
    return DataLoader(rows, batch_size=batch_size, collate_fn=COLLATES.get(kind))


# ---- values between stages


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(9, 9, dtype=torch.cfloat) * 0.2)

    def forward(self, z: Tensor) -> Tensor:
        return z + (z @ self.w).conj()


class Complex(Net):
    """Complex weights and activations, in the frequency domain."""

    lr = 0.05

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mix() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.rfft(x, norm="ortho")
        for block in self.blocks:
            z = block(z)
        return self.head(torch.fft.irfft(z, n=D, norm="ortho"))


class Scaled(Net):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (loss * 0.25 * loss.detach()).backward()


class Penalized(Net):
    """Weight decay of the head by hand, before and together with the loss."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        penalty = torch.stack([p.square().sum() for p in self.parameters()]).sum()
        (penalty * 0.01).backward(retain_graph=True)
        (loss + penalty * 0.02).backward()


class Twice(Net):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(retain_graph=True)
        (loss * 0.5).backward()


class Never(Net):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.trainer.global_step % 2 == 0:
            loss.backward()


class PartOnly(Net):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(inputs=[p for p in self.head.parameters() if p.requires_grad])


class Strength(nn.Module):
    """Returns a number, and leaves another in an attribute."""

    strength = last = 0.0

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        self.last = self.strength * 0.5
        return x * 1.0, self.strength


class Number(Net):
    """A number that a module returns, which grows from epoch to epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = Strength()

    def on_train_epoch_start(self) -> None:
        self.enter.strength = float(self.current_epoch)

    def loss_of(self, batch: Any) -> Tensor:
        x, strength = self.enter(batch[0])
        out = self(x)
        return F.mse_loss(out, batch[1]) + strength * out.square().mean()


class SideDoor(Number):
    """A number that a module leaves in an attribute."""

    def loss_of(self, batch: Any) -> Tensor:
        out = self(self.enter(batch[0])[0])
        return F.mse_loss(out, batch[1]) + self.enter.last * out.square().mean()


class Counting(nn.Module):
    """A block with weights that tells how strong its input is, from another module's attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gain = nn.Linear(D, D), 1.0

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        return torch.tanh(self.linear(x)) * self.gain, self.gain


class OfBlocks(Net):
    """Numbers that blocks with weights return, added up."""

    lr = 0.02

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Counting() for _ in range(4))

    def on_train_epoch_start(self) -> None:
        for block in self.blocks:
            block.gain = 1.0 + 0.5 * self.current_epoch  # type: ignore[assignment]

    def loss_of(self, batch: Any) -> Tensor:
        x, total = batch[0], 0.0
        for block in self.blocks:
            x, gain = block(x)
            total += gain
        return F.mse_loss(self.head(x), batch[1]) * total


class Read(nn.Module):
    """A block that returns a number computed from its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        y = torch.tanh(self.linear(x))
        return y, y.abs().mean().item()


class OfValues(OfBlocks):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Read() for _ in range(4))

    def on_train_epoch_start(self) -> None:
        pass


class Flat(Net):
    """A first module without weights, of which nothing is sent."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(D, 64), nn.ReLU(), nn.Linear(64, D), nn.ReLU(), nn.Linear(D, D), nn.Linear(D, 4)
        self.net = nn.Sequential(nn.Flatten(), *layers)
        del self.blocks, self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, :, None])


# ---- values of code outside modules


class Subtracted(Net):
    """As N-BEATS: each block takes its part of the rest, and adds to the forecast."""

    def forward(self, x: Tensor) -> Tensor:
        rest, forecast = x, 0
        for block in self.blocks:
            out = block(rest)
            rest = rest - out
            forecast = forecast + out.mean(1, keepdim=True)
        return self.head(rest) + forecast


class Residual(Net):
    """Residual connections, and a weight outside of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        h = x * self.scale
        for block in self.blocks:
            with torch.no_grad():
                reach = h.abs().amax(1, keepdim=True)
            h = h + block(h) / reach
        return self.head(h)


class Skips(Net):
    """As a U-Net: halves of the blocks see each other's results, and a list is concatenated at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * D, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.blocks[0](x) * 2
        b = self.blocks[1](a).tanh()
        kept = [a.relu(), b.sigmoid()]
        c = self.blocks[2](b + x) + b
        d = self.blocks[3](c) + a
        return self.head(torch.cat([d, *kept], 1))


class Written(Net):
    """Blocks add to a tensor of zeros, and write into rows of another."""

    def forward(self, x: Tensor) -> Tensor:
        seen, parts = torch.zeros(len(x), D), torch.empty(4, len(x), D)
        for i, block in enumerate(self.blocks):
            x = block(x)
            seen += x
            parts[i] = x * (i + 1)
        return self.head(seen + parts.prod(0))


class WithTeacher(Net):
    """Frozen blocks called without gradients, between trained ones whose results are used later."""

    lr = 0.02

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.ModuleList(nn.Linear(D, D).requires_grad_(False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h, t = x, x
        for block, teacher in zip(self.blocks, self.teacher, strict=True):
            h = block(h) + h
            with torch.no_grad():
                t = teacher(t + h)
        return self.head(h) + (h - t).square().mean(1, keepdim=True)


class Deviating(Net):
    """Another number of operations outside modules in a later step."""

    def loss_of(self, batch: Any) -> Tensor:
        h = batch[0]
        for block in self.blocks:
            if self.trainer.global_step > 0:
                h = h * 1.0
            h = h * 0.5 + block(h)
        return F.mse_loss(self.head(h), batch[1])


class Chosen(Block):
    def __init__(self) -> None:
        super().__init__()
        self.order = nn.Parameter(torch.arange(D).flip(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, self.order])


class Ordered(Net):
    """A frozen parameter of integers, and one of booleans, inside and outside of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Chosen() for _ in range(4))
        self.kept = nn.Parameter(torch.arange(D) % 3 > 0, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.kept)
