"""Converts a checkpoint to a single file, for `LightningModule.load_from_checkpoint` or other programs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lightning_hybrid.checkpoint.files import STAGED
from lightning_hybrid.checkpoint.reader import OPTIMIZER_STATES, SavedCheckpoint, SavedTensor, whole
from lightning_hybrid.spec.errors import CheckpointError


def consolidate(checkpoint: Path, out: Path, *, weights_only: bool = False, trust_pickle: bool = False) -> None:
    """Writes a checkpoint as a single file.

    Args:
        checkpoint: The checkpoint's folder.
        out: The file to write. With the suffix `.safetensors` it holds the weights only, otherwise a checkpoint of
            Lightning, which `LightningModule.load_from_checkpoint` and `Trainer.fit(ckpt_path=...)` read.
        weights_only: Whether to leave out the states of optimizers, callbacks and loops.
        trust_pickle: Whether to run pickles in the checkpoint, which can execute any code.

    Raises:
        CheckpointError: If the checkpoint is damaged, or `out` exists.
    """
    if out.exists():
        raise CheckpointError(f"`out` must not exist. Got {out}, which does. Remove it, or choose another path.")
    saved = SavedCheckpoint(checkpoint, trust_pickle)
    problems = saved.problems()
    if problems:
        raise CheckpointError(" ".join(problems))
    passing = out.with_name(out.name + STAGED)
    if out.suffix == ".safetensors":
        tensors = {n: v.read() for n, v in saved.group("state_dict").items() if isinstance(v, SavedTensor)}
        # weights with two names are written twice, since the format has no references
        save_file({n: v.clone() for n, v in tensors.items()}, passing, metadata={"format": "pt"})
    else:
        torch.save(as_one_process(saved, weights_only), passing)
    os.replace(passing, out)


def verify(checkpoint: Path) -> str:
    """Verifies all files of a checkpoint against the checksums in its manifest.

    Args:
        checkpoint: The checkpoint's folder.

    Returns:
        A line that describes the checkpoint.

    Raises:
        CheckpointError: If the checkpoint is damaged; names each damaged file and the rank that wrote it.
    """
    saved = SavedCheckpoint(checkpoint)
    problems = saved.problems()
    if problems:
        raise CheckpointError("\n".join(problems))
    size = sum(file["bytes"] for file in saved.files.values())
    return (
        f"{checkpoint} is intact: step {saved.step}, epoch {saved.about['epoch']}, layout {saved.about['layout']}, "
        f"{saved.world_size} ranks, {size / 2**20:.1f} MiB."
    )


def as_one_process(saved: SavedCheckpoint, weights_only: bool = False) -> dict[str, Any]:
    """Returns the checkpoint dict that Lightning would have saved in a single process."""
    checkpoint = saved.document(0)
    for key in ("names", "aliases", "streams", "local_steps", "verified"):  # not part of Lightning's format
        checkpoint.pop(key, None)
    for group in saved.model_groups:
        checkpoint[group] = {name: whole(value) for name, value in saved.group(group).items()}
    if weights_only:
        for key in (OPTIMIZER_STATES, "lr_schedulers", "callbacks", "loops"):
            checkpoint.pop(key, None)
        return checkpoint
    for i, optimizer in enumerate(checkpoint.get(OPTIMIZER_STATES, [])):
        entries = saved.optimizer_entries(i)
        order = [name for group in optimizer["param_groups"] for name in group["params"]]
        number = {name: j for j, name in enumerate(order)}
        optimizer["state"] = {
            number[name]: {key: whole(value) for key, value in entries[name].items()}
            for name in order
            if name in entries
        }
        for group in optimizer["param_groups"]:
            group["params"] = [number[name] for name in group["params"]]
    return checkpoint
