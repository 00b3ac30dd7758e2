"""The command line: `lightning-hybrid fit|validate|test|predict --config FILE`."""

import warnings
from collections.abc import Sequence

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand of LightningCLI on any model, data module and strategy, all given by class path.

    Args:
        argv: Arguments after the program's name; those of the process if None. The processes of a run on several
            devices are started with the process's own arguments, so give others for a single device only.
    """
    # Lightning 2.6 says this once in every process of a run with torch 2.13; its user can do nothing about it.
    warnings.filterwarnings(
        "ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning
    )
    LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        args=None if argv is None else list(argv),
    )


if __name__ == "__main__":
    main()
