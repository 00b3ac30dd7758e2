"""Checks that logged values do not depend on how the samples are divided among replicas.

Steps of evaluation and hooks log values that each replica computes from its own samples: the mean over replicas is the
value of one process only if it is a mean over samples. A perplexity, an F1 score, or the standard deviation of kept
losses is none. After the first epoch of a loop, the first batches of this replica are run again, as a whole and in two
parts, each by the step and the hooks that log, on the module of one process and without effect. Values of the whole
must be the means of those of the parts, or sums and extremes as logged.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_hybrid._lightning_private import as_hook, is_overridden, users_callbacks
from lightning_hybrid._torch_private import BatchNorm, location_of
from lightning_hybrid.batches import copied_batch, count_samples, find_samples, samples_of_batch
from lightning_hybrid.collectives import error_message, first_problem, gather_objects
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.engine.loss_weights import weight_of
from lightning_hybrid.ghosts.preserve import preserved_objects
from lightning_hybrid.metrics.logs import LogRecorder, by_name
from lightning_hybrid.parallelize.whole import Weights
from lightning_hybrid.patching import patched
from lightning_hybrid.replicas.batch_norm import normalizes_by_batch_only
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.verification.effects import listed
from lightning_hybrid.verification.mean import refused_gather
from lightning_hybrid.verification.reported import Reported, reported, unequal_logs
from lightning_hybrid.verification.steps import Conditions, compared_conditions, step_of_one_process_undone
from lightning_hybrid.verification.whole import gather_weights, memory_problem, whole_module

_NO_BATCH = -1
_KEPT = 2
"""Number of batches of each loader that are run again, as in Lightning's sanity check."""


class _Hooks(NamedTuple):
    """The hooks around a step that see its batches and results."""

    begins: str
    after_batch: str
    ends: str


_HOOKS = {
    "training_step": _Hooks("on_train_epoch_start", "on_train_batch_end", "on_train_epoch_end"),
    "validation_step": _Hooks("on_validation_epoch_start", "on_validation_batch_end", "on_validation_epoch_end"),
    "test_step": _Hooks("on_test_epoch_start", "on_test_batch_end", "on_test_epoch_end"),
}


class _Batch(NamedTuple):
    """The arguments of a step."""

    number: int
    """The same for parts of the same batch."""
    args: tuple


_Batches = list[_Batch]


