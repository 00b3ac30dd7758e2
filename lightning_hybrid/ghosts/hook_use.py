"""Which weights user code writes, and from which others, in a step or in hooks: an averaged teacher, a target net."""

from __future__ import annotations

import contextlib
import inspect
import io
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from types import FunctionType, SimpleNamespace
from typing import Any

from lightning.pytorch import LightningModule

from lightning_hybrid._lightning_private import is_overridden, users_callbacks
from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.ghosts.outside import names_in
from lightning_hybrid.ghosts.preserve import preserved_objects

_HOOKS: dict[str, Callable[[tuple, Any], tuple]] = {
    "on_train_batch_start": lambda args, loss: (args[0], 0),
    "on_before_zero_grad": lambda args, loss: (SimpleNamespace(param_groups=[]),),
    "on_after_backward": lambda args, loss: (),
    "on_before_optimizer_step": lambda args, loss: (SimpleNamespace(param_groups=[]),),
    "on_train_batch_end": lambda args, loss: ({"loss": loss}, args[0], 0),
}
"""Hooks around a batch, with their arguments by those of the step and its loss."""
_ASKS = {"parameters", "named_parameters", "state_dict", "load_state_dict"}
"""Names in code that asks for parameters."""
_WRITES = {"copy_", "lerp_", "mul_", "add_", "set_", "data", "load_state_dict"}
"""Names in code that writes them. Other code of callbacks is not run in a dry run: it may log what it finds."""
_OTHERS = ("lightning.", "pytorch_lightning.", "lightning_hybrid.", "torch.")
"""Packages whose code follows no weights, or is adapted elsewhere."""


class HookUse:
    """Records operations on ghosts of parameters, in hooks and in the code of a step outside units.

    Args:
        names: The names of the parameters, by the id of the ghost.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names, self.running = names, False
        self._from: dict[int, set[str]] = {}
        self._last: set[str] = set()
        self._alive: list[Ghost] = []
        self.followers: dict[str, set[str]] = defaultdict(set)
        """By weight that is written: the weights that its new value comes from."""

    def run(self, root: LightningModule, args: tuple, loss: Any) -> None:
        """Runs the hooks that ask for parameters; what a hook cannot do on ghosts is left out.

        Args:
            root: The LightningModule. The hooks of its trainer's callbacks are run, too, if they write parameters.
            args: Arguments of the step.
            loss: What the step has returned.
        """
        trainer: Any = None
        with contextlib.suppress(RuntimeError):  # not attached to one
            trainer = root.trainer
        callbacks = [] if trainer is None else users_callbacks(trainer)
        self.running = True
        try:
            with preserved_objects(callbacks), contextlib.redirect_stdout(io.StringIO()):
                for name, arguments in _HOOKS.items():
                    if is_overridden(name, root) and _names_of(root, name) & _ASKS:
                        _run_if_possible(_own(root, name), *arguments(args, loss))
                    for callback in callbacks:
                        names = _names_of(callback, name) if is_overridden(name, callback) else set()
                        if names & _ASKS and names & _WRITES:
                            _run_if_possible(_own(callback, name), trainer, root, *arguments(args, loss))
        finally:
            self.running = False

    def used(self, ghosts: list[Ghost], targets: Collection[str]) -> None:
        """Records an operation on `ghosts`, which writes the weights `targets`."""
        self._last = set().union(*map(self._sources, ghosts))
        for target in targets:
            self.followers[target] |= self._last - {target}

    def made(self, ghosts: list[Ghost]) -> None:
        """Records the results of the last operation."""
        for ghost in ghosts:
            self._from[id(ghost)] = self._last
        self._alive += ghosts

    def _sources(self, ghost: Ghost) -> set[str]:
        name = self._names.get(id(ghost))
        return self._from.get(id(ghost), set()) if name is None else {name}


def _own(owner: Any, name: str) -> Callable[..., Any]:
    """Returns a hook as the user has written it, without the patch that shows it the weights of a running engine."""
    hook = getattr(owner, name)
    return getattr(hook, "__wrapped__", hook) if name in vars(owner) else hook


def _run_if_possible(hook: Callable[..., Any], *args: Any) -> None:
    with contextlib.suppress(Exception):  # of any class: user code runs on tensors without values
        hook(*args)


def _names_of(owner: Any, hook: str) -> set[str]:
    """Returns the names in the code of a hook, and in that of the methods and functions of the user that it calls."""
    found: set[str] = set()
    functions, seen = [getattr(type(owner), hook)], set()
    while functions:
        function = functions.pop()
        code = getattr(inspect.unwrap(function), "__code__", None)  # `torch.no_grad()` wraps
        if code is None or code in seen:
            continue
        seen.add(code)
        names = names_in(code)
        found |= names
        known = getattr(inspect.unwrap(function), "__globals__", {})
        called = [getattr(type(owner), n, known.get(n)) for n in names]
        functions += [f for f in called if isinstance(f, FunctionType) and not _is_of_others(f)]
    return found


def _is_of_others(value: Any) -> bool:
    return f"{getattr(value, '__module__', '')}.".startswith(_OTHERS)
