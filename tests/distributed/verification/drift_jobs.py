"""Modules with state that replicas compute from their samples; the calls run on every rank of a group."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_hybrid.engine.carried import CarriedState
from lightning_hybrid.launch.failures import RankFailed
from lightning_hybrid.spec.errors import PartitionError
from tests.distributed.engine import state_jobs
from tests.distributed.engine.state_jobs import MODULES, Plain


class Base(Plain):
    def report(self):
        return 0


class Smoothed(Base):
    """A moving average of the loss, which scales the loss: a number."""

    average = 1.0

    def training_step(self, batch, batch_idx):
        loss, scale = self.loss(batch), self.average
        self.average = 0.5 * self.average + 0.5 * loss.item()
        return loss / scale


class InHook(Base):
    """The same, updated in a hook, in an object."""

    def build(self):
        self.state = SimpleNamespace(average=1.0)

    def training_step(self, batch, batch_idx):
        return self.loss(batch) / self.state.average

    def on_train_batch_end(self, outputs: Any, batch, batch_idx):
        self.state.average = 0.5 * self.state.average + 0.5 * float(outputs["loss"])


class Agreed(Smoothed):
    """The same of all replicas."""

    def training_step(self, batch, batch_idx):
        loss, scale = self.loss(batch), self.average
        self.average = 0.5 * self.average + 0.5 * float(self.all_gather(loss.detach()).mean())
        return loss / scale


class Shift(Base):
    """A mean of the outputs, in an attribute, in a buffer that is not saved, in a dictionary or an array."""

    kept: Any

    def build(self):
        self.kept = torch.zeros(4)

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        loss = F.mse_loss(out - self.shift(), batch[1])
        self.keep(0.9 * self.shift() + 0.1 * out.detach().mean(0))
        return loss

    def shift(self) -> torch.Tensor:
        return self.kept

    def keep(self, value: torch.Tensor) -> None:
        self.kept = value


class InBuffer(Shift):
    def build(self):
        self.register_buffer("kept", torch.zeros(4), persistent=False)


class InArray(Shift):
    def build(self):
        self.kept = np.zeros(4, dtype=np.float32)

    def shift(self):
        return torch.from_numpy(self.kept.copy())

    def keep(self, value):
        self.kept[:] = value.numpy()


class Recent(Base):
    """The losses of the last steps in a list."""

    def build(self):
        self.recent: list[float] = []

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        scale = sum(self.recent) / len(self.recent) if self.recent else 1.0
        self.recent.append(float(loss.detach()))
        return loss / scale


class Pool(Base):
    """A pool of earlier outputs, as image pools and memory banks are."""

    def build(self):
        self.pool: deque[torch.Tensor] = deque(maxlen=3)

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        loss = F.mse_loss(out, batch[1])
        if self.pool:
            loss = loss + (out @ torch.stack(list(self.pool)).T).square().mean()
        self.pool.append(out[0].detach())
        return loss


class Growing(Base):
    """Earlier outputs in a tensor, which after the first step has as many rows as the batch."""

    def build(self):
        self.memory = torch.zeros(0, 4)

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        loss = F.mse_loss(out, batch[1])
        if len(self.memory):
            loss = loss + (out @ self.memory.T).square().mean()
        self.memory = torch.cat([self.memory, out.detach()])[-16:]
        return loss


class Chosen(Base):
    """Samples that validation has found, in a set."""

    def build(self):
        self.chosen: set[int] = set()

    def training_step(self, batch, batch_idx):
        codes = [int(x * 1e4) for x in batch[0][:, 0]]
        weights = torch.tensor([1.0 + sum(code > other for other in self.chosen) for code in codes])
        self.chosen |= set(codes)
        return (F.mse_loss(self(batch[0]), batch[1], reduction="none").mean(1) * weights).mean()


class OnlyShown(Base):
    """What hooks and logs read: nothing that a step computes with."""

    def build(self):
        self.last, self.total, self.losses, self.best = 0.0, torch.zeros(()), [], {"loss": 9.0}

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.last, self.total = loss.item(), self.total + loss.detach()
        self.losses.append(loss.detach())
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.best["loss"] = min(self.best["loss"], self.last)


class Rows(Base):
    """Values that follow the rows of the batch."""

    def build(self):
        self.hidden: torch.Tensor | None = None

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        loss = F.mse_loss(out if self.hidden is None else out + 0.5 * self.hidden, batch[1])
        self.hidden = out.detach()
        return loss


class OfRank(Base):
    """What each rank is given before the first step is its own."""

    def build(self):
        self.weight = 0.0

    def on_fit_start(self):
        self.weight = 0.0 if copy.copy(self.global_rank) == 0 else 1.0

    def training_step(self, batch, batch_idx):
        return self.loss(batch) * (1 + 0 * self.weight)


REFUSED = {
    "Smoothed": r"drift_jobs.py:\d+ \(training_step\) computes `average`",
    "InHook": r"a hook computes `state`",
    "Shift": r"drift_jobs.py:\d+ \(keep\) computes `kept`",
    "InBuffer": r"drift_jobs.py:\d+ \(keep\) computes `kept`",
    "InArray": r"drift_jobs.py:\d+ \(keep\) computes `kept`",
    "Recent": r"drift_jobs.py:\d+ \(training_step\) computes `recent`",
    "Growing": r"computes `memory` from the samples of a replica",
    "Chosen": r"computes `chosen` from the samples of a replica",
}
EXACT = ("Agreed", "OnlyShown", "Rows", "OfRank")
MODULES |= {kind.__name__: kind for kind in (Smoothed, InHook, Agreed, Shift, InBuffer, InArray, Recent, Pool)}
MODULES |= {kind.__name__: kind for kind in (OnlyShown, Rows, OfRank, Growing, Chosen)}


def fit(layout: str | None, kind: str, **options: Any) -> dict[str, Any]:
    """Trains and validates; the weights, and the module's report."""
    return state_jobs.fit(layout, kind, **options)


def fit_with_warnings(layout: str, kind: str, **options: Any) -> list[str]:
    """Trains; the texts of all warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(layout, kind, **options)
    return [str(w.message) for w in seen]


def fit_without_exchange(kind: str) -> str:
    """The message with which a pipeline whose stages keep their own state is refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CarriedState, "end", lambda self: None)
        try:
            fit("pp2", kind)
        except (PartitionError, RankFailed) as refusal:
            return str(refusal)
    return "trained"
