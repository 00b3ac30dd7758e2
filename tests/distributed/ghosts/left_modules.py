"""Modules whose blocks leave values in other places than their results, or show parts of their channels."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- as users import it

from tests.distributed.ghosts.modules import WIDTH, Plain


class Block(nn.Module):
    def __init__(self, between: Any = torch.tanh) -> None:
        super().__init__()
        self.up, self.down, self.between = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), between

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.between(self.up(x)))


class Blocks(Plain):
    """Blocks of the class `block`."""

    block: Any = Block

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.block() for _ in range(4))


class WrittenBatch(Blocks):
    """The step writes into its batch, of which autograd keeps a tensor."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch["x"].mul_(0.5).clamp_(-1, 1)
        batch["y"][:, 0] = 0
        return super().training_step(batch, batch_idx)


class _Auxiliary(Block):
    penalty: Any = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.between(self.up(x))
        self.penalty = hidden.square().mean()
        return x + self.down(hidden)


class Auxiliary(Blocks):
    """Blocks leave a loss in an attribute."""

    block = _Auxiliary

    def loss_of(self, out: Tensor, batch: Any) -> Any:
        found: list[Any] = [m.penalty for m in self.modules() if getattr(m, "penalty", None) is not None]
        return F.mse_loss(out, batch["y"]) + 0.1 * torch.stack(found).sum()


class _Routed(Block):
    penalty: Any = None

    def forward(self, x: Tensor) -> Tensor:
        count = int((x.detach()[:, 0] > 0).sum())
        rows = torch.arange(count)
        self.penalty = {"square": x.square().mean()}
        return x.index_add(0, rows, self.down(self.between(self.up(x[rows]))))


class Routed(Blocks):
    """Blocks read values, and leave a loss in a dictionary in an attribute."""

    block = _Routed

    def loss_of(self, out: Tensor, batch: Any) -> Any:
        blocks: Any = self.blocks
        return F.mse_loss(out, batch["y"]) + 0.1 * sum(block.penalty["square"] for block in blocks)


class _Keeps(Block):
    last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


class Keeps(Blocks):
    """Blocks leave their result in an attribute, too."""

    block = _Keeps

    def loss_of(self, out: Tensor, batch: Any) -> Any:
        blocks: Any = self.blocks
        return F.mse_loss(out, batch["y"]) + 0.1 * (blocks[0].last - blocks[3].last).square().mean()


class _Appends(Block):
    def forward(self, x: Tensor, states: Any = None, values: Any = None) -> Tensor:
        x = super().forward(x)
        states.append(x)
        values["sum"] = values.get("sum", 0) + x.square().mean()
        return x


class Appends(Blocks):
    """Blocks append to a list, and add to a value in a dictionary."""

    block = _Appends

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        states: list[Tensor] = []
        values: dict[str, Any] = {}
        x = batch["x"]
        for block in self.blocks:
            x = block(x, states, values=values)
        loss = F.mse_loss(self.head(torch.stack(states).mean(0)), batch["y"]) + 0.1 * values["sum"]
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss


@dataclass
class _State:
    hidden: Tensor
    states: list[Tensor]
    gate: Any = None
    depth: int = 0


class _OfState(Block):
    def forward(self, x: Any) -> Any:
        hidden = super().forward(x.hidden)
        return _State(hidden, [*x.states, hidden], hidden.mean(1) if x.depth == 1 else x.gate, x.depth + 1)


class States(Blocks):
    """Blocks take and return a dataclass, which has their result twice."""

    block = _OfState

    def forward(self, x: Tensor) -> Tensor:
        state = _State(x, [])
        for block in self.blocks:
            state = block(state)
        return self.head(torch.stack(state.states).mean(0)) + state.gate[:, None] / state.depth


class _Named(NamedTuple):
    hidden: Tensor
    states: tuple[Tensor, ...]


class _OfNamed(Block):
    def forward(self, x: Any) -> Any:
        hidden = super().forward(x.hidden)
        return _Named(hidden, (*x.states, hidden))


