"""`PhaseSchedule`: changes layout, batch sizes and other settings during training, without a restart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_hybrid._lightning_private import Callback, checkpoint_of_run, steps_after_batch
from lightning_hybrid.adapt.division import divide
from lightning_hybrid.adapt.phases import Phase, PhaseState, check_phases, in_force
from lightning_hybrid.batches import count_tokens
from lightning_hybrid.callbacks.required import hybrid_strategy
from lightning_hybrid.checkpoint.reader import saved_callback_state
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.gradient_sync import GradientSync
from lightning_hybrid.spec.layout import Layout
from lightning_hybrid.strategy import HybridStrategy
from lightning_hybrid.tuning.batch_size import BatchSizeController, samples_of_all, sum_over_replicas


class PhaseSchedule(Callback):
    """Trains in phases, each of which sets a layout, batch sizes, a sequence length or parallel streams.

    A phase begins between two steps: weights and optimizer state are resharded by name (see
    `HybridStrategy.relayout`), and training continues with the next batch. A change of layout alone does not change
    the result. The phase is saved in the checkpoint, and a resumed run continues in it. Schedulers advance by steps of
    the optimizer, whatever the batch size of a step.

    Logs `phase`, the index of the phase, from 0.

    Args:
        phases: The phases in order. Settings that a phase leaves None keep their value. The first phase begins with the
            training.

    Raises:
        ValueError: If the phases are not in order, or one after the first names no point at which it begins.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        check_phases(phases)
        self.phases = tuple(phases)
        self._state = PhaseState()
        self._control: BatchSizeController | None = None
        self._samples = self._tokens = 0
        self._counts_tokens = any(phase.at_tokens is not None for phase in phases)

    @property
    def phase(self) -> int:
        """Index of the current phase."""
        return self._state.phase

    # ---- start

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        hybrid_strategy(trainer, self)
        for number, phase in enumerate(self.phases):
            if phase.layout is not None:
                try:
                    Layout.parse(phase.layout).validate(trainer.world_size)
                except ValueError as error:
                    raise PartitionError(f"`phases`, phase {number}: {error}") from None
            if phase.streams is not None and not callable(getattr(pl_module, "open_streams", None)):
                raise PartitionError(
                    f"`phases`, phase {number}: `streams={phase.streams}` needs a module with a method "
                    f"`open_streams(streams)`. Got {type(pl_module).__name__} without one."
                )
        # modules added by later phases must exist before a checkpoint of such a phase is loaded
        saved = saved_callback_state(checkpoint_of_run(trainer), self.state_key)
        for phase in self.phases[: saved.get("phase", 0) + 1]:
            if phase.streams is not None:
                pl_module.open_streams(phase.streams)  # type: ignore[operator]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._set(trainer, None)
        self._samples = self._tokens = 0

    # ---- steps

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._control is not None:
            self._control.before_epoch()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._control is not None:
            self._control.before_batch(batch_idx)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = hybrid_strategy(trainer, self)
        self._samples += samples_of_all(strategy.engine, batch)
        if self._counts_tokens:
            self._tokens += count_tokens(batch) or 0
        if not steps_after_batch(trainer):
            return
        tokens = sum_over_replicas(strategy.engine, self._tokens) if self._counts_tokens else 0
        self._state = self._state.after_step(self._samples, tokens)
        self._samples = self._tokens = 0
        if self.phase + 1 == len(self.phases):
            return
        following = self.phases[self.phase + 1]
        self._look(trainer, following)
        if self._state.ends(following, trainer.global_step):
            self._state = self._state.next()
            rank_zero_info(f"Phase {self.phase} begins at step {trainer.global_step}: {_shown(following)}.")
            module, streams = cast(Any, pl_module), following.streams
            self._set(trainer, None if streams is None else lambda: module.open_streams(streams))
        pl_module.log("phase", float(self.phase), on_step=True, on_epoch=False, batch_size=1)

    def _look(self, trainer: pl.Trainer, following: Phase) -> None:
        plateau = following.at_plateau
        if plateau is None or trainer.global_step % plateau.every_n_steps:
            return
        if plateau.metric not in trainer.callback_metrics:
            raise PartitionError(
                f"`at_plateau` needs the metric `{plateau.metric}`, which is not logged. Logged metrics: "
                f"{', '.join(sorted(trainer.callback_metrics)) or 'none'}."
            )
        value = trainer.strategy.broadcast(float(trainer.callback_metrics[plateau.metric]))
        self._state = self._state.seen(value, plateau)

    # ---- settings of a phase

    def _set(self, trainer: pl.Trainer, edit: Callable[[], None] | None) -> None:
        """Applies the accumulated settings of phases up to the current one; `edit` may add modules."""
        strategy, phase = hybrid_strategy(trainer, self), in_force(self.phases[: self.phase + 1])
        if self._control is not None:
            self._control.release()
            self._control = None
        present = strategy.request
        wanted = replace(
            present,
            layout=present.layout if phase.layout is None else Layout.parse(phase.layout),
            schedule=phase.schedule or present.schedule,
            microbatches=phase.microbatches or present.microbatches,
            gradient_sync=present.gradient_sync
            if phase.gradient_sync is None
            else GradientSync.of(phase.gradient_sync),
        )
        if edit is not None or wanted != present:
            strategy.relayout(
                wanted.layout,
                schedule=phase.schedule,
                microbatches=phase.microbatches,
                gradient_sync=wanted.gradient_sync,
                edit=edit,
            )
        strategy.sequence_length = phase.sequence_length or None
        if phase.batch_size is not None or phase.microbatch_size is not None:
            self._divide(strategy, phase)

    def _divide(self, strategy: HybridStrategy, phase: Phase) -> None:
        """Divides batches by the batch sizes of `phase`."""
        control = self._control = BatchSizeController.start(strategy.engine, strategy.listeners)
        batch = phase.batch_size or control.global_batch_size
        limits = control.limits(phase.microbatch_size or control.first.microbatch_size, 1)
        division = divide(batch, limits)
        if division is None:
            raise PartitionError(
                f"`batch_size={batch}` in phase {self.phase} cannot be divided among {control.replicas} replicas of "
                f"`layout='{strategy.layout}'` in the loader's batches. Choose a multiple of them."
            )
        control.change(division)

    # ---- end and checkpoints

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._control = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return asdict(self._state)

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if state_dict.get("phase", 0) >= len(self.phases):
            raise PartitionError(
                f"The checkpoint is of phase {state_dict['phase']}, and `phases` has {len(self.phases)}."
            )
        self._state = PhaseState(**state_dict)


def _shown(phase: Phase) -> str:
    fields = {k: v for k, v in vars(phase).items() if v is not None and not k.startswith("at_")}
    return ", ".join(f"{name}={value}" for name, value in fields.items()) or "nothing changes"
