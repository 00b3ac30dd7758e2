"""Runs the ranks of a notebook: forked from its process, to which they return weights, metrics and errors.

The same for code of `python -c`, of the standard input and of a prompt, which cannot be started again for each rank.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.trainer.states import TrainerFn
from torch.multiprocessing.spawn import ProcessExitedException
from typing_extensions import override

from lightning_hybrid._lightning_private import (
    MultiProcessingLauncher,
    can_start_again,
    exit_functions_of_fork,
    is_interactive,
    is_overridden,
    loops_state,
    run_as_trainer_does,
    set_launcher,
)
from lightning_hybrid.launch.launcher import HybridLauncher, environment_kept
from lightning_hybrid.launch.processes import exit_text
from lightning_hybrid.launch.terminal import log_level
from lightning_hybrid.launch.world import set_ranks
from lightning_hybrid.patching import patched
from lightning_hybrid.spec.errors import RankError

_INTERRUPTED_SECONDS = 4.0
"""Seconds for the ranks to end by themselves after an interrupt; Jupyter sends it to them, too."""
_KILL_SECONDS = 10.0
"""Seconds for the ranks to end after an interrupt from this process."""

_OF_CHECKPOINT_CALLBACK = ("best_model_path", "best_model_score", "last_model_path")
_OF_TRAINER = ("callback_metrics", "logged_metrics", "progress_bar_metrics")

NOT_IN_NOTEBOOK = (
    "The ranks of a notebook, and of code without a script, end with `fit`, and with them optimizers and the "
    "partitioned module. What needs them, such as `trainer.save_checkpoint`, belongs into a callback "
    "(`ModelCheckpoint`). The module has all weights here: `torch.save(model.state_dict(), path)`."
)
"""Error of uses of the partitioned module in the notebook's process."""


class RankTraceback(Exception):
    """The traceback of a rank, as the cause of the error that the notebook raises."""