class LoggedValues:
    """Checks the values that steps of evaluation and hooks log.

    Args:
        engine: The engine of the layout.
        strict: True to refuse values that depend on the division, instead of a warning.
        bound: Largest relative difference of equal values.
    """

    def __init__(self, engine: Engine, *, strict: bool, bound: float) -> None:
        self.engine, self._runner, self._strict, self._bound = engine, engine.runner, strict, bound
        self._kept: dict[str, dict[int, list[tuple]]] = defaultdict(lambda: defaultdict(list))
        self._uneven: set[str] = set()
        self._checked: set[tuple[str, bool]] = set()
        self._judged: dict[tuple[str, bool], set[str]] = defaultdict(set)

    def before_step(self, name: str, args: tuple) -> None:
        """Keeps the first batches of an epoch, and notes whether replicas have different numbers of samples."""
        loader = args[2] if len(args) > 2 and isinstance(args[2], int) else 0
        kept, weights = self._kept[name][loader], self.engine.run.data.batch_weights()
        if weights is not None and len(set(weights.counts)) > 1:
            self._uneven.add(name)
        elif len(kept) < _KEPT and args and not self._done(name):
            kept.append(args)

    def _done(self, name: str) -> bool:
        return (name, True) in self._checked

    def after_epoch(self, name: str) -> None:
        """Checks what has been logged, if it is time. Collective over all ranks.

        Args:
            name: The name of the step of the loop that has ended an epoch; of training, also within an epoch.

        Raises:
            PartitionError: On all ranks with `strict`, if a value depends on the division.
        """
        uneven = name in self._uneven
        hooks = _HOOKS[name]
        logged = self.engine.hook_logs.differing
        keys = set().union(*(logged.get(hook, ()) for hook in hooks)) - self._judged[name, uneven]
        steps = name != "training_step" and (name, uneven) not in self._checked
        if not (keys or steps) or not any(self._kept[name].values()):
            return
        self._checked.add((name, uneven))
        self._judged[name, uneven] |= keys
        if not normalizes_by_batch_only(self._runner.root) and memory_problem(self.engine) is None:
            with self.engine.run.told("verify", "Comparing logged values with another division of the samples"):
                self._check(name, keys, uneven, steps=steps)

    def _check(self, name: str, keys: set[str], uneven: bool, *, steps: bool) -> None:
        weights = gather_weights(self.engine.partition)
        divided = self._divided(name, uneven)
        if first_problem("a batch cannot be divided" if divided is None else None) is not None or divided is None:
            return
        whole, *parts = divided
        found: list[tuple[Reported, Reported]] = []
        for batches in ([whole], parts, [whole]):
            outcome, problem = None, None
            try:
                outcome = self._run(name, batches, weights, with_hooks=bool(keys))
            except Exception as error:  # noqa: BLE001 -- of the user's code, with a part of a batch
                problem = error_message(error)
            if first_problem(problem) is not None or outcome is None:
                return
            found.append(outcome)
        (of_steps, of_hooks), (steps_of_parts, hooks_of_parts), (steps_again, hooks_again) = found
        if steps:
            self._report(name, self._unequal(steps_of_parts, of_steps, steps_again))
        unequal = self._unequal(hooks_of_parts, of_hooks, hooks_again)
        for hook in _HOOKS[name]:
            of_hook = self.engine.hook_logs.differing.get(hook, set()) & keys
            self._report(hook, {key: how for key, how in unequal.items() if key in of_hook})

    def _unequal(self, parts: Reported, whole: Reported, again: Reported) -> dict[str, str]:
        """Returns how values differ on any rank, without those that differ from run to run. Collective."""
        varies = unequal_logs(again, whole, self._bound)
        own = {k: how for k, how in unequal_logs(parts, whole, self._bound).items() if k not in varies}
        merged: dict[str, str] = {}
        for of_rank in gather_objects(own):
            merged = of_rank | merged
        return merged

    def _report(self, place: str, how: dict[str, str]) -> None:
        if not how:
            return
        layout = self.engine.plan.layout
        message = (
            f"{self._where(place)} logs values that depend on how samples are divided: computed from parts of the "
            f"first batches, {listed(how)}. Under `layout='{layout}'` each replica computes them from its own samples, "
            "and their mean is logged, as under DistributedDataParallel, which differs from one process by about as "
            "much. Log a `torchmetrics.Metric`, means over samples in a step, or values "
            "computed from `self.all_gather(...)`."
        )
        if self._strict:
            raise PartitionError(f"`verify='strict'`: {message}")
        rank_zero_warn(message)

    def _where(self, place: str) -> str:
        root = self._runner.root
        owners = [root, *users_callbacks(root.trainer)]  # type: ignore[arg-type]
        having = [o for o in owners if hasattr(o, place)]  # callbacks have no steps
        found = [getattr(type(o), place) for o in having if place in _HOOKS or is_overridden(place, o)]
        return f"`{place}` ({', '.join(map(location_of, dict.fromkeys(found[:2])))})" if found else f"`{place}`"

    # ---- another division

    def _divided(self, name: str, uneven: bool) -> list[_Batches] | None:
        """Returns the kept batches, and two parts of them; None if they cannot be divided.

        Args:
            name: The name of the step.
            uneven: True if the second part has one sample fewer, as a replica may.
        """
        whole, first, second, numbers = _Batches(), _Batches(), _Batches(), itertools.count()
        for kept in filter(None, self._kept[name].values()):
            rows = [find_samples(args[0]).count for args in kept]
            if all(count is None or count == 1 for count in rows) and not uneven:
                for one, other in zip(kept[::2], kept[1::2], strict=False):  # replicas take turns with whole batches
                    batches = [_Batch(next(numbers), args) for args in (one, other)]
                    whole, first, second = [*whole, *batches], [*first, batches[0]], [*second, batches[1]]
                continue
            lacks = [0] * len(kept)
            if uneven:  # after batches of equal sizes
                kept, rows, lacks = [*kept, *kept[-1:]], [*rows, *rows[-1:]], [*lacks, 1]
            for (batch, *rest), count, lack in zip(kept, rows, lacks, strict=True):
                if count is None or count == 1:
                    return None
                number, half, end = next(numbers), count // 2, count // 2 * 2 - lack
                for part, samples in ((whole, slice(end)), (first, slice(half)), (second, slice(half, end))):
                    if samples.stop > (samples.start or 0):
                        part.append(_Batch(number, (samples_of_batch(batch, count, samples), *rest)))
        return [whole, first, second] if first and second else None

    def _run(
        self, name: str, parts: Sequence[_Batches], weights: Weights, *, with_hooks: bool
    ) -> tuple[Reported, Reported]:
        """Runs steps and hooks of one process on each of the parts, without effect.

        Returns:
            What steps and hooks have logged, reduced over the parts.
        """
        root, trainer = self._runner.root, self._runner.root.trainer
        recorders = LogRecorder(root), LogRecorder(root)
        of_loss: list[float | None] = []  # the weight that each step returns
        step: Callable[..., Any] = getattr(root, name)
        with ExitStack() as stack:
            whole = stack.enter_context(whole_module(self.engine.partition, weights))
            stack.enter_context(compared_conditions(self._runner, Conditions(equal_rows=True)))
            stack.enter_context(torch.no_grad())
            stack.enter_context(self._runner.order.paused())
            stack.enter_context(patched(self.engine.partition, alone=lambda: True))  # of statistics of all replicas
            for module in (m for m in root.modules() if isinstance(m, BatchNorm)):
                stack.enter_context(patched(module, training=False))
            for index, batches in enumerate(parts):
                with step_of_one_process_undone(self._runner, whole.values()), _without_effects(trainer):
                    logs = _Logs(recorders, root, index)
                    owners = _owners(root) if with_hooks else []
                    self._call(owners, _HOOKS[name].begins, logs)
                    for number, args in batches:
                        logs.samples, logs.batch, logs.part = count_samples(args[0]), number, len(of_loss)
                        rng = self._runner.rng.evaluation(name, number)
                        with logs.recording(hooks=False), self._runner.run.step_context(), rng, self._by_itself():
                            self._runner.rng.begin(0)
                            out = step(*copied_batch(args))
                        of_loss.append(weight_of(out))
                        batch, *place = (*args, number) if len(args) == 1 else args
                        self._call(owners, _HOOKS[name].after_batch, logs, _output(name, out), batch, *place)
                    logs.samples, logs.batch = sum(count_samples(args[0]) for _, args in batches), _NO_BATCH
                    self._call(owners, _HOOKS[name].ends, logs)
        weighted = [weight or 0.0 for weight in of_loss] if any(w is not None for w in of_loss) else None
        of_steps, of_hooks = (r.reduced(w) for r, w in zip(recorders, (weighted, None), strict=True))
        return reported([None], [1], of_steps), reported([None], [1], of_hooks)

    @contextmanager
    def _by_itself(self) -> Iterator[None]:
        """Refuses what depends on the samples of other replicas: values of steps are right with it, and not checked."""
        with ExitStack() as stack:
            stack.enter_context(patched(self._runner.root.trainer.strategy, all_gather=refused_gather))
            stack.enter_context(patched(self.engine.metrics, announce=refused_gather))
            stack.enter_context(patched(self.engine.run, may_communicate=False))
            yield

    def _call(self, owners: Sequence[Any], hook: str, logs: _Logs, *args: Any) -> None:
        root = self._runner.root
        with logs.recording(hooks=True), as_hook(root, hook):
            for owner in owners:
                if is_overridden(hook, owner):
                    first = () if owner is root else (root.trainer, root)
                    getattr(type(owner), hook)(owner, *first, *args)  # without what the strategy installs around it


