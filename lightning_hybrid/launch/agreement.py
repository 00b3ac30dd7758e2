"""Checks that all ranks run the same program: compares versions, code and arguments at the start."""

from __future__ import annotations

import hashlib
import inspect
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata

import lightning
import lightning.pytorch as pl
import torch

from lightning_hybrid.collectives import gather_objects

_SETTINGS = (
    "max_epochs",
    "max_steps",
    "accumulate_grad_batches",
    "precision",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "limit_val_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "num_sanity_val_steps",
)
"""Arguments of the Trainer that decide which collectives run."""


def facts_of(trainer: pl.Trainer, arguments: Mapping[str, object]) -> dict[str, str]:
    """Returns this rank's facts by name: versions, code, the strategy's arguments and the Trainer's."""
    facts = {
        "the version of Python": platform.python_version(),
        "the version of torch": torch.__version__,
        "the version of lightning": lightning.__version__,
        "the version of lightning-hybrid": metadata.version("lightning-hybrid"),
        "the call": str(trainer.state.fn),
    }
    facts |= {f"`{name}` of the strategy": str(value) for name, value in arguments.items()}
    facts |= {f"`{name}` of the Trainer": str(getattr(trainer, name, None)) for name in _SETTINGS}
    module = type(trainer.lightning_module)
    try:
        code = hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:12]
    except (OSError, TypeError):
        code = "unknown"
    facts[f"the source code of {module.__qualname__} (SHA-256)"] = code
    return facts


def check_facts(facts: Sequence[Mapping[str, str]]) -> None:
    """Compares the facts of all ranks.

    Raises:
        ValueError: If two ranks differ; names the fact and the rank.
    """
    for rank, other in enumerate(facts):
        for name in [*facts[0], *(n for n in other if n not in facts[0])]:
            _compare(name, facts[0].get(name, "nothing"), rank, other.get(name, "nothing"))


def check_parameters(root: pl.LightningModule) -> None:
    """Compares the names, shapes, dtypes and order of the parameters of all ranks. Collective.

    Raises:
        ValueError: If two ranks differ; names the first parameter that differs, or the order.
    """
    own = {n: f"{tuple(p.shape)} {p.dtype}" for n, p in root.named_parameters()}
    digest = hashlib.sha256(repr(list(own.items())).encode()).hexdigest()
    if len(set(gather_objects(digest))) == 1:
        return
    everyone: list[dict[str, str]] = gather_objects(own)
    for rank, other in enumerate(everyone):
        for name in [*everyone[0], *(n for n in other if n not in everyone[0])]:
            _compare(f"parameter `{name}`", everyone[0].get(name, "nothing"), rank, other.get(name, "nothing"))
        _compare("the order of the parameters", str(list(everyone[0])), rank, str(list(other)))


def _compare(name: str, first: str, rank: int, other: str) -> None:
    if first != other:
        raise ValueError(
            f"All ranks must run the same code with the same settings. {name[0].upper()}{name[1:]} is {first} on "
            f"rank 0 and {other} on rank {rank}. Start every rank with the same files, environment and arguments."
        )
