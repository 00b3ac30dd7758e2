"""Finds checkpoints, verifies them on all ranks together, and converts them to Lightning's checkpoint dict."""

from __future__ import annotations

import pickle
import platform
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_hybrid._lightning_private import is_overridden
from lightning_hybrid.checkpoint.files import candidates, not_a_checkpoint
from lightning_hybrid.checkpoint.reader import HYPER_PARAMETERS, OPTIMIZER_STATES, SavedCheckpoint, newest_first, whole
from lightning_hybrid.collectives import gather_objects
from lightning_hybrid.spec.errors import CheckpointError
from lightning_hybrid.spec.layout import Layout


def manifest_facts(checkpoint: Mapping[str, Any], layout: Layout, **more: Any) -> dict[str, Any]:
    """Returns the entries of the manifest that describe a checkpoint."""
    return {
        "step": checkpoint.get("global_step", 0),
        "epoch": checkpoint.get("epoch", 0),
        "layout": str(layout),
        "seconds": time.time(),
        "versions": {
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
        **more,
    }


# ---- selection


def valid_checkpoints(folders: Sequence[Path]) -> list[Path]:
    """Returns the checkpoints in `folders`, newest first: sharded ones by step, then Lightning's files by time."""
    found = [path for folder in folders for path in candidates(folder)]
    folders_found = [path for path in found if path.is_dir()]
    ours = newest_first(folders_found)
    for path in set(folders_found) - set(ours):
        rank_zero_warn(f"{path} is skipped: its manifest is damaged.")
    plain = sorted((p for p in found if p.is_file()), key=lambda p: p.stat().st_mtime, reverse=True)
    return [*ours, *plain]


def open_first(paths: Sequence[Path], trust_pickle: bool) -> SavedCheckpoint | dict[str, Any]:
    """Opens the first of `paths` that is intact on all ranks, which verify its files together. Collective.

    Returns:
        A sharded checkpoint, or the content of a file of Lightning.

    Raises:
        CheckpointError: If none is intact; the message lists the problems of the first.
    """
    refused: list[str] = []
    for path in paths:
        opened, problems = _open(path, trust_pickle)
        found = list(dict.fromkeys(p for of_rank in gather_objects(problems) for p in of_rank))
        if not found and opened is not None:
            if refused:
                rank_zero_warn(f"{refused[0]} Resuming from {path} instead, the newest checkpoint that is intact.")
            return opened
        refused.append(" ".join(found))
    raise CheckpointError(refused[0] if refused else "There is no checkpoint.")


def _open(path: Path, trust_pickle: bool) -> tuple[SavedCheckpoint | dict[str, Any] | None, list[str]]:
    try:
        if path.is_file():
            return _plain(path, trust_pickle), []
        saved = SavedCheckpoint(path, trust_pickle)
        names = sorted(saved.files)[dist.get_rank() :: dist.get_world_size()]
        return saved, saved.problems(names)
    except CheckpointError as error:
        return None, [str(error)]


def _plain(path: Path, trust_pickle: bool) -> dict[str, Any]:
    """Returns the content of a checkpoint file of Lightning; tensors are memory-mapped."""
    problem = not_a_checkpoint(path)
    if problem is not None:
        raise CheckpointError(problem)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is a pickle that contains more than plain data, and unpickling can run any code "
            f"({str(error).splitlines()[0]}). If you trust the file, pass "
            "`checkpoints=CheckpointOptions(trust_pickle=True)` to the strategy."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        first = str(error).partition(". ")[0].splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: {type(error).__name__}: {first}. Use an earlier checkpoint, or "
            '`ckpt_path="last"`.'
        ) from error
    missing = [k for k in ("state_dict", "pytorch-lightning_version") if k not in dict.fromkeys(content)]
    if missing:
        raise CheckpointError(
            f"{path} has no `{missing[0]}`, so it is no checkpoint of Lightning. If it has weights only, load them by "
            f"`module.load_state_dict(torch.load({str(path)!r}))` before `fit`."
        )
    return content


# ---- as Lightning's dict


def as_lightning(saved: SavedCheckpoint, trainer: pl.Trainer, layout: Layout) -> dict[str, Any]:
    """Returns the checkpoint dict that Lightning restores from; weights are `SavedTensor`s, read when used.

    If the module or a callback has a hook `on_load_checkpoint`, the model's weights are whole tensors instead.
    """
    checkpoint = saved.document(0, leave_out_pickles=HYPER_PARAMETERS)
    same = saved.about["layout"] == str(layout) and saved.world_size == dist.get_world_size()
    if same and dist.get_rank() > 0:
        checkpoint |= saved.document(dist.get_rank())
    elif not same:
        checkpoint.pop("local_steps", None)
    hooked = is_overridden("on_load_checkpoint", trainer.lightning_module) or any(
        type(callback).on_load_checkpoint is not pl.Callback.on_load_checkpoint
        for callback in trainer.callbacks  # type: ignore[attr-defined] -- set by a connector
    )
    for group in saved.model_groups:
        members = saved.group(group)
        checkpoint[group] = {name: whole(value) for name, value in members.items()} if hooked else members
    for i, optimizer in enumerate(checkpoint.get(OPTIMIZER_STATES, [])):
        optimizer["state"] = saved.optimizer_entries(i)
    return checkpoint
