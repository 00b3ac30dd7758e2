"""Runs optimizers under any layout: parameters by name, the non-finite check, clipping, the loss scale, LBFGS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.optim import LBFGS, SGD, Adafactor, Adagrad, Optimizer

from lightning_hybrid._lightning_private import after_closure_of, post_backward_of
from lightning_hybrid._torch_private import agree_on_overflow
from lightning_hybrid.collectives import gather_objects
from lightning_hybrid.engine.clipping import clip_by_norm, clip_by_value
from lightning_hybrid.engine.hook_view import HookView
from lightning_hybrid.engine.nonfinite import NonFiniteCheck, SkipStep
from lightning_hybrid.engine.norms import global_norm
from lightning_hybrid.engine.step import StepRunner
from lightning_hybrid.parallelize.optimizers import check_membership, replace_parameters
from lightning_hybrid.patching import patched
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout


class OptimizerWrapper:
    """Patches Lightning's precision plugin, which every optimizer step passes through.

    Args:
        runner: The partitioned module.
        on_nonfinite: Policy for non-finite gradients, see `NonFiniteCheck`.
    """

    def __init__(self, runner: StepRunner, on_nonfinite: Literal["raise", "skip"]) -> None:
        self.runner, self.precision, self._on_nonfinite = runner, runner.precision, on_nonfinite
        self._exchange = runner.exchange
        self.logs_wait = False
        """True if logs of a step can wait for the check of its gradients: no hook before the update reads them."""
        self.nonfinite = NonFiniteCheck(runner.partition, runner.device, on_nonfinite, self._exchange)
        self._known_norm: Tensor | None = None
        """Norm of the gradients that the check has computed; None if the gradients may have changed since."""
        self._after_closure = after_closure_of(runner.precision)
        self._post_backward = post_backward_of(runner.precision)
        self._scaler: Any = getattr(runner.precision, "scaler", None)
        self._patches = ExitStack()
        self.names: dict[int, list[list[str]]] = {}
        """Names of the parameters of each group, including those of other stages, by the `id` of the optimizer."""
        self.view_of: Callable[[Optimizer], HookView | None] = lambda optimizer: None
        """Returns the context for the update of an optimizer that does more than compute each element by itself."""
        self._view: HookView | None = None
        self.learning_rate_factor = 1.0
        """Factor on the learning rates in the update only: schedulers and checkpoints have those of the user."""

    def install(self) -> None:
        """Patches the precision plugin."""
        self._patches.enter_context(
            patched(
                self.precision,
                _after_closure=self._checked,
                post_backward=self._gradients_complete,
                clip_grad_by_norm=self._clip_by_norm,
                clip_grad_by_value=clip_by_value,
            )
        )
        if self._scaler is not None:
            self._patches.callback(agree_on_overflow(self._scaler, dist.all_reduce))

    def remove(self) -> None:
        """Removes the patches from the precision plugin."""
        self._patches.close()

    # ---- parameters

    @contextmanager
    def sees_all_parameters(self, strategy: Strategy) -> Iterator[None]:
        """Shows all parameters to `configure_optimizers`; afterwards optimizers hold this rank's parameters only."""
        parameters = self.runner.partition.parameters
        with parameters.all_visible() as ghosts:
            visible = {n: parameters.visible(n) for n in parameters.names}
            names = {id(p): n for n, p in visible.items()}
            yield
            replace_parameters(strategy.optimizers, self.runner.partition.originals, visible)
            root, layout = self.runner.root, self.runner.mesh.layout
            check_membership(strategy.optimizers, visible.values(), root, layout)
        self.names = {}
        for optimizer in strategy.optimizers:
            self.names[id(optimizer)] = [
                [names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups
            ]
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in ghosts]

    def names_in(self, optimizer: Optimizer) -> list[list[str]]:
        """Returns the names of all parameters of each group of `optimizer`, including those of other stages.

        Collective if the user has added groups since the last call (`add_param_group`); in these, names are in the
        order of the model.
        """
        parameters, known = self.runner.partition.parameters, self.names[id(optimizer)]
        names = {id(p): n for n, p in parameters.local().items()}
        own = [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups[len(known) :]]
        if own:
            for groups in zip(*gather_objects(own), strict=True):
                members = set().union(*groups)
                known.append([n for n in parameters.names if n in members])
        return known

    # ---- steps

    def _gradients_complete(self, tensor: Tensor, module: Any) -> Tensor:
        """Divides gradients by the sum of the losses' weights, before hooks see them."""
        self.runner.loss_weights.finish(self.runner.partition.parameters.local().values())
        return self._post_backward(tensor, module)

    def _checked(self, model: Any, optimizer: Any) -> None:
        """Checks the complete gradients, and continues with hooks and clipping, before the update."""
        with nullcontext() if self._view is None else self._view.left():
            self._check_and_call_hooks(model, optimizer)

    def _check_and_call_hooks(self, model: Any, optimizer: Any) -> None:
        if self._scaler is None:  # a scaler expects infinite gradients, and skips the step on all ranks
            self._known_norm = self.nonfinite.check(optimizer, model.trainer)
        else:
            self.nonfinite.exchange_unchecked(optimizer, model.trainer)
        try:
            self._after_closure(model, optimizer)
        finally:
            self._known_norm = None
        for group in optimizer.param_groups if self.learning_rate_factor != 1.0 else ():
            group["lr"] = group["lr"] * self.learning_rate_factor

    def _clip_by_norm(self, optimizer: Optimizer, max_norm: int | float) -> None:
        norm = self._known_norm
        if norm is None:
            norm = global_norm(self.runner.partition, optimizer, self.runner.device)
        clip_by_norm(optimizer, float(max_norm), norm)

    def step(
        self, step: Callable[..., Any], optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Runs Lightning's `optimizer_step`; returns None if the non-finite check skips the step."""
        if isinstance(optimizer, LBFGS) and self.runner.mesh.layout.replicas > 1:
            closure = self._of_all_replicas(closure)
        rates = [group["lr"] for group in optimizer.param_groups] if self.learning_rate_factor != 1.0 else []
        try:
            self._exchange.check_follows = self.logs_wait
            with self._seen_by(optimizer) as outside:
                out = step(optimizer, outside(closure), *args, **kwargs)
            if self._exchange.logs.pending:  # a precision plugin of the user has not run the check
                self._exchange.run()
            if self.runner.gradients.diloco is not None:
                self.runner.gradients.diloco.after_step()
            return out
        except SkipStep:
            return None
        finally:
            self._exchange.check_follows = False
            for group, rate in zip(optimizer.param_groups, rates, strict=False):
                group["lr"] = rate

    @contextmanager
    def _seen_by(self, optimizer: Optimizer) -> Iterator[Callable[[Callable[[], Any]], Callable[[], Any]]]:
        """Runs an update in its `view_of`; yields a function that makes a closure run outside of the view."""
        view = self.view_of(optimizer)
        if view is None:
            yield lambda closure: closure
            return

        def outside(closure: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                with view.left():
                    return closure()

            return run

        with patched(self, _view=view), view:
            yield outside

    def _of_all_replicas(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Returns a closure with the mean loss of all replicas: by the loss LBFGS decides how often to call it."""

        def mean() -> Any:
            loss = closure()
            if isinstance(loss, Tensor):
                context, group = self.runner.context, self.runner.mesh.replica_group
                weights = None if context is None else context.loss_weights
                weight = 1.0 if weights is None else sum(weights)
                both = torch.stack([loss.detach() * weight if weight else loss.new_zeros(()), loss.new_tensor(weight)])
                dist.all_reduce(both, group=group)
                loss = both[0] / both[1]
            return loss

        return mean

    def check_optimizers(self, optimizers: Sequence[Optimizer], layout: Layout | None = None) -> None:
        """Refuses optimizers that cannot give the result of one process.

        Args:
            optimizers: All optimizers of the module.
            layout: The layout; None: the current one.

        Raises:
            PartitionError: If an optimizer does not support the layout, or `on_nonfinite`.
        """
        layout = layout or self.runner.mesh.layout
        divided = layout.fsdp > 1 or layout.tp > 1 or layout.ep > 1
        for optimizer in optimizers:
            fused = isinstance(optimizer, SGD | Adagrad) and any(g.get("fused") for g in optimizer.param_groups)
            if divided and (fused or isinstance(optimizer, Adafactor)):
                raise PartitionError(
                    f"`configure_optimizers` returned {type(optimizer).__name__}{'(fused=True)' if fused else ''}, "
                    f"which torch has not written for divided weights; `layout='{layout}'` divides them. Use "
                    f"{'`fused=False`' if fused else 'AdamW'}, or a layout of `dp` and `pp`."
                )
            if not isinstance(optimizer, LBFGS):
                continue
            if layout.devices != layout.dp:
                raise PartitionError(
                    f"`configure_optimizers` returned LBFGS, which multiplies whole gradients with each other; "
                    f"`layout='{layout}'` divides them among ranks. Use a layout of `dp` only, or another optimizer."
                )
            if self._on_nonfinite == "skip":
                raise PartitionError(
                    "`on_nonfinite='skip'` cannot leave out a step of LBFGS, which updates the weights several times "
                    "in one. Use `on_nonfinite='raise'`."
                )
