"""The command line: `lightning-hybrid fit|validate|test|predict|verify`, and `consolidate` and `verify` of files."""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import auto_cli
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_hybrid.adapt.phases import Phase
from lightning_hybrid.callbacks.phase_schedule import PhaseSchedule
from lightning_hybrid.callbacks.save_config import SaveConfig
from lightning_hybrid.checkpoint import consolidate as checkpoints
from lightning_hybrid.compare_layouts import verify
from lightning_hybrid.spec.errors import CheckpointError


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a subcommand of LightningCLI on any model, data module and strategy, given by class path.

    `consolidate CHECKPOINT OUT` and `verify CHECKPOINT` need no model: see `lightning-hybrid consolidate --help`.
    `verify --config FILE` compares training steps under layouts with one process, see `compare_layouts.verify`.

    Args:
        argv: Arguments after the program's name; None: the arguments of this process. A launcher starts further
            processes with the arguments of this process, so pass `argv` for a single device only.
    """
    args = sys.argv[1:] if argv is None else list(argv)
    if args[:1] == ["verify"] and any(arg.startswith("--") and arg != "--help" for arg in args):
        _verify_layouts(args[1:])
        return
    if args and args[0] in _CHECKPOINT_COMMANDS:
        _run_on_checkpoint(_CHECKPOINT_COMMANDS[args[0]], args[1:])
        return
    _cli(None if argv is None else list(argv), save_config_callback=SaveConfig, save_config_kwargs={"overwrite": True})


def _cli(args: list[str] | None, **options: Any) -> LightningCLI:
    # Lightning 2.6 triggers this warning in every process of a run with torch 2.13; users cannot avoid it.
    warnings.filterwarnings(
        "ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning
    )
    return _CLI(
        LightningModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True, args=args, **options
    )


class _CLI(LightningCLI):
    """LightningCLI with an additional key `phases:`, a list of `Phase`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--phases", type=list[Phase] | None, default=None, help="Phases of training: see callbacks.PhaseSchedule."
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        phases = self._get(self.config_init, "phases")
        if phases:
            trainer.callbacks.append(PhaseSchedule(phases))  # type: ignore[attr-defined] -- set by a connector
        return trainer


_CHECKPOINT_COMMANDS: dict[str, Callable] = {"consolidate": checkpoints.consolidate, "verify": checkpoints.verify}


_TRAINER_OPTIONS = ("accelerator", "precision", "accumulate_grad_batches", "gradient_clip_val")
"""Options of the Trainer in the configuration that `verify --config` uses."""


def _verify_layouts(args: list[str]) -> None:
    """Runs `verify --config FILE [--layout LAYOUT ...] [--steps N]`; other arguments override the configuration."""
    parser = argparse.ArgumentParser(
        prog="lightning-hybrid verify",
        description="Compares training steps under layouts with those of one process. Other arguments override the "
        "configuration: `--model.init_args.layers 2` for a model of reduced size.",
    )
    parser.add_argument("--layout", action="append", help="a layout, such as dp2-pp2; may be given several times")
    parser.add_argument("--steps", type=int, default=1, help="number of training batches")
    own, others = parser.parse_known_args(args)
    warnings.filterwarnings("ignore", message=r".*LightningCLI's args parameter is intended to run from within Python")
    cli = _cli(
        [*others, "--trainer.strategy=auto", "--trainer.devices=1", "--trainer.logger=false"],
        run=False,
        save_config_callback=None,
    )
    options = {name: value for name in _TRAINER_OPTIONS if (value := cli.config["trainer"][name]) is not None}
    if not own.layout:
        parser.error("`--layout` must be given at least once.")
    found = verify(cli.model, cli.datamodule, own.layout, steps=own.steps, **options)
    sys.stdout.write(f"{found}\n")
    sys.exit(0 if found.passed else 1)


def _run_on_checkpoint(command: Callable, args: list[str]) -> None:
    try:
        said = auto_cli(command, args=args, prog=f"lightning-hybrid {command.__name__}")
    except CheckpointError as error:
        sys.exit(f"error: {error}")
    if said is not None:
        sys.stdout.write(f"{said}\n")


if __name__ == "__main__":
    main()
