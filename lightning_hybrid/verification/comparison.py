"""Compares one training step with that of one process, and finds the cause of a difference."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_hybrid._lightning_private import hands_out_its_iterator
from lightning_hybrid._torch_private import default_group
from lightning_hybrid.batches import split_batch
from lightning_hybrid.collectives import error_message, first_problem, gather_objects
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.engine.loss_weights import place_of
from lightning_hybrid.metrics.outputs import NotJoinedError
from lightning_hybrid.parallelize.whole import Weights
from lightning_hybrid.patching import patched
from lightning_hybrid.replicas.batch_norm import has_batch_norm
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.table import table_text
from lightning_hybrid.spec.verify import Verify
from lightning_hybrid.verification.bounds import BoundCheck
from lightning_hybrid.verification.differences import (
    ComputedIn,
    Differences,
    bound_of,
    relative,
    step_bound,
)
from lightning_hybrid.verification.effects import Effects, Unequal, listed, when
from lightning_hybrid.verification.mean import MeanCheck, mean_bound, mean_row, refused_gather
from lightning_hybrid.verification.spread import Spread
from lightning_hybrid.verification.step_differences import StepDifferences
from lightning_hybrid.verification.steps import (
    Conditions,
    Outcome,
    run_in_one_process,
    run_under_layout,
)
from lightning_hybrid.verification.whole import gather_weights, memory_problem
from lightning_hybrid.verification.whole_step import WholeStep


class Comparison:
    """The comparison of one training step, under a layout and in one process.

    Args:
        engine: The engine of the layout.
        args: Arguments of `training_step`, the batch first.
        kwargs: Keyword arguments of `training_step`.
        verify: What is refused.
    """

    def __init__(self, engine: Engine, args: tuple, kwargs: dict[str, Any], verify: Verify) -> None:
        self.engine, self.runner, self.partition = engine, engine.runner, engine.partition
        self.args, self.kwargs, self.verify = args, kwargs, verify
        self.layout = engine.plan.layout
        self.rows: list[tuple[str, str]] = []
        self.bound = step_bound(engine)
        self.parts = 1
        self.how = Conditions()
        self.whole = Outcome(loss=None, gradients={})
        """The step on this replica's batch in one process."""
        self.mean_difference: float | None = None
        """The relative difference of the loss from the mean over parts of its batch, if the comparison shows it."""
        self.mean: Outcome | None = None
        """The mean over parts of the batch, if the step reports other values than on the whole batch."""
        self.measured = StepDifferences(engine)

    def run(self) -> list[tuple[str, str]]:
        """Runs the steps, reports on rank 0, and returns the rows of the report.

        Raises:
            PartitionError: On all ranks, if the step differs from that of one process.
        """
        problem = self._obstacle()
        if problem is None:
            weights = gather_weights(self.partition)
            problem = self._compare(weights)
            if problem is None and self.parts > 1:
                problem = self._check_bounds(weights)
            if problem is None and self.layout.replicas > 1:
                self._check_mean(weights)
        if problem is not None:
            self.rows.append(("loss and gradients", f"not compared with one process: {problem}"))
        if dist.get_rank() == 0:
            headings = (("verified on the first batch", False), ("result", False))
            print(f"{table_text('', headings, self.rows)}\n", end="", file=sys.stderr)  # noqa: T201 -- beside the plan
        return self.rows

    def _check_bounds(self, weights: Weights) -> str | None:
        """Checks that larger values than those of the batch leave its loss a mean over microbatches. Collective."""
        parts = self.parts
        difference = BoundCheck(self._whole_step(weights), parts).run()
        if difference <= mean_bound(self.bound):
            return None
        where = place_of(self.runner.root)
        text = (
            f"{where} computes a loss that is not the mean over the samples of its batch if some of them have large "
            f"values: with {parts} microbatches it is then off by {difference:.1%}"
        )
        if self.runner.microbatches != "auto":
            self._warn([f"`microbatches={self.runner.microbatches}`: {text}. Use `microbatches=1` or 'auto'."])
            return None
        self._undivide(f"1 instead of {parts}: with large values in some samples the loss is off by {difference:.1%}")
        self.mean_difference = None
        return self._compare(weights)

    def _check_mean(self, weights: Weights) -> None:
        """Checks that the loss is a mean over samples, unless the comparison has shown it. Collective."""
        if self.mean_difference is not None:
            self.rows.append(mean_row(self.mean_difference, mean_bound(self.bound)))
            return
        check = MeanCheck(self._whole_step(weights))
        for row in check.run(self.whole, self.measured.weight, self.bound):
            self.rows.append((row.what, row.result))
            if row.message is not None and row.differs:
                self._warn([row.message])
            elif row.message is not None:
                rank_zero_warn(row.message)

    def _whole_step(self, weights: Weights) -> WholeStep:
        return WholeStep(engine=self.engine, weights=weights, args=self.args, kwargs=self.kwargs, how=self.how)

    def _obstacle(self) -> str | None:
        """Returns why a step of one process cannot run, the same on all ranks; None if it can."""
        if hands_out_its_iterator(self.runner.root.trainer):
            return "the step reads its batches itself (`dataloader_iter`)"
        return memory_problem(self.engine)

    # ---- one process

    def _compare(self, weights: Weights) -> str | None:
        """Compares the step with one process; returns why that was not possible, or None."""
        under = self._under_layout()
        found = self._differences_in_parts(under, weights)
        if found is not None:
            self._add_row(found)
            return None
        whole, problem = self._in_one_process(weights, [self.args])
        if whole is None:
            return problem
        if self._draws():  # where no rank of the layout does
            return self._compare(weights)
        self.whole = whole
        found = self.measured.from_process(under, whole, weights)
        if not found.within(self.bound):
            with ComputedIn() as computed:  # the step may enter autocast itself, or cast weights
                repeated, _ = self._in_one_process(weights, [self.args])
            if repeated is None or not self.measured.of_processes(whole, repeated).within(self.bound):
                return "two runs of the same step in one process differ from each other"
            self._widen_bound(computed.dtypes)
        if not found.within(self.bound):
            return self._diagnose(weights, whole, found)
        effects = Effects(self.engine, self.bound)
        effects.compare_state(under, whole)
        effects.compare_written(under, whole, weights)
        divided = self._compare_reported(effects, under, whole, weights)
        if divided:
            does = "returns values that are not means over the samples of its batch"
            remedy = "return tensors with a row for each sample"
            return self._refuse_microbatches(weights, does, listed(divided), remedy)
        self._add_row(found)
        return None

    def _under_layout(self) -> Outcome:
        """Runs the step under the layout, with the microbatches and the random numbers that make it comparable."""
        try:
            under = run_under_layout(self.runner, self.args, self.kwargs, self.how)
        except NotJoinedError as error:  # on all ranks
            if self.runner.microbatches != "auto":
                raise
            self._undivide(f"1: {str(error).partition('. ')[0]}")
            return self._under_layout()
        self.parts = under.parts
        return self._under_layout() if self._draws() else under

    def _draws(self) -> bool:
        """Returns True if the last step has drawn random numbers: from here on these have equal rows. Collective."""
        draws = not self.how.equal_rows and self.engine.run.world.any_rank(self.runner.rng.has_drawn)
        if draws:
            self.how = replace(self.how, equal_rows=True)
        return draws

    def _undivide(self, row: str) -> None:
        """Uses one microbatch from here on; `row` says why."""
        self.runner.microbatches = 1
        self.rows.append(("microbatches", row))

    def _add_row(self, found: Differences) -> None:
        trained = len(found.gradients)
        text = f"largest relative difference {found.largest:.1e} (bound {self.bound:.0e})"
        self.rows.append((f"loss and gradients of {trained} parameters against one process", text))

    def _differences_in_parts(self, under: Outcome, weights: Weights) -> Differences | None:
        """Compares the step with the mean over parts of its batch in one process, where that is enough. Collective.

        If both are equal, the step is that of one process, and its loss is a mean over samples: this saves the second
        check, and the ranks of `tp` and `pp` share the work.

        Returns:
            None, if it shows only one of the two, or the step does more than compute gradients.
        """
        world, spread = self.engine.run.world, Spread(self.engine, self.args, self.parts)
        unfit = spread.problem is not None or bool(under.state or under.written or under.reported.returned)
        unfit |= not self.runner.root.automatic_optimization or self.engine.run.data.batch_weights() is not None
        unfit |= has_batch_norm(self.runner.root)
        unfit |= self.engine.diloco is not None and spread.ranks > 1  # replicas keep their own gradients
        if world.any_rank(unfit):
            return None
        with patched(self.runner.root.trainer.strategy, all_gather=refused_gather):
            mean, _ = self._in_one_process(weights, spread.own)
        if mean is None or world.any_rank(bool(mean.acts or mean.state or mean.written)):
            return None
        mean = spread.joined(mean)
        found = self.measured.from_process(under, mean, weights, default_group())
        if not found.within(self.bound) or found.loss > mean_bound(self.bound):
            return None
        if any(Effects(self.engine, self.bound).unequal(under, mean)):
            self.mean = mean if self.layout.replicas > 1 else None
            return None
        self.mean_difference = found.loss
        return found

    def _compare_reported(self, effects: Effects, under: Outcome, whole: Outcome, weights: Weights) -> dict[str, str]:
        """Compares the values that the step returns besides the loss, and logs, with one process. Collective.

        Returns:
            How returned values differ because of microbatches, by place; all else that differs is a warning.
        """
        unequal = effects.unequal(under, whole)
        of_parts = Unequal({}, {}) if self.mean is None else effects.unequal(self.mean, whole)
        if any(unequal) or of_parts.logged:
            repeated, _ = self._in_one_process(weights, [self.args])
            if repeated is not None:
                varies = effects.unequal(repeated, whole)  # such as times
                unequal, of_parts = unequal.without(varies), of_parts.without(varies)
        if unequal.returned and self.parts > 1:
            return unequal.returned
        named = {"returns": unequal.returned, "logs": unequal.logged}
        messages = [effects.message(does, how, self.parts) for does, how in named.items() if how]
        if of_parts.logged:
            messages.append(effects.message_of_parts(of_parts.logged))
        self._warn(messages)
        return {}

    def _warn(self, messages: Iterable[str]) -> None:
        for message in messages:
            if self.verify.strict:
                raise PartitionError(f"`verify='strict'`: {message}")
            rank_zero_warn(message)

    def _widen_bound(self, dtypes: Collection[torch.dtype]) -> None:
        """Sets the bound of the lowest precision in which the step has computed on any rank. Collective."""
        bound = torch.tensor(max(map(bound_of, dtypes), default=0.0), device=self.engine.device)
        dist.all_reduce(bound, dist.ReduceOp.MAX)
        self.bound = max(self.bound, float(bound))

    def _in_one_process(self, weights: Weights, parts: list[tuple]) -> tuple[Outcome | None, str | None]:
        try:
            outcome, problem = (
                run_in_one_process(self.runner, weights, parts, self.kwargs, self.how, self.measured.weight),
                None,
            )
        except Exception as error:  # noqa: BLE001 -- of the user's step, or memory is too short
            outcome, problem = None, error_message(error)
        problem = first_problem(problem)
        return (outcome, None) if problem is None else (None, problem)

    # ---- causes

    def _diagnose(self, weights: Weights, whole: Outcome, found: Differences) -> str | None:
        """Finds the cause of a difference, and compares again if that can be avoided. Collective.

        Raises:
            PartitionError: Unless another number of microbatches, which the user has left open, is right.
        """
        if self.parts > 1:
            batches = [
                (part, *self.args[1:]) for part in split_batch(self.args[0], self.parts, self.runner.known_samples())
            ]
            split, _ = self._in_one_process(weights, batches)
            if split is not None and not self.measured.of_processes(split, whole).within(self.bound):
                does = "computes a loss that is not the mean over the samples of its batch"
                remedy = 'return `{"loss": ..., "weight": ...}` for a mean over tokens'
                return self._refuse_microbatches(weights, does, self._numbers(found), remedy)
        raise PartitionError(self._difference(found, self._first_module(weights)))

    def _refuse_microbatches(self, weights: Weights, does: str, numbers: str, remedy: str) -> str | None:
        """Compares the step again with one microbatch, if the user has left their number open; else refuses it.

        Raises:
            PartitionError: If the user has given the number.
        """
        runner, parts, where = self.runner, self.parts, place_of(self.runner.root)
        if runner.microbatches != "auto":
            raise PartitionError(
                f"`microbatches={runner.microbatches}`: {where} {does}: with {parts} microbatches {numbers}. Use "
                f"`microbatches=1` or 'auto', {remedy}, or use `layout='{self.layout.moved('pp', 'dp')}'`."
            )
        if runner.root.trainer.global_step:
            rank_zero_warn(
                f"{where} {does}. {when(self.engine)} The last update was made with {parts} microbatches: {numbers}. "
                "From here on 1 is used."
            )
        self._undivide(f"1 instead of {parts}: with {parts} {numbers}")
        return self._compare(weights)

    def _numbers(self, found: Differences) -> str:
        wrong = found.beyond(self.bound)
        worst = max(found.gradients, key=lambda n: found.gradients[n], default="")
        numbers = f"the loss is {found.found_loss:.6g}, that of one process {found.expected_loss:.6g}"
        if wrong:
            numbers += (
                f"; the gradients of {len(wrong)} of {len(found.gradients)} parameters differ, most that of `{worst}` "
                f"by {found.gradients[worst]:.2g} of its norm"
            )
        return numbers

    def _difference(self, found: Differences, first: str) -> str:
        return (
            f"`layout='{self.layout}'`: the step of {place_of(self.runner.root)} does not equal that "
            f"of one process on the same samples: {self._numbers(found)}. {first} {when(self.engine)} Use "
            f"{self._advice()}, or `verify='off'` if the difference is intended."
        )

    def _advice(self) -> str:
        axes = [axis for axis in ("pp", "tp", "ep", "fsdp") if getattr(self.layout, axis) > 1]
        if not axes:
            return "one device"
        other = self.layout
        for axis in axes:
            other = other.moved(axis, "dp")
        return f"a layout without {', '.join(f'`{axis}`' for axis in axes)}, such as '{other}'"

    def _first_module(self, weights: Weights) -> str:
        """Returns a sentence with the first unit whose output differs from one process. Collective."""
        runner = self.runner
        how = replace(self.how, watch=True)
        under = run_under_layout(runner, self.args, self.kwargs, how)
        part = (split_batch(self.args[0], self.parts, self.runner.known_samples())[0], *self.args[1:])
        whole = run_in_one_process(runner, weights, [part], self.kwargs, how, self.measured.weight)
        replica, seen = self.engine.mesh.replica, {}
        for place, outputs in zip(self.engine.mesh.places, gather_objects(under.outputs), strict=True):
            if place.replica(self.layout) == replica:
                seen.update(outputs)
        own = next(
            (
                f"The first module whose output differs is `{name}`."
                for (name, number), expected in whole.outputs.items()
                if (name, number) in seen and not _close(seen[name, number], expected, self.bound)
            ),
            None,
        )
        sentences = gather_objects(own)
        return next((s for s in sentences if s is not None), "The outputs of all modules are equal.")


def _close(found: list[tuple[float, float]], expected: list[tuple[float, float]], bound: float) -> bool:
    """Returns True if means and norms of tensors are equal, up to rounding."""
    return len(found) == len(expected) and all(
        relative(norm, other) <= bound and abs(mean - other_mean) <= bound * max(abs(other), 1e-6)
        for (mean, norm), (other_mean, other) in zip(found, expected, strict=True)
    )