def _output(name: str, out: Any) -> Any:
    """Returns what hooks get of the result of a step."""
    if name != "training_step" or out is None:
        return out
    loss = {"loss": out} if isinstance(out, Tensor) else dict(out)
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in loss.items()}


def _owners(root: Any) -> list[Any]:
    """Returns copies of the user's callbacks that can be copied, and the module, in the order of Lightning's calls."""
    trainer, found = root.trainer, []
    for callback in users_callbacks(trainer):
        with contextlib.suppress(Exception):
            found.append(copy.deepcopy(callback, {id(trainer): trainer, id(root): root}))
    return [*found, root]


class _Logs:
    """Records `self.log` calls of steps and of hooks for one part of the samples."""

    def __init__(self, recorders: tuple[LogRecorder, LogRecorder], root: Any, part: int) -> None:
        self._recorders, self._root, self.part = recorders, root, part
        self._seen: Counter[tuple[bool, int, str]] = Counter()
        self.batch = _NO_BATCH
        """Number of the running batch."""
        self.samples = 1
        """Weight of a value that is logged without `batch_size`."""

    @contextmanager
    def recording(self, *, hooks: bool) -> Iterator[None]:
        """Records calls for the duration of the context."""

        def log(*args: Any, **kwargs: Any) -> None:
            options = by_name(self._root, args, kwargs)
            key = hooks, self.batch, options["name"]
            call = self.batch, options["name"], self._seen[key]
            self._seen[key] += 1
            self._recorders[hooks].record(self.samples, call, self.part, **options)

        with patched(self._root, log=log):
            yield


@contextmanager
def _without_effects(trainer: Any) -> Iterator[None]:
    """Undoes or leaves out what hooks do to the trainer, loggers, checkpoints and the terminal."""
    groups = [(group, dict(group)) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    stop, schedulers = trainer.should_stop, [config.scheduler for config in trainer.lr_scheduler_configs]
    with ExitStack() as stack:
        stack.enter_context(preserved_objects(schedulers))
        stack.enter_context(patched(trainer, save_checkpoint=lambda *_, **__: None))
        loggers = [DummyLogger()] if trainer.loggers else []
        stack.callback(setattr, trainer, "loggers", trainer.loggers)
        trainer.loggers = loggers
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        try:
            yield
        finally:
            trainer.should_stop = stop
            for group, options in groups:
                group.clear()
                group.update(options)
