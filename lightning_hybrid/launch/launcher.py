"""Launches the ranks as Lightning does; the failure monitor decides how a failed run ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_hybrid._lightning_private import SubprocessScriptLauncher, TunerExit, last_found_by, share_cores, twins
from lightning_hybrid.launch.explain import explained
from lightning_hybrid.launch.monitor import FailureMonitor
from lightning_hybrid.spec.layout import Layout

_MAIN_PID = "LIGHTNING_HYBRID_MAIN_PID"
"""Environment variable with the pid of the process that has started this rank."""


@contextmanager
def environment_kept() -> Iterator[None]:
    """Restores the variables of launchers, which a run sets in its process: the next run may have several ranks."""
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK")
    before = {name: os.environ[name] for name in names if name in os.environ}
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


class HybridLauncher(SubprocessScriptLauncher):
    """Starts the script once per device of this node, unless another launcher has, and monitors all ranks.

    Lightning's own observer kills all ranks within 5 s of the first failure, including the rank that knows the cause.

    Args:
        cluster_environment: Lightning's cluster environment, which knows rank and world size.
        num_processes: Number of processes on this node.
        num_nodes: Number of nodes.
        layout: The layout.
        watch: The failure monitor.

    Raises:
        ValueError: On rank 0, if the layout is for another number of processes; other ranks end. On a rank of another
            run, if this one has fewer processes.
    """

    def __init__(
        self,
        cluster_environment: ClusterEnvironment,
        num_processes: int,
        num_nodes: int,
        layout: Layout,
        watch: FailureMonitor,
    ) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self.watch = watch
        """The failure monitor."""
        local_rank = cluster_environment.local_rank()
        if local_rank >= num_processes:
            raise ValueError(
                f"`devices` must be larger than the local rank of this process, {local_rank}. Got {num_processes}. "
                "Another Trainer of this script, or a launcher, has started the process as one of more ranks. Give all "
                "Trainers of a script the same `devices`, or write a script for each."
            )
        try:
            layout.validate(num_nodes * num_processes)
        except ValueError:
            if max(cluster_environment.global_rank(), cluster_environment.local_rank()) > 0:
                time.sleep(1)  # for the report of rank 0: launchers kill all ranks when the first one exits
                sys.exit(1)
            raise

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        return self.num_processes * self.num_nodes == 1  # more: by a `NotebookLauncher`

    @override
    def launch(self, function: Callable, *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            if self.num_processes * self.num_nodes == 1:
                stack.enter_context(environment_kept())
            if trainer is not None:
                find: Callable = trainer.strategy.checkpoints.find_last  # type: ignore[attr-defined] -- a HybridStrategy
                stack.enter_context(last_found_by(trainer, partial(find, trainer)))
            return self._launch(function, *args, **kwargs)

    def _launch(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            os.environ[_MAIN_PID] = str(os.getpid())
            self._call_children_scripts()
            del os.environ[_MAIN_PID]
        share_cores(self.num_processes)  # also of existing processes, each of which would use all cores
        if self.num_processes * self.num_nodes == 1:
            return function(*args, **kwargs)
        self.watch.begin(self.procs, self._main_pid())
        try:
            result = function(*args, **kwargs)
        except twins(SIGTERMException, TunerExit):
            self.watch.interrupted()
            raise
        except BaseException as raised:
            error = explained(raised)
            replacement = self.watch.failed(error)
            if not self.watch.connected:
                atexit.register(self._reap)  # connected ranks end themselves, and may run callbacks first
            if replacement is not None:
                raise replacement from None
            if error is raised:
                raise
            raise error from raised
        failure = self.watch.finish()
        if failure is not None:
            raise failure
        return result

    def _main_pid(self) -> int | None:
        """Returns the pid of the process whose end ends the run: Lightning's main process or torchrun, else None."""
        if _MAIN_PID in os.environ and self.cluster_environment.local_rank() > 0:
            return int(os.environ[_MAIN_PID])
        return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def _reap(self) -> None:
        """Kills the processes that this process has started, and waits for their end."""
        for child in self.procs:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
                child.wait()
