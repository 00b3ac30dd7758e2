"""Shows hooks of the user the parameters of the whole model.

Under `pp`, `parameters()` would show one stage as if it were the model; values of other stages are refused with the
line. Random numbers for divided weights are those of one process. A hook that replaces a weight is refused, since the
optimizer and checkpoints have the old one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from lightning_hybrid._lightning_private import is_overridden, twins, users_callbacks
from lightning_hybrid._torch_private import location_of, own_modules, own_parameters
from lightning_hybrid.compat.divided_weights import DividedWeights
from lightning_hybrid.compat.optimizers import view_of_updates
from lightning_hybrid.compat.whole_model import whole_model
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.engine.hook_view import HookView
from lightning_hybrid.ghosts.ghost import GhostReadError, GhostWriteError
from lightning_hybrid.ghosts.parameters import Place
from lightning_hybrid.ghosts.preserve import preserved_user_state
from lightning_hybrid.parallelize.describe import refused_addition
from lightning_hybrid.patching import patched
from lightning_hybrid.spec.errors import PartitionError

_LEFT_OUT = {"on_exception", "on_load_checkpoint", "on_before_batch_transfer", "on_after_batch_transfer"}
"""A run that has failed reports its own error, checkpoints are loaded first, and batches belong to loaders."""
_HOOKS = {"configure_gradient_clipping", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step"} | {
    name
    for parent in (pl.LightningModule, pl.Callback)
    for name in dir(parent)
    if name.startswith("on_") and callable(getattr(parent, name)) and name not in _LEFT_OUT
}
_ADAPTED = twins(WeightAveraging)
"""Callbacks that are adapted elsewhere (`compat.averaging`), with classes derived from them."""


class _Child(NamedTuple):
    """A module with parameters, and where it is registered."""

    name: str
    siblings: dict[str, nn.Module | None]
    key: str
    module: nn.Module


def patched_hooks(engine: Engine) -> AbstractContextManager:
    """Patches the user's hooks to see whole parameters; closing the returned context removes the patches."""
    stack = ExitStack()
    children, weights = list(_children_with_parameters(engine.root)), DividedWeights(engine.partition)
    stack.enter_context(patched(engine, full_tensor=weights.full_tensor))
    stack.enter_context(patched(engine.optimizers, view_of=view_of_updates(engine, weights)))
    ended: list[bool] = []
    stack.callback(ended.append, True)
    users = [c for c in users_callbacks(engine.run.trainer) if not isinstance(c, _ADAPTED)]
    for owner in [engine.root, *users]:
        parent: Any = pl.LightningModule if owner is engine.root else pl.Callback
        for name in sorted(_HOOKS):
            if hasattr(parent, name) and name not in owner.__dict__ and is_overridden(name, owner):
                stack.enter_context(
                    patched(owner, **{name: _seeing_all(getattr(owner, name), engine, weights, children, ended)})
                )
    return stack


def _children_with_parameters(root: nn.Module) -> Iterator[_Child]:
    for path, parent in root.named_modules():
        for key, child in own_modules(parent).items():
            if child is not None and any(own_parameters(m) for m in child.modules()):
                yield _Child(f"{path}.{key}" if path else key, own_modules(parent), key, child)


def _seeing_all(
    hook: Callable[..., Any],
    engine: Engine,
    weights: DividedWeights,
    children: Sequence[_Child],
    ended: Sequence[bool],
) -> Callable[..., Any]:
    parameters, layout = engine.partition.parameters, engine.plan.layout
    named = f"`layout='{layout}'`: `{hook.__name__}` ({location_of(hook)})"

    @wraps(hook)
    def run(*args: Any, **kwargs: Any) -> Any:
        if hook.__name__ != "on_before_backward":  # `fsdp` may have weights gathered, of evaluation
            engine.partition.reshard()
        before = parameters.registered()
        view = HookView(partial(whole_model, engine, weights), lambda: bool(ended))
        try:
            with patched(engine, hook_view=view), view, _padding_unseen(engine, hook), _registrations_noted() as added:
                out = hook(*args, **kwargs)
        except AssertionError as error:
            if "does not support deepcopy" not in str(error):
                raise
            raise refused_addition(named, "a copy of a module") from error
        except RuntimeError as error:
            needs_others = isinstance(error, GhostReadError | GhostWriteError) or "pipeline stage" in str(error)
            if layout.pp == 1 or error is view.error_of_step or not needs_others:
                raise  # `load_state_dict` puts errors into another one
            text = " ".join(str(error).splitlines()[:2])
            raise PartitionError(
                f"`layout='{layout}'` divides the weights into pipeline stages, and a hook needs one of another "
                f"stage: {text} Use `torch.nn.utils.clip_grad_norm_` or `gradient_clip_val` to clip, "
                "`strategy.gradient_norms()` and `strategy.full_state_dict()` for norms and weights, or a layout "
                f"without `pp`, such as '{layout.moved('pp', 'dp')}'."
            ) from error
        if not ended:  # else the hook has changed the layout
            _refuse_replacements(engine, hook, before, children)
            if added:
                _refuse_additions(engine, hook, named, added)
        return out

    return run


