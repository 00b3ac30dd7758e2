"""A training script that saves every second step and is killed in the middle of it, started by `test_saving.py`."""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lightning_hybrid.checkpoint import content
from lightning_hybrid.checkpoint import files as folder
from lightning_hybrid.checkpoint import manifest as writer
from tests.distributed.checkpoint import checkpoint_jobs as jobs
from tests.faults.inject import FailAt
from tests.faults.script import own_rank


def _kill(note: Path) -> None:
    note.write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def inject(phase: str, saves: int, note: Path) -> None:
    """Kills this process in its `saves`-th save, at a phase of it."""
    calls = 0

    def at_last(strike: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return strike(*args, **kwargs) if calls == saves else otherwise(*args, **kwargs)

        return run

    def half_a_file(tensors: dict, path: Path) -> None:
        save_file(tensors, path)
        os.truncate(path, path.stat().st_size // 2)
        _kill(note)

    def between_the_renames(path: Path) -> None:
        os.rename(path, path.with_name(path.name + folder.REPLACED))
        _kill(note)

    if phase == "writing":
        content.save_file = at_last(half_a_file, save_file)
    elif phase == "manifest":
        writer.write_manifest = at_last(lambda *_: _kill(note), writer.write_manifest)
    elif phase == "rename":
        # every save is followed by one of `last.ckpt`, which is there from the second time on
        writer.put_in_place = at_last(between_the_renames, writer.put_in_place)


def main() -> None:
    """Train as the arguments say, and leave the result in a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layout", required=True)
    parser.add_argument("--phase", default="")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--at", type=int, default=0)
    parser.add_argument("--resume", default=None)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--asynchronous", action="store_true")
    options = parser.parse_args()
    (options.out / f"pid{own_rank()}").write_text(str(os.getpid()))
    callbacks: list[Any] = []
    if options.phase and own_rank() == options.rank:
        if options.phase == "step":
            callbacks.append(FailAt(options.rank, options.at, "kill", note=options.out / "struck"))
        else:
            inject(options.phase, options.at, options.out / "struck")
    result = jobs.run(
        options.layout,
        str(options.out / "checkpoints"),
        ckpt_path=options.resume,
        every=2,
        save_last=True,
        workers=options.workers,
        callbacks=callbacks,
        checkpoints={"asynchronous": options.asynchronous},
    )
    torch.save(result, options.out / f"result{own_rank()}.pt")


if __name__ == "__main__":
    main()
