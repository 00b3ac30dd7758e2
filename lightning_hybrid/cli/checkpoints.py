"""`check` and `consolidate`: commands on the folder of a checkpoint, which import torch after their arguments."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning_hybrid.cli.errors import ArgumentParser, CommandError
from lightning_hybrid.spec.errors import CheckpointError


def check(name: str, args: list[str]) -> None:
    """Checks the files of a checkpoint against the checksums in its manifest."""
    parser = _parser(name, "Checks the files of a checkpoint against the checksums in its manifest.")
    sys.stdout.write(f"{_call('verify', parser.parse_args(args))}\n")


def consolidate(name: str, args: list[str]) -> None:
    """Writes a checkpoint as a single file."""
    parser = _parser(name, "Writes a sharded checkpoint as a single file.")
    parser.add_argument(
        "out", type=Path, help="the file to write; with the suffix .safetensors weights only, otherwise a checkpoint"
    )
    parser.add_argument("--weights_only", action="store_true", help="leave out optimizers, callbacks and loops")
    parser.add_argument("--trust_pickle", action="store_true", help="run pickles, which can execute any code")
    _call("consolidate", parser.parse_args(args))


def _parser(name: str, description: str) -> ArgumentParser:
    parser = ArgumentParser(prog=f"lightning-hybrid {name}", description=description)
    parser.add_argument("checkpoint", type=Path, help="the checkpoint's folder")
    return parser


def _call(function: str, arguments: Namespace) -> Any:
    from lightning_hybrid.checkpoint import consolidate as checkpoints

    try:
        return getattr(checkpoints, function)(**vars(arguments))
    except CheckpointError as error:
        raise CommandError(str(error)) from None
