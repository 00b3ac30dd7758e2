"""Records how a step uses weights, and results of units, outside their modules.

A weight used by code outside its module (`hidden @ self.embedding.weight.T`) must stay whole, and a result that nothing
consumes (attention probabilities that the model drops) need not be correct. Both are recorded while the step runs, for
example during the dry run on ghosts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from lightning_hybrid._torch_private import in_transform, storage_id, tree_flatten, user_location
from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.ghosts.trees import sorted_slots, tensors_of

METADATA = {"size", "dim", "stride", "numel", "ndimension", "element_size", "is_floating_point", "is_contiguous"}
"""Names of functions that ask for the form of a tensor only."""
_NO_WRITES = {"requires_grad_", "detach_", "share_memory_", "rename_"}
_IN_PLACE = {"__setitem__"} | {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}


class StepUse(TorchFunctionMode):
    """The recorded uses of one step, created by `record_use`."""

    def __init__(self, root: nn.Module, units: Collection[str]) -> None:
        super().__init__()
        self.called: set[str] = set()
        """Names of the modules whose forward ran."""
        self.transformed: set[str] = set()
        """Names of the modules whose forward ran inside a transform of `torch.func`."""
        self.computing: dict[str, set[str]] = {}
        """The innermost modules in whose forward each parameter was used ("" is the root)."""
        self.written: dict[str, str] = {}
        """The line that wrote each parameter in place, by name."""
        self._names = {id(module): name for name, module in root.named_modules()}
        self._units = {id(root.get_submodule(name)): name for name in units}
        self._results: dict[int, tuple[str, int, torch.Tensor]] = {}
        self._used: dict[str, set[int]] = {}
        self._counts: dict[str, int] = {}
        self._running: list[int] = []
        self._parameters: dict[int, tuple[torch.Tensor, list[str]]] = {}
        self._storages: dict[int, list[str]] = {}
        for slot in sorted_slots(root):
            self._parameters.setdefault(id(slot.tensor), (slot.tensor, []))[1].append(slot.name)
            self._storages.setdefault(_storage(slot.tensor), []).append(slot.name)

    def unused_results(self, unit: str) -> set[int]:
        """Returns the positions of the tensors in the result of `unit` that nothing consumed."""
        used = self._used.get(unit)
        return set(range(self._counts[unit])) - used if used else set()

    def users(self, parameter: str, within: str) -> set[str]:
        """Returns the modules that compute with `parameter`, other than `within` and its submodules."""
        users = self.computing.get(parameter, set())
        return {user for user in users if within and user != within and not user.startswith(f"{within}.")}

    def entered(self, module: nn.Module) -> None:
        """Records that a module's forward begins."""
        self._running.append(id(module))
        if id(module) in self._names:
            self.called.add(self._names[id(module)])
            if in_transform():
                self.transformed.add(self._names[id(module)])

    def left(self, module: nn.Module, output: Any) -> None:
        """Records that a module's forward has ended with `output`."""
        if id(module) in self._running:
            while self._running.pop() != id(module):
                continue
        unit = self._units.get(id(module))
        if unit is None:
            return
        results = tensors_of(output)
        self._counts[unit] = max(len(results), self._counts.get(unit, 0))
        for i, tensor in enumerate(results):
            self._results[id(tensor)] = unit, i, tensor

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for target in tensors_of(_written(func, args, kwargs)):
            for name in self._storages.get(_storage(target), ()):
                self.written.setdefault(name, user_location())
        if _is_metadata(func, out):
            return out
        current = self._running[-1] if self._running else None
        for value in tree_flatten((args, kwargs))[0]:
            if not isinstance(value, torch.Tensor):
                continue
            if id(value) in self._results:
                unit, i, _ = self._results[id(value)]
                self._used.setdefault(unit, set()).add(i)
            if id(value) in self._parameters:
                for name in self._parameters[id(value)][1]:
                    self.computing.setdefault(name, set()).add(self._names.get(current or 0, ""))
        return out


def _storage(tensor: torch.Tensor) -> int:
    """Returns the id of a tensor's memory, which its views share; for a ghost that of its meta tensor."""
    return storage_id(tensor.meta if isinstance(tensor, Ghost) else tensor)


def _written(func: Any, args: tuple, kwargs: dict) -> Any:
    """Returns the arguments that `func` writes in place."""
    name = getattr(func, "__name__", "")
    if name == "__set__":
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        return args[:1] if attribute in ("data", "real", "imag") else None
    if name in ("embedding", "embedding_bag") and kwargs.get("max_norm") is not None:
        return args[1]  # rows of the weight are scaled to this norm
    in_place = name.endswith("_") and not name.endswith("__") and name not in _NO_WRITES
    if in_place or name in _IN_PLACE:
        return args[:1]
    return kwargs.get("out")


def _is_metadata(func: Any, out: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name in METADATA or name in _NO_WRITES or (name == "__get__" and not isinstance(out, torch.Tensor))


@contextmanager
def record_use(root: nn.Module, units: Collection[str]) -> Iterator[StepUse]:
    """Records a step of `root` that runs in the context; `units` are names of its units.

    The parameters (real or ghost) must be those that the step computes with.
    """
    use = StepUse(root, units)
    before = register_module_forward_pre_hook(lambda module, args: use.entered(module))
    after = register_module_forward_hook(lambda module, args, output: use.left(module, output))
    try:
        with use:
            yield use
    finally:
        before.remove()
        after.remove()
