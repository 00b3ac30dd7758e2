"""A user's own mixture of experts, and runs of it, for the tests of expert parallelism; they run on every rank."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import grad_norm
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_hybrid.ghosts.ghost import Ghost
from tests.distributed.jobs import WIDTH, Numbers, quiet, trainer_for, weights

EXPERTS, CHOSEN, HIDDEN = 4, 2, 24


class UserExperts(nn.Module):
    """Fused experts with names, order and a loop of their own; nothing of ours and nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.n_experts = EXPERTS
        self.first = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / WIDTH**0.5)
        self.first_bias = nn.Parameter(torch.zeros(EXPERTS, HIDDEN))
        self.second = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / HIDDEN**0.5)

    def forward(self, chosen, x, *, share):
        out = torch.zeros_like(x)
        for e in range(self.n_experts):
            token, slot = torch.where(chosen == e)
            inner = torch.tanh(x[token] @ self.first[e] + self.first_bias[e])
            out = out.index_add(0, token, (inner @ self.second[e]) * share[token, slot, None])
        return out


class Coupled(UserExperts):
    """Tokens of an expert depend on each other: not to be divided."""

    def forward(self, chosen, x, *, share):
        return super().forward(chosen, x - x.mean(0), share=share)


class Counting(UserExperts):
    """Counts what comes to this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.came = 0

    def forward(self, chosen, x, *, share):
        if torch.is_grad_enabled():
            self.came += len(x)
        return super().forward(chosen, x, share=share)


class MixtureBlock(nn.Module):
    def __init__(self, experts: type[UserExperts], chosen: int) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts, self.chosen = experts(), chosen

    def forward(self, x):
        share, chosen = self.router(x).softmax(-1).topk(self.chosen, dim=-1)
        return x + self.experts(chosen, x, share=share)


_EXPERTS: dict[str, type[UserExperts]] = {"UserExperts": UserExperts, "Coupled": Coupled, "Counting": Counting}


class Mixture(L.LightningModule):
    """A classifier with blocks of experts.

    Args:
        lazy: Build in `configure_model`.
        favorite: Every token goes to the first experts, so that some ranks get none.
        experts: The class of the experts.
        adamw: AdamW instead of SGD.
        blocks: Number of blocks.
        manual: Manual optimization.
        chosen: Experts of each token.
        accumulates: Batches per step with manual optimization.
    """

    stem: Any
    blocks: Any
    head: Any

    def __init__(
        self,
        lazy: bool = False,
        favorite: bool = False,
        experts: str = "UserExperts",
        adamw: bool = False,
        blocks: int = 4,
        manual: bool = False,
        chosen: int = CHOSEN,
        accumulates: int = 1,
    ) -> None:
        super().__init__()
        self.stem, self._options = None, (favorite, _EXPERTS[experts], blocks, chosen)
        self.adamw, self.automatic_optimization, self.accumulates = adamw, not manual, accumulates
        if not lazy:
            self._build()

    def _build(self) -> None:
        favorite, experts, blocks, chosen = self._options
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(MixtureBlock(experts, chosen) for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 4)
        for block in self.blocks if favorite else ():
            nn.init.constant_(block.router.bias[:chosen], 20.0)

    def configure_model(self):
        if self.stem is None:
            self._build()

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch["x"]), batch["y"])
        self.log("loss", loss, on_step=True, on_epoch=True)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            if batch_idx % self.accumulates == 0:
                optimizer.zero_grad()
            self.manual_backward(loss)
            if batch_idx % self.accumulates == self.accumulates - 1:
                optimizer.step()
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.cross_entropy(self(batch["x"]), batch["y"]))

    def configure_optimizers(self):
        if self.adamw:
            return torch.optim.AdamW(self.parameters(), lr=0.01, eps=1e-4)
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stream(IterableDataset):
    """The samples one after another, without an index."""

    def __init__(self, count: int) -> None:
        self._samples = Numbers(count)

    def __iter__(self):
        return (self._samples[i] for i in range(len(self._samples)))


class Observer(L.Callback):
    """What a rank holds, loads of the experts, norms of the gradients."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.loads: list[dict[str, list[int]]] = []
        self.norms: list[dict[str, float]] = []

    def on_train_start(self, trainer, pl_module):
        local = pl_module.named_parameters()
        self.shapes = {n: tuple(getattr(p, "_local_tensor", p).shape) for n, p in local if not isinstance(p, Ghost)}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        strategy: Any = trainer.strategy
        self.norms.append({k: float(v) for k, v in strategy.gradient_norms().items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        strategy: Any = trainer.strategy
        self.loads.append({k: v.tolist() for k, v in strategy.expert_loads().items()})


class CountLoads(L.Callback):
    """Loads and gradient norms of one process, by other means."""

    def __init__(self, module: Mixture) -> None:
        self.loads: list[dict[str, list[int]]] = []
        self.norms: list[dict[str, float]] = []
        self._now: dict[str, list[int]] = {}
        for name, child in module.named_modules():
            if isinstance(child, UserExperts):
                child.register_forward_pre_hook(lambda _, args, name=name: self._count(name, args[0]))

    def _count(self, name, chosen):
        if torch.is_grad_enabled():
            self._now[name] = [int((chosen == e).sum()) for e in range(EXPERTS)]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        norms = grad_norm(pl_module, 2)
        self.norms.append({k: float(v) for k, v in norms.items()})

    def on_train_batch_end(self, *_):
        self.loads.append(self._now)
        self._now = {}


def fit(
    layouts: str | None,
    module_options: dict[str, Any] | None = None,
    *,
    samples: int = 48,
    stream: bool = False,
    save: str | None = None,
    ckpt_path: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains one module under one layout, or several one after the other (`"ep2, dp2"`); None: in one process."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Mixture(**(module_options or {}))
    observer: Any = None
    for layout in [None] if layouts is None else layouts.split(", "):
        observer = CountLoads(module) if layout is None else Observer()
        trainer, replicas = trainer_for(layout, callbacks=[observer], **options)
        size = 16 // replicas
        data = Stream(samples) if stream else Numbers(samples)
        loaders = DataLoader(data, batch_size=size), DataLoader(Numbers(16), batch_size=size)
        trainer.fit(module, *loaders, ckpt_path=ckpt_path, weights_only=False)
    if save is not None:
        trainer.save_checkpoint(save)
    return {
        "weights": weights(trainer, module),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "loads": observer.loads,
        "norms": observer.norms,
        "shapes": getattr(observer, "shapes", {}),
    }
