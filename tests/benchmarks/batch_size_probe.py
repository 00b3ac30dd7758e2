"""A network that runs out of memory above an injected limit of samples, and a record of what happens to it.

Needs torch alone: it also runs in the environments of other tools.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

JOB = "BATCH_SIZE_JOB"
"""Environment variable: the job as JSON. It also reaches processes that a tool's own launcher starts."""
READY = "ready"
"""Event: the tool is imported."""
STEPS = 8
"""Of the training that follows the search. DeepSpeed's autotuner needs seven to take a time."""
SAMPLES = 8192
"""Enough for `STEPS` of 512 samples on each of two ranks."""
SEED = 1
FEATURES, WIDTH = 16, 32


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one search is asked for."""

    tool: str
    """Name of a function in `TOOLS`."""
    layout: str
    """`one`, `ddp`, `fsdp2`, `sharded` (the tool's older or own way to shard) or `pipeline`."""
    limits: Sequence[int]
    """Samples that fit, for each rank."""
    maximum: int
    """Largest size to try, in whatever way the tool calls it."""
    folder: str
    """Of the files that the ranks write."""
    size: int | None = None
    """Trains at this size, without a search."""


class Log:
    """What one rank does, as lines of JSON; several processes in turn may append to the file of a rank."""

    def __init__(self, folder: str, rank: int) -> None:
        self._path = Path(folder) / f"rank{rank}.jsonl"

    def __call__(self, event: str, **values: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")

    def last_error(self) -> str:
        """Of the processes that wrote to this file before."""
        lines = [json.loads(line) for line in self._path.read_text().splitlines()] if self._path.exists() else []
        return next((line["text"] for line in reversed(lines) if line["event"] == "error"), "no error")


class Probe:
    """Runs out of memory above the limit, and notes the state before and after the first step of the training."""

    def __init__(self, job: Job, rank: int) -> None:
        self.log = Log(job.folder, rank)
        self.optimizer: torch.optim.Optimizer | None = None
        self.searching = False
        """A trial, apart from the training. Two tools have no such thing: they retry the training itself."""
        self.dry = False
        """A run on tensors without storage, which needs no memory."""
        self._limit = job.limits[rank]
        self._record_state = job.layout == "one"
        self._before: dict[str, str] | None = None
        self._last: tuple[int, bool] | None = None
        self._done = {"before": False, "after": False}

    def step_starts(self, model: nn.Module, x: Tensor) -> None:
        """Before the network does anything with a batch."""
        if self._record_state and not self.searching and not self._done["before"]:
            self._before = {
                "weights": digest(model.state_dict()),
                "optimizer": digest(self.optimizer.state_dict()["state"] if self.optimizer else {}),
                "RNG": digest(torch.get_rng_state()),
                "data": digest(x),
            }

    def allocate(self, samples: int) -> None:
        """In the middle of the network.

        Raises:
            torch.OutOfMemoryError: If there are more samples than fit.
        """
        if self.dry:
            return
        fits = samples <= self._limit
        if (samples, fits) != self._last:
            self._last = samples, fits
            self.log("try", size=samples, fits=fits)
        if not fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if self._before is not None and not self._done["before"]:
            self._done["before"] = True
            self.log("state", **self._before)

    def step_ends(self, model: nn.Module) -> None:
        """After the optimizer."""
        if self._record_state and not self.searching and not self._done["after"]:
            self._done["after"] = True
            self.log("state", **{"next step": digest(model.state_dict())})

    def found(self, size: int) -> None:
        """The search has an answer."""
        self._last = None
        self.log("found", size=int(size))


def digest(value: Any) -> str:
    """Of tensors and whatever holds them."""
    if isinstance(value, Tensor):
        value = hashlib.sha1(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    elif isinstance(value, Mapping):
        value = [(str(key), digest(part)) for key, part in value.items()]
    return hashlib.sha1(repr(value).encode()).hexdigest()


class Limit(nn.Module):
    """Takes no memory itself."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe = probe

    def forward(self, x: Tensor) -> Tensor:
        """The input, if it fits."""
        self.probe.allocate(len(x))
        return x


class Network(nn.Module):
    """Draws random numbers, then runs out of memory."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers(probe))
        self.probe = probe

    def forward(self, x: Tensor) -> Tensor:
        """One number for each sample."""
        self.probe.step_starts(self, x)
        return self.layers(x)


def layers(probe: Probe) -> list[nn.Module]:
    """The network's parts, in order."""
    return [nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Dropout(0.1), Limit(probe), nn.Linear(WIDTH, 1)]


def samples() -> TensorDataset:
    """The same for all."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, FEATURES, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """The same for all."""
    return torch.optim.Adam(model.parameters(), lr=1e-3)
