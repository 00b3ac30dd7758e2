"""Runs cells of `notebook_cells.py` in one process that Lightning takes for a notebook."""

from __future__ import annotations

import warnings
from pathlib import Path
from unittest.mock import patch

from lightning.pytorch.trainer.connectors import accelerator_connector

from lightning_hybrid._lightning_private import processes

CELLS = [f"# %%{cell}" for cell in Path(__file__).with_name("notebook_cells.py").read_text().split("# %%")[1:]]

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with (
        patch.object(accelerator_connector, "_IS_INTERACTIVE", True),
        patch.object(processes, "_IS_INTERACTIVE", True),
    ):
        for cell in CELLS:
            if not cell.startswith("# %% slow"):
                exec(compile(cell, cell.splitlines()[0], "exec"), globals())
