"""The command line: `lightning-hybrid fit|validate|test|predict --config FILE`, and `consolidate` and `verify`."""

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
from lightning_hybrid.checkpoint.consolidate import consolidate, verify
from lightning_hybrid.spec.errors import CheckpointError


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a subcommand of LightningCLI on any model, data module and strategy, given by class path.

    `consolidate CHECKPOINT OUT` and `verify CHECKPOINT` need no model: see `lightning-hybrid consolidate --help`.

    Args:
        argv: Arguments after the program's name; None: the arguments of this process. A launcher starts further
            processes with the arguments of this process, so pass `argv` for a single device only.
    """
    args = sys.argv[1:] if argv is None else list(argv)
    if args and args[0] in _CHECKPOINT_COMMANDS:
        _run_on_checkpoint(_CHECKPOINT_COMMANDS[args[0]], args[1:])
        return
    # Lightning 2.6 triggers this warning in every process of a run with torch 2.13; users cannot avoid it.
    warnings.filterwarnings(
        "ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning
    )
    _CLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        args=None if argv is None else list(argv),
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


_CHECKPOINT_COMMANDS: dict[str, Callable] = {"consolidate": consolidate, "verify": verify}


def _run_on_checkpoint(command: Callable, args: list[str]) -> None:
    try:
        said = auto_cli(command, args=args, prog=f"lightning-hybrid {command.__name__}")
    except CheckpointError as error:
        sys.exit(f"error: {error}")
    if said is not None:
        sys.stdout.write(f"{said}\n")


if __name__ == "__main__":
    main()
