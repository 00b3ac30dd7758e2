"""The non-finite check: no rank updates its weights if a gradient or the loss is NaN or infinite on any rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_hybrid.collectives import gather_objects, to_local
from lightning_hybrid.engine.clipping import clips_untouched_gradients
from lightning_hybrid.engine.exchange import StepExchange
from lightning_hybrid.engine.gradient_noise import GradientNoise
from lightning_hybrid.engine.norms import local_square, norms_by_id
from lightning_hybrid.engine.options import check_options, option_numbers
from lightning_hybrid.metrics.reduction import as_numbers
from lightning_hybrid.parallelize.apply import Partition
from lightning_hybrid.spec.errors import NonFiniteError

_NAMED = 3
"""Maximum number of parameters that a message names per rank."""


class SkipStep(Exception):  # noqa: N818 -- not an error: leaves `optimizer.step` before the update
    """Aborts the optimizer's step before the update."""


@dataclass
class _Finding:
    """Non-finite gradients and loss of one rank."""

    rank: int
    stage: int
    replica: int
    loss: str | None
    parameters: list[str]
    count: int

    def __str__(self) -> str:
        found = [] if self.loss is None else [f"the loss is {self.loss}"]
        found += self.parameters
        if self.count > len(self.parameters):
            found.append(f"{self.count - len(self.parameters)} more parameters")
        return f"rank {self.rank} (pipeline rank {self.stage}, replica {self.replica}): {', '.join(found)}"