class Names(Blocks):
    """Blocks of a sequence take and return a named tuple, which has their result twice."""

    block = _OfNamed

    def forward(self, x: Tensor) -> Tensor:
        state = nn.Sequential(*self.blocks)(_Named(x, ()))
        return self.head(torch.stack(state.states).mean(0))


class _Cached(Block):
    def forward(self, x: Tensor, cache: Any = None, key: int = 0) -> Tensor:
        out = super().forward(x + 0.1 * cache[key][0] if key in cache else x) * 0.5
        cache[key] = (out, x)
        return out


class Cached(Blocks):
    """Blocks find in a dictionary what they have left there in an earlier call."""

    block = _Cached

    def forward(self, x: Tensor) -> Tensor:
        cache: dict[int, Any] = {}
        for _ in range(2):
            for key, block in enumerate(self.blocks):
                x = block(x, cache, key)
        return self.head(x)


class Follows(Blocks):
    """The step assigns the data of a teacher's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.blocks).requires_grad_(False)

    def loss_of(self, out: Tensor, batch: Any) -> Any:
        with torch.no_grad():
            for new, old in zip(self.blocks.parameters(), self.teacher.parameters(), strict=True):
                old.data = old.data * 0.5 + new.data * 0.5
        x = batch["x"]
        for block in self.teacher:
            x = block(x)
        return F.mse_loss(out, batch["y"]) + 0.1 * F.mse_loss(out, self.head(x.detach()))


class Assigns(Blocks):
    """A teacher follows by assigned data after each update, in a hook that no dry run runs."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.blocks).requires_grad_(False)

    def loss_of(self, out: Tensor, batch: Any) -> Any:
        x = batch["x"]
        for block in self.teacher:
            x = block(x)
        return F.mse_loss(out, batch["y"]) + 0.1 * F.mse_loss(out, self.head(x))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        for new, old in zip(self.blocks.parameters(), self.teacher.parameters(), strict=True):
            old.data = old.data * 0.5 + new.data * 0.5


class Adaptive(Blocks):
    """A value decides how often the last blocks run."""

    def forward(self, x: Tensor) -> Tensor:
        blocks: Any = self.blocks
        x = blocks[1](blocks[0](x))
        for _ in range(6):
            x = 0.6 * blocks[3](blocks[2](x))
            if x.abs().mean().item() < 0.3 * (1 + self.global_step % 3):
                break
        return self.head(x)


# ---- what tensor parallelism would show


class Bounded(Blocks):
    """Bounds on all channels, which only the later batches reach."""

    def __init__(self) -> None:
        super().__init__()
        bounds = [
            lambda h: h * (30 / (h.norm(dim=-1, keepdim=True) + 1e-6)).clamp(max=1),
            lambda h: h * (h.abs().mean(-1, keepdim=True) < 10),
            lambda h: h if h.abs().max() < 40 else h / 10,
        ]
        self.blocks = nn.ModuleList(Block(bound) for bound in [torch.tanh, *bounds])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 4.0 ** (self.global_step % 3)) * 0.01


class Different(Blocks):
    """Blocks of one class with different functions between their linears, some of them over all channels."""

    def __init__(self) -> None:
        super().__init__()
        functions = [torch.tanh, lambda h: h.softmax(-1), torch.relu, lambda h: h.flip(-1)]
        self.blocks = nn.ModuleList(Block(function) for function in functions)


class Hooked(Blocks):
    """Forward hooks inside of blocks, and on the head and an embedding, use what they see in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}
        self.embedding = nn.Embedding(4, 4)
        blocks: Any = self.blocks
        hooked = {"up": blocks[1].up, "down": blocks[2].down, "head": self.head, "embedding": self.embedding}
        for name, module in hooked.items():
            module.register_forward_hook(partial(self.see, name))

    def see(self, name: str, module: nn.Module, args: Any, out: Tensor) -> None:
        self.seen[name] = out

    def loss_of(self, out: Tensor, batch: Any) -> Any:
        out = out + self.embedding(batch["label"])
        return F.mse_loss(out, batch["y"]) + 0.1 * sum(value.abs().mean() for value in self.seen.values())