class NotebookLauncher(MultiProcessingLauncher):
    """Forks one process per rank, which then runs as one that another launcher has started.

    A cell defines classes that only a forked process has, so ranks of devices are forked, too, as Lightning's
    `ddp_notebook` does. Forked ranks compute with one thread: the threads of OpenMP do not survive a fork, and a rank
    that waits for them hangs.

    Args:
        strategy: The `HybridStrategy`.
        ranks: The launcher in the ranks.
    """

    def __init__(self, strategy: Any, ranks: HybridLauncher) -> None:
        super().__init__(strategy, start_method="fork")
        self._ranks = ranks
        self._folder = Path()
        self._results: Any = None
        self._weights: dict[str, Any] = {}

    # ---- in the notebook

    @override
    def launch(self, function: Callable, *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Runs `function` on all ranks, and returns the result of rank 0.

        Raises:
            RankError: If the ranks cannot be forked, or have ended without an error that this process can raise.
        """
        self._check()
        self._ranks.watch.forget()
        before = set(multiprocessing.active_children())
        # the ranks that torch terminates after a failure are of no interest
        only_errors = log_level(logging.ERROR, logging.getLogger("torch.multiprocessing.spawn"))
        with tempfile.TemporaryDirectory() as folder, environment_kept(), only_errors:
            self._folder = Path(folder)
            # a new port: forked ranks would use the store of an earlier run, whose thread they do not have
            for name in ("MASTER_ADDR", "MASTER_PORT"):
                os.environ.pop(name, None)
            try:
                super().launch(function, *args, trainer=trainer, **kwargs)
            except BaseException as error:
                _end(set(multiprocessing.active_children()) - before)
                cause = self._cause_of(error)
                self._ranks.watch.failed_elsewhere(f"{type(cause).__name__}: {cause}")
                if cause is error:
                    raise
                raise cause from cause.__cause__
        results, self._results = self._results, None
        return results

    def _check(self) -> None:
        devices = self._strategy.parallel_devices or ()
        if any(device.type == "cuda" for device in devices) and torch.cuda.is_initialized():
            raise RankError(
                "This process uses CUDA already (a tensor, a model or a run on one device), and processes that are "
                "forked from it could not. Restart it (in a notebook, the kernel), and leave models and tensors on the "
                "CPU before `fit`; the Trainer moves them."
            )
        if dist.is_initialized():
            if dist.get_world_size() > 1:
                raise RankError(
                    f"This process is one of {dist.get_world_size()} ranks already. Run the script without a prompt, "
                    "or call `torch.distributed.destroy_process_group()` before `fit`."
                )
            dist.destroy_process_group()  # of an earlier run of one rank; its threads would be missing in the ranks

    def _cause_of(self, error: BaseException) -> BaseException:
        """Returns the exception for the cell: that of the rank that reports the failure, if one does."""
        ended = isinstance(error, ProcessExitedException)
        how = ""
        if ended:
            how = f"The process of rank {error.error_index} (pid {error.error_pid}): {exit_text(error.exit_code)}."
        report = next(self._folder.glob("error*"), None)
        if report is None:
            return RankError(f"The run has ended. {how}") if ended else error
        raised, text, trace = pickle.loads(report.read_bytes())
        cause = RankError(text)
        with contextlib.suppress(Exception):  # an exception of the user may not be picklable
            cause = pickle.loads(raised)
        if ended and error.exit_code < 0 and type(cause) is RankError:
            cause = RankError(f"{cause} {how}")
        cause.__cause__ = RankTraceback(trace)
        return cause

    @override
    def _recover_results_in_main_process(self, worker_output: Any, trainer: pl.Trainer) -> None:
        module = trainer.lightning_module
        if worker_output.weights_path is not None and is_overridden("configure_model", module):
            module.configure_model()
        super()._recover_results_in_main_process(worker_output, trainer)

    @override
    def update_main_process_results(self, trainer: pl.Trainer, extra: dict[str, Any]) -> None:
        extra = torch.load(extra["file"], weights_only=False)
        super().update_main_process_results(trainer, extra)
        for name in _OF_TRAINER:
            getattr(trainer, name).update(extra[name])
        if trainer.state.fn == TrainerFn.FITTING:
            trainer.fit_loop.load_state_dict(extra["fit_loop"])
        for callback, values in zip(trainer.checkpoint_callbacks, extra["checkpoint_callbacks"], strict=True):
            vars(callback).update(values)
        self._results = extra["results"]
        lost = sorted(extra["weights"] - set(trainer.lightning_module.state_dict()))
        if lost:
            raise RankError(
                f"The weights {', '.join(lost[:4])}{' ...' if len(lost) > 4 else ''} were made in the ranks only, in "
                "`setup` or in a hook, so the module of this notebook lacks them. Make them in `__init__` or in "
                "`configure_model`, or read them from a checkpoint."
            )

    # ---- in a rank

    @override
    def _wrapping_function(
        self, process_idx: int, trainer: Any, function: Callable, args: Any, kwargs: Any, *rest: Any
    ) -> None:
        os.environ |= {"OMP_NUM_THREADS": "1", "LOCAL_RANK": str(process_idx)}
        torch.set_num_threads(1)
        set_ranks(self._environment, 1, self._strategy.num_processes)
        sys.excepthook = self._report
        set_launcher(self._strategy, self._ranks)
        run = partial(run_as_trainer_does, trainer, partial(self._run, trainer, function))
        with exit_functions_of_fork():
            try:
                super()._wrapping_function(process_idx, trainer, run, args, kwargs, *rest)
            except SystemExit:
                raise
            except BaseException:  # noqa: BLE001 -- shown in the cell
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type] -- there is an error
                sys.exit(1)

    @property
    def _environment(self) -> ClusterEnvironment:
        return self._ranks.cluster_environment

    def _run(self, trainer: pl.Trainer, function: Callable, *args: Any, **kwargs: Any) -> None:
        self._results = function(*args, **kwargs)
        if trainer.state.fn == TrainerFn.FITTING:
            self._weights = self._strategy.full_state_dict()  # type: ignore[attr-defined] -- a HybridStrategy

    @override
    def _collect_rank_zero_results(self, trainer: pl.Trainer, results: Any) -> Any:
        self._strategy.barrier()  # the store ends with rank 0, and others may still read it
        with patched(trainer.lightning_module, state_dict=lambda: self._weights):
            return super()._collect_rank_zero_results(trainer, None)

    @override
    def get_extra_results(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Writes what the notebook gets to a file, since a pipe that nobody reads yet holds 64 KiB only."""
        extra = super().get_extra_results(trainer) | {name: dict(getattr(trainer, name)) for name in _OF_TRAINER}
        extra |= {"results": self._results, "fit_loop": loops_state(trainer)["fit_loop"], "weights": set(self._weights)}
        extra["checkpoint_callbacks"] = [
            {name: vars(callback)[name] for name in _OF_CHECKPOINT_CALLBACK if name in vars(callback)}
            for callback in trainer.checkpoint_callbacks
        ]
        file = self._folder / "extra"
        torch.save(move_data_to_device(extra, "cpu"), file)
        return {"file": str(file)}

    def _report(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Writes an error for the notebook; for `sys.excepthook`, which the failure monitor calls on one rank only."""
        rank = f"Rank {self._environment.global_rank()} of {self._strategy.num_processes}"
        lines = "".join(traceback.format_exception(kind, error, trace))
        raised = b""
        with contextlib.suppress(Exception):
            raised = pickle.dumps(error)
        written = self._folder / f"of{self._environment.global_rank()}"
        written.write_bytes(pickle.dumps((raised, f"{rank} failed: {kind.__name__}: {error}", f"{rank}\n{lines}")))
        written.rename(self._folder / f"error{self._environment.global_rank()}")


def launcher_here(strategy: Any, ranks: HybridLauncher) -> HybridLauncher | NotebookLauncher:
    """Returns `ranks`, the launcher of scripts, or in a notebook or without a script the one that forks the ranks.

    Args:
        strategy: The `HybridStrategy`.
        ranks: The launcher of scripts.

    Raises:
        ValueError: If the ranks of a notebook would not be on this machine, or another launcher is to start them.
    """
    environment, interactive = ranks.cluster_environment, is_interactive()
    scripted = not interactive and (can_start_again() or environment.creates_processes_externally)
    if scripted or ranks.num_processes * ranks.num_nodes == 1:
        return ranks
    if ranks.num_nodes > 1:
        where = "in a notebook" if interactive else "in code without a script"
        raise ValueError(
            f"`num_nodes` must be 1 {where}, whose ranks run on its machine. Got {ranks.num_nodes}. Write the "
            "code to a script, and start it with torchrun or srun on every node."
        )
    if environment.creates_processes_externally:
        raise ValueError(
            f"`devices` must be 1 in a notebook that belongs to a {type(environment).__name__}, which expects another "
            f"launcher to start the ranks. Got {ranks.num_processes}. Pass `plugins=[LightningEnvironment()]` to the "
            "Trainer (from `lightning.pytorch.plugins.environments`), and unset LOCAL_RANK if it is set."
        )
    return NotebookLauncher(strategy, ranks)


def _end(processes: set[Any]) -> None:
    """Waits for the end of forked ranks, and then ends them."""
    for seconds, signum in ((_INTERRUPTED_SECONDS, signal.SIGINT), (_KILL_SECONDS, signal.SIGKILL)):
        deadline = time.monotonic() + seconds
        try:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        except KeyboardInterrupt:  # again
            signum = signal.SIGKILL
        for process in processes:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signum)
    for process in processes:
        process.join()