class NonFiniteCheck:
    """Checks an optimizer's gradients on all ranks before its step.

    The check costs one norm per gradient of this rank, and a few numbers in the all-reduce of the step. Gradients are
    synchronized and not yet clipped. Single tensors are searched only if a norm is not finite. The same all-reduce
    computes the norm for clipping.

    Args:
        partition: The applied partition.
        device: This rank's device.
        on_nonfinite: `"raise"`: all ranks raise `NonFiniteError`. `"skip"`: all ranks skip the step.
        exchange: The all-reduce of the step.
    """

    def __init__(
        self,
        partition: Partition,
        device: torch.device,
        on_nonfinite: Literal["raise", "skip"],
        exchange: StepExchange,
    ) -> None:
        self._exchange = exchange
        self._partition, self._device, self._mode = partition, device, on_nonfinite
        self._loss: Tensor | None = None
        self.skipped = 0
        """Number of steps skipped so far."""
        self.noise: GradientNoise | None = None
        """Gradient noise measurement, whose numbers are summed in the same all-reduce; None: not measured."""
        self.keeps_norms = False
        """True if the norm of all gradients is wanted in the next steps, on all ranks alike."""
        self.norms: dict[int, Tensor] = {}
        """The last norms that were wanted, before clipping, on the device, by the `id` of the optimizer."""

    def saw_loss(self, loss: Tensor) -> None:
        """Includes `loss`, from which the next step's gradients come, in the check."""
        loss = loss.detach().float()
        self._loss = loss if self._loss is None else self._loss + loss

    def check(self, optimizer: Optimizer, trainer: pl.Trainer) -> Tensor | None:
        """Checks the loss, and the gradients that `optimizer` is about to use. Collective over all ranks.

        Returns:
            The norm of all gradients if all ranks clip by that norm before a hook can change gradients, else None.

        Raises:
            NonFiniteError: On all ranks, if anything is not finite on any of them.
            SkipStep: On all ranks instead, with `"skip"`, after the optimizer's gradients are cleared.
        """
        loss, self._loss = self._loss, None
        norms = norms_by_id(optimizer)
        total = torch.zeros((), device=self._device)
        if norms:
            total = torch.linalg.vector_norm(torch.stack([n.to(self._device) for n in norms.values()]))
        if loss is not None:
            total = total + loss
        exact = self._partition.plan.gradient_sync.kind != "diloco"
        clips = exact and clips_untouched_gradients(trainer)
        suspects, norm = self._agree(~torch.isfinite(total), clips, optimizer, norms, trainer)
        if not suspects:
            return norm
        findings = self._look_closer(optimizer, loss)
        if not findings:  # a norm of finite gradients has overflowed
            return norm
        if self._mode == "raise":
            raise NonFiniteError(
                f"{_described(findings, trainer)} All ranks stop before the update: the weights are those of the step "
                "before. Look for the cause there (a learning rate that is too high, a division by zero, the data), or "
                "leave out such steps with `on_nonfinite='skip'`."
            )
        self.skipped += 1
        rank_zero_warn(f"{_described(findings, trainer)} The step is left out, {self.skipped} so far.")
        for logger in trainer.loggers:
            logger.log_metrics({"skipped_steps": float(self.skipped)}, step=trainer.global_step)
        optimizer.zero_grad()
        raise SkipStep

    def exchange_unchecked(self, optimizer: Optimizer, trainer: pl.Trainer) -> None:
        """Runs the all-reduce of a step without the check, which a loss scaler does. Collective over all ranks."""
        noise = self._measuring
        numbers = as_numbers(option_numbers(optimizer), self._device)
        if noise is not None:
            numbers = torch.cat([numbers, noise.local_numbers(optimizer, norms_by_id(optimizer))])
        (code, squares, *noise_sums), _ = self._exchange.run(numbers)
        check_options((code, squares), optimizer, trainer, self._partition.plan.layout)
        if noise is not None:
            noise.set_sums(noise_sums, dist.get_world_size())

    @property
    def _measuring(self) -> GradientNoise | None:
        return self.noise if self.noise is not None and self.noise.measures else None

    def _agree(
        self, suspect: Tensor, clips: bool, optimizer: Optimizer, norms: Mapping[int, Tensor], trainer: pl.Trainer
    ) -> tuple[bool, Tensor | None]:
        """Returns True if gradients of any rank are suspect, and the norm of all gradients if all ranks clip by it."""
        noise = self._measuring
        numbers = as_numbers([0.0, float(not clips), 0.0, *option_numbers(optimizer)], self._device)
        numbers[0] = suspect
        if clips or self.keeps_norms:
            numbers[2] = local_square(self._partition, norms, self._device) / self._partition.plan.layout.dp
        if noise is not None:
            numbers = torch.cat([numbers, noise.local_numbers(optimizer, norms)])
        (suspects, others, _, code, squares, *noise_sums), sums = self._exchange.run(numbers)
        check_options((code, squares), optimizer, trainer, self._partition.plan.layout)
        if noise is not None:
            noise.set_sums(noise_sums, dist.get_world_size())
        if self.keeps_norms:
            self.norms[id(optimizer)] = sums[2].sqrt()
        return suspects > 0, None if others else sums[2].sqrt()

    def _look_closer(self, optimizer: Optimizer, loss: Tensor | None) -> list[_Finding]:
        value = 0.0 if loss is None else float(loss)
        names = {id(p): n for n, p in self._partition.parameters.local().items()}
        parameters = [
            f"the gradient of `{names.get(id(p), 'a parameter')}` is {what}"
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None and (what := _not_finite(p.grad)) is not None
        ]
        own = None
        if parameters or not math.isfinite(value):
            mesh = self._partition.mesh
            rank, stage, replica = dist.get_rank(), mesh.rank("pp"), mesh.replica
            text = None if math.isfinite(value) else str(value)
            own = _Finding(rank, stage, replica, text, parameters[:_NAMED], len(parameters))
        return [f for f in gather_objects(own) if f is not None]


def _not_finite(gradient: Tensor) -> str | None:
    values = to_local(gradient)
    values = values.coalesce().values() if values.is_sparse else values
    bad = int((~torch.isfinite(values)).sum())
    if not bad:
        return None
    kind = "NaN" if bool(torch.isnan(values).any()) else "infinite"
    return f"{kind} in {bad} of {values.numel()} elements"


def _described(findings: Iterable[_Finding], trainer: pl.Trainer) -> str:
    """Describes `findings`, ranks with a non-finite loss first: gradients of other ranks may be synchronized."""
    ordered = sorted(findings, key=lambda f: (f.loss is None, f.rank))
    others = len(ordered) - 1
    more = f" Also on {others} other rank{'s' if others > 1 else ''}." if others else ""
    return f"At global step {trainer.global_step}, gradients or the loss are not finite: {ordered[0]}.{more}"
