"""Compares layouts with one process: `lightning_hybrid.verify` and `lightning-hybrid verify --config FILE`."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import pickle
import socket
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning_utilities.core import rank_zero

from lightning_hybrid._lightning_private import can_start_again, forget_prompt, is_interactive
from lightning_hybrid.launch.failures import RankFailed
from lightning_hybrid.launch.terminal import log_level
from lightning_hybrid.spec.layout import Layout
from lightning_hybrid.spec.table import table_text
from lightning_hybrid.strategy import HybridStrategy

_HEADINGS = (("layout", False), ("result", False), ("checks", False))


@dataclass(frozen=True, kw_only=True)
class LayoutReport:
    """Result of one layout."""

    layout: str
    checks: tuple[tuple[str, str], ...] = ()
    """What the last step has checked, each with its result."""
    problem: str | None = None
    """Why the layout was refused or has failed; None if every step equals that of one process."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Results of all layouts; `str` is the table."""

    layouts: tuple[LayoutReport, ...]

    @property
    def passed(self) -> bool:
        """True if every step of every layout equals that of one process."""
        return all(report.problem is None for report in self.layouts)

    def __str__(self) -> str:
        rows = []
        for report in self.layouts:
            checks = "\n".join(f"{what}: {result}" for what, result in report.checks)
            rows.append((report.layout, "equal" if report.problem is None else "differs", report.problem or checks))
        return table_text("", _HEADINGS, rows)


def verify(
    module: pl.LightningModule,
    data: Any,
    layouts: str | Layout | Sequence[str | Layout],
    *,
    steps: int = 1,
    accelerator: str = "auto",
    **trainer_options: Any,
) -> VerifyReport:
    """Compares training steps under each layout with those of one process on the same samples and weights.

    Each layout runs in its own processes, as many as it has devices, started by `multiprocessing`; therefore a script
    calls this function under `if __name__ == "__main__":`. Where new processes cannot import the class of `module` (in
    a notebook, at a prompt, or defined within a function), they are forked from this one, for CPUs. `module` is not
    changed.

    Args:
        module: The LightningModule; it is pickled, unless the processes are forked.
        data: A LightningDataModule or the training loader; likewise.
        layouts: The layouts, or one of them.
        steps: Number of training batches to compare.
        accelerator: Lightning's `accelerator`.
        **trainer_options: Further options of the Trainer, such as `precision` and `accumulate_grad_batches`.

    Returns:
        A report with a row per layout. On ranks above 0 of a run, which are further processes of the same script,
        nothing is compared, and the report is empty: rank 0 has compared before it started them.

    Raises:
        ValueError: If `steps` is not positive, or there are no layouts.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1. Got {steps}.")
    if isinstance(layouts, str | Layout):
        layouts = [layouts]
    if not layouts:
        raise ValueError("`layouts` must name at least one layout, such as 'dp2'. Got none.")
    if int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0) > 0:
        return VerifyReport(layouts=())
    payload = _payload((module, data, steps, {"accelerator": accelerator, **trainer_options}))
    parsed = [Layout.parse(layout) if isinstance(layout, str) else layout for layout in layouts]
    return VerifyReport(layouts=tuple(_run(layout, payload) for layout in parsed))


def _payload(values: tuple[Any, ...]) -> bytes | tuple[Any, ...]:
    """Returns the arguments of the ranks, pickled; or as they are if only forked processes can have them.

    Raises:
        ValueError: If processes cannot be forked.
    """
    problem = "it is in a program that cannot be started again"
    if can_start_again() and not is_interactive():
        try:
            return pickle.dumps(values)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            problem = str(error)
    if torch.cuda.is_initialized():
        raise ValueError(
            "`module` and `data` must be picklable in a process that uses CUDA, from which others cannot be forked. "
            f"Got {type(values[0]).__name__}: {problem}. Define its class at the top of a file."
        )
    if dist.is_initialized() and dist.get_world_size() == 1:
        dist.destroy_process_group()  # of an earlier run of one rank; its threads would be missing in the ranks
    return values


def _run(layout: Layout, payload: bytes | tuple[Any, ...]) -> LayoutReport:
    """Runs the steps of one layout on new processes."""
    context: Any = multiprocessing.get_context("spawn" if isinstance(payload, bytes) else "fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started, ends = [], []
    try:
        for rank in range(layout.devices):
            end, other = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(rank, str(layout), port, payload, other), daemon=False)
            process.start()
            other.close()
            started.append(process)
            ends.append(end)
        return _first_report(str(layout), ends)
    finally:
        for process in started:
            process.join(30)
            if process.is_alive():
                process.kill()
                process.join()


def _first_report(layout: str, ends: list[Connection]) -> LayoutReport:
    """Returns the report of rank 0, or that of the first rank with a problem."""
    reports: list[LayoutReport] = []
    waiting = list(ends)
    while waiting:
        for ready in wait(waiting):
            waiting.remove(ready)  # type: ignore[arg-type] -- one of `ends`
            try:
                reports.append(ready.recv())  # type: ignore[union-attr]
            except EOFError:
                reports.append(LayoutReport(layout=layout, problem="a process has ended without a report"))
    problems = [r for r in reports if r.problem is not None]
    causes = [r for r in problems if not (r.problem or "").startswith(RankFailed.__name__)]
    return next(iter([*causes, *problems]), reports[0])


def _rank(rank: int, layout: str, port: int, payload: bytes | tuple[Any, ...], end: Connection) -> None:
    """Runs the steps on one rank, and sends its report."""
    count = Layout.parse(layout).devices
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    forked = not isinstance(payload, bytes)
    if forked:
        forget_prompt()
    torch.set_num_threads(1 if forked else max(1, torch.get_num_threads() // count))  # threads do not survive a fork
    module, data, steps, options = payload if forked else pickle.loads(payload)
    rank_zero.rank_zero_only.rank = rank  # messages of the Trainer come from rank 0 only
    strategy = HybridStrategy(layout, verify="every 1 steps")
    warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`")
    try:
        package = pl if isinstance(module, pl.LightningModule) else importlib.import_module("pytorch_lightning")
        with log_level(logging.WARNING, rank_zero.log):
            trainer = package.Trainer(
                devices=count,
                strategy=strategy,
                limit_train_batches=steps,
                max_epochs=1,
                limit_val_batches=0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                **options,
            )
        trainer.fit(module, data)
        report = LayoutReport(layout=layout, checks=tuple(strategy.verification))
    except BaseException as error:  # noqa: BLE001 -- of the user's code, too
        report = LayoutReport(layout=layout, problem=f"{type(error).__name__}: {error}")
    end.send(report)
    end.close()
