"""Lightning's launcher; the failure monitor decides how a failed run ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_hybrid._lightning_private import TunerExit, last_found_by, share_cores
from lightning_hybrid.launch.monitor import FailureMonitor

_MAIN_PID = "LIGHTNING_HYBRID_MAIN_PID"
"""Environment variable by which a rank knows the process that has started it."""


class HybridLauncher(_SubprocessScriptLauncher):
    """Starts the script once for every device of this node, unless another launcher has, and watches all ranks.

    Lightning's observer kills all ranks within 5 s of the first failure, the one that knows the reason included.

    Args:
        cluster_environment: Lightning's knowledge of the ranks.
        num_processes: Processes on this node.
        num_nodes: Nodes.
        watch: Notices failures.
    """

    def __init__(
        self, cluster_environment: ClusterEnvironment, num_processes: int, num_nodes: int, watch: FailureMonitor
    ) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self._watch = watch

    @override
    def launch(self, function: Callable, *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        if trainer is None:
            return self._launch(function, *args, **kwargs)
        find: Callable = trainer.strategy.checkpoints.find_last  # type: ignore[attr-defined] -- a HybridStrategy
        with last_found_by(trainer, partial(find, trainer)):
            return self._launch(function, *args, **kwargs)

    def _launch(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            os.environ[_MAIN_PID] = str(os.getpid())
            self._call_children_scripts()
            del os.environ[_MAIN_PID]
        share_cores(self.num_processes)
        if self.num_processes * self.num_nodes == 1:
            return function(*args, **kwargs)
        self._watch.begin(self.procs, self._main_pid())
        try:
            result = function(*args, **kwargs)
        except (SIGTERMException, TunerExit):
            self._watch.interrupted()
            raise
        except BaseException as error:
            replacement = self._watch.failed(error)
            if not self._watch.connected:
                atexit.register(self._reap)  # ranks that have met end themselves, and may run callbacks before
            if replacement is None:
                raise
            raise replacement from None
        failure = self._watch.finish()
        if failure is not None:
            raise failure
        return result

    def _main_pid(self) -> int | None:
        """The process with whose end the run ends: Lightning's main one, or torchrun."""
        if _MAIN_PID in os.environ and self.cluster_environment.local_rank() > 0:
            return int(os.environ[_MAIN_PID])
        return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def _reap(self) -> None:
        """Ends the processes that this one has started."""
        for child in self.procs:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
                child.wait()


def leave_quietly() -> NoReturn:
    """Ends a rank whose error rank 0 reports; a little later, since launchers end all ranks when the first one goes."""
    time.sleep(1)
    sys.exit(1)
