"""The commands of `lightning-hybrid`, and how one of them runs and ends."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType

from lightning_hybrid.cli.errors import CommandError, UsageError, did_you_mean, paragraph
from lightning_hybrid.cli.installed import NAME, version


@dataclass(frozen=True)
class Command:
    """A command of `lightning-hybrid`."""

    name: str
    help: str
    """One line for `lightning-hybrid --help`."""
    place: str
    """`module:function` in this package. The function takes the command's name and the arguments that follow, and
    returns the exit status, or None for 0."""


COMMANDS = (
    Command("fit", "train a model", "training:run"),
    Command("validate", "run the validation loop", "training:run"),
    Command("test", "run the test loop", "training:run"),
    Command("predict", "run the prediction loop", "training:run"),
    Command("verify", "compare training steps in layouts with those of one process", "verify:run"),
    Command("check", "check the files of a checkpoint against their checksums", "checkpoints:check"),
    Command("consolidate", "write a checkpoint as a single file", "checkpoints:consolidate"),
    Command("recipes", "list (ls), copy (cp) and print (show) example configurations", "recipes:run"),
    Command("doctor", "print versions, devices, network and limits, and what a run lacks here", "doctor:run"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command.

    Under a launcher such as torchrun, the first rank of each machine shows the error of a command.

    The status is 1 if a run fails, is refused, or has found a difference or a damaged file, and 2 if the arguments or
    the configuration are wrong. The process of a command line shows errors as `tracebacks.show` does.

    Args:
        argv: Arguments after the program's name; None: the arguments of this process. A launcher starts further
            processes with the arguments of this process, so pass `argv` for a single device only.

    Raises:
        SystemExit: If the status is not 0.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not getattr(sys.flags, "safe_path", False) and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: class paths may name modules of the current folder
    if argv is None:
        sys.excepthook = _show
    try:
        status = _run(args)
    except CommandError as error:
        sys.stdout.flush()
        if int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))) > 0:
            time.sleep(1)  # for the report of local rank 0: launchers kill all ranks when the first one exits
        else:
            sys.stderr.write(f"error: {paragraph(str(error))}\n")
        status = error.status
    if status:
        sys.exit(status)


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Shows an error that ends the process. The failure monitor decides on which ranks this hook is called."""
    try:
        from lightning_hybrid.cli.tracebacks import show

        show(kind, error, trace)
    except Exception:  # noqa: BLE001 -- an error of torch's import, for example
        sys.__excepthook__(kind, error, trace)


def _run(args: list[str]) -> int | None:
    if not args or args[0] in ("--help", "-h"):
        sys.stdout.write(_help())
        return None
    if args[0] == "--version":
        sys.stdout.write(f"lightning-hybrid {version(NAME) or '(not installed)'}\n")
        return None
    name = next((arg for arg in args if arg in {command.name for command in COMMANDS}), None)
    if args[0].startswith("-") and name is not None:  # options of LightningCLI for all of its commands
        args.remove(name)
        args.insert(0, name)
    command = next((command for command in COMMANDS if command.name == args[0]), None)
    if command is None:
        names = [command.name for command in COMMANDS]
        raise UsageError(f"unknown command `{args[0]}`. {did_you_mean(args[0], names) or _choices(names)}")
    module, _, function = command.place.partition(":")
    run: Callable[[str, list[str]], int | None] = getattr(import_module(f"lightning_hybrid.cli.{module}"), function)
    return run(command.name, args[1:])


def _choices(names: Sequence[str]) -> str:
    return f"The commands are {', '.join(names)}."


def _help() -> str:
    width = max(len(command.name) for command in COMMANDS) + 2
    lines = [f"  {command.name:{width}}{command.help}" for command in COMMANDS]
    return (
        "\n".join(
            [
                "usage: lightning-hybrid COMMAND ...",
                "",
                "Hybrid data-, tensor-, pipeline- and expert-parallel training of any LightningModule.",
                "",
                "commands:",
                *lines,
                "",
                "options:",
                f"  {'--help':{width}}show this text; after a command: its options",
                f"  {'--version':{width}}show the version",
            ]
        )
        + "\n"
    )
