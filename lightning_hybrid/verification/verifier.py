"""Verifies a run: its first training step must equal that of one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist

from lightning_hybrid._lightning_private import hands_out_its_iterator
from lightning_hybrid.engine.batch_kinds import BatchKinds
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.spec.verify import Verify
from lightning_hybrid.verification.comparison import Comparison
from lightning_hybrid.verification.differences import step_bound
from lightning_hybrid.verification.drift import ReplicaState
from lightning_hybrid.verification.fingerprint import fingerprint
from lightning_hybrid.verification.gradient_code import hook_lines
from lightning_hybrid.verification.logged import LoggedValues


class Verifier:
    """Compares training steps with those of one process.

    Args:
        verify: When to verify.
    """

    def __init__(self, verify: Verify) -> None:
        self._verify = verify
        self._engine: Engine | None = None
        self._replicas: ReplicaState | None = None
        self._kinds: BatchKinds | None = None
        self._resumed_kinds: list[int] | None = None
        self._batches = 0
        self._logged: LoggedValues | None = None
        self.verified: str | None = None
        """The fingerprint of the last verified step; that of the checkpoint in a resumed run."""
        self.rows: list[tuple[str, str]] = []
        """What the last verification has checked, each with its result."""

    def before_step(self, engine: Engine, args: tuple, kwargs: dict[str, Any]) -> None:
        """Verifies the training step that is about to run, if it is due. Collective over all ranks.

        Args:
            engine: The engine of the layout.
            args: Arguments of `training_step`, the batch first.
            kwargs: Keyword arguments of `training_step`.

        Raises:
            PartitionError: On all ranks, if the step differs from that of one process.
        """
        self._batches += 1
        again = self._verify.every is not None and self._batches % self._verify.every == 0
        new, self._engine = engine is not self._engine, engine
        self.before_logging_step(engine, "training_step", args)
        if dist.get_world_size() == 1 or not args:
            return
        self._compare_replicas(engine, new, args, kwargs)
        due = self._with_new_kinds(engine)
        if due is not None:
            self._run(engine, *due)
        if (self._verify.at_start and new) or again:
            present = fingerprint(engine, args[0])
            # replicas may have batches of different shapes
            if again or engine.run.world.any_rank(present != self.verified):
                self._run(engine, args, kwargs)
                self.verified = present
            elif self._kinds is not None:
                self._kinds.known = self._resumed_kinds
        if self._kinds is not None:
            self._kinds.note(args, kwargs)

    def before_logging_step(self, engine: Engine, name: str, args: tuple) -> None:
        """Notes the batch of a step whose logged values, and those of hooks, are checked. Collective over all ranks."""
        logged = self._logged_of(engine)
        if logged is not None:
            if name == "training_step":
                logged.after_epoch(name)
            logged.before_step(name, args)

    def after_epoch(self, engine: Engine, name: str) -> None:
        """Checks what the steps `name` of an epoch and hooks have logged, if it is due. Collective over all ranks.

        Raises:
            PartitionError: On all ranks with `verify="strict"`, if a value depends on how samples are divided.
        """
        logged = self._logged_of(engine)
        if logged is not None:
            logged.after_epoch(name)

    def _logged_of(self, engine: Engine) -> LoggedValues | None:
        """Returns the check of logged values; None if nothing is checked."""
        checks = self._verify.at_start and engine.plan.layout.replicas > 1 and engine.diloco is None
        if not checks or hands_out_its_iterator(engine.runner.root.trainer):
            return None
        if self._logged is None or self._logged.engine is not engine:
            self._logged = LoggedValues(engine, strict=self._verify.strict, bound=step_bound(engine))
        return self._logged

    def _run(self, engine: Engine, args: tuple, kwargs: dict[str, Any]) -> None:
        with engine.run.told("verify", "Comparing the training step with that of one process"):
            self.rows = Comparison(engine, args, kwargs, self._verify).run()

    def _with_new_kinds(self, engine: Engine) -> tuple[tuple, dict[str, Any]] | None:
        """Returns the arguments of an earlier step with kinds of values, or hooks, that no verified step had."""
        exchange, trainer = engine.runner.exchange, engine.runner.root.trainer
        if self._verify.at_start and exchange.kinds is None and not hands_out_its_iterator(trainer):
            exchange.kinds = BatchKinds(engine.device, partial(hook_lines, engine.runner))
        self._kinds = exchange.kinds
        if self._kinds is None:
            return None
        due, self._kinds.due = self._kinds.due, None
        return due

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run need not verify again."""
        return {"step": self.verified, "kinds": None if self._kinds is None else self._kinds.known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the result of `state_dict` from a checkpoint."""
        self.verified, self._resumed_kinds = state.get("step"), state.get("kinds")

    def _compare_replicas(self, engine: Engine, new: bool, args: tuple, kwargs: dict[str, Any]) -> None:
        if new:
            compares = self._verify.at_start and engine.plan.layout.replicas > 1 and engine.diloco is None
            compares = compares and not hands_out_its_iterator(engine.runner.root.trainer)
            strict, bound = self._verify.strict, step_bound(engine)
            self._replicas = ReplicaState(engine, strict=strict, bound=bound) if compares else None
        if self._replicas is not None:
            self._replicas.before_step(args, kwargs)
