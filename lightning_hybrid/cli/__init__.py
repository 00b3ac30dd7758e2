"""The command line `lightning-hybrid`: one file per command, imported when it runs."""

from lightning_hybrid.cli.commands import main

__all__ = ["main"]