def _padding_unseen(engine: Engine, hook: Callable[..., Any]) -> AbstractContextManager:
    """Returns a context that undoes what a hook keeps of an evaluated batch, if that is padding on this replica."""
    if hook.__name__ not in ("on_validation_batch_end", "on_test_batch_end") or not engine.runner.padding:
        return nullcontext()
    owner = getattr(hook, "__self__", engine.root)
    return preserved_user_state(engine.root, *([] if owner is engine.root else [owner]))


class _Addition(NamedTuple):
    """A parameter or module that a hook registers."""

    owner: nn.Module
    key: str
    value: nn.Module | nn.Parameter
    replaces: bool
    """True if there was another one, which on this rank may have no weights."""


@contextmanager
def _registrations_noted() -> Iterator[list[_Addition]]:
    """Yields the parameters and modules that are registered in any module in the context, with the module and key."""
    added: list[_Addition] = []

    def note(owner: nn.Module, key: str, value: Any) -> None:
        present = own_modules(owner).get(key), own_parameters(owner).get(key)
        added.append(_Addition(owner, key, value, replaces=any(v is not None for v in present)))

    handles = [register_module_module_registration_hook(note), register_module_parameter_registration_hook(note)]
    try:
        yield added
    finally:
        for handle in handles:
            handle.remove()


def _refuse_additions(engine: Engine, hook: Callable[..., Any], named: str, added: Sequence[_Addition]) -> None:
    """Refuses new parameters of the module, unless each replica has them whole and does not train them."""
    names = {id(module): name for name, module in engine.root.named_modules()}
    known = set(map(id, engine.partition.parameters.registered().values()))
    layout = engine.plan.layout
    for owner, key, value, replaces in reversed(added):  # a module comes after what is inside
        present = own_modules(owner).get(key), own_parameters(owner).get(key)
        if id(owner) not in names or not any(v is value for v in present):
            continue
        new = [p for p in (value.parameters() if isinstance(value, nn.Module) else [value]) if id(p) not in known]
        if new and (layout.devices > layout.dp or any(p.requires_grad for p in new)):
            name = f"{names[id(owner)]}.{key}".removeprefix(".")
            raise _replaced(hook, name) if replaces else refused_addition(named, f"`{name}`")


def _refuse_replacements(
    engine: Engine, hook: Callable[..., Any], before: dict[Place, Any], children: Sequence[_Child]
) -> None:
    parameters = engine.partition.parameters
    if any(value is not before[place] for place, value in parameters.registered().items()):
        engine.partition.reshard()  # of an evaluation in the hook
    after = parameters.registered()
    replaced = next((p.name for p, value in before.items() if after[p] is not value), None)
    replaced = replaced or next((c.name for c in children if c.siblings.get(c.key) is not c.module), None)
    if replaced is not None:
        raise _replaced(hook, replaced)


def _replaced(hook: Callable[..., Any], name: str) -> PartitionError:
    return PartitionError(
        f"`{hook.__name__}` ({location_of(hook)}) replaces `{name}`, or a module that it belongs to. The "
        "optimizer, the partition and checkpoints have the old weight. Write into the weight, as by `with "
        "torch.no_grad(): weight.copy_(value)` or `module.reset_parameters()`, or build the module in "
        "`configure_model` and train it from a later epoch on."
    )
