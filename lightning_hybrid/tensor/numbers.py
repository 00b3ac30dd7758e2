"""Stand-in values for a unit: every parameter, buffer and argument as a plain float32 tensor.

Parameters may be real, on the meta device or ghosts; a probe needs values, and random ones reveal more than those of
the model (a zero-initialized projection hides the data flow behind it). The global random generators are not used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_hybrid._torch_private import flat_weight_names, forward_hooks_of, own_buffers, recomputation_off
from lightning_hybrid.ghosts.ghost import Ghost, Slot
from lightning_hybrid.ghosts.preserve import preserved_module_state, preserved_objects
from lightning_hybrid.ghosts.trees import map_tensors, sorted_slots, tensors_of
from lightning_hybrid.rng.state import preserved_rng
from lightning_hybrid.spec.tensor_plan import Path

_PLAIN = (torch.Tensor, nn.Parameter)
_PROBE_BATCH, _PROBE_LENGTH = 2, 16
"""Batch and sequence length of a probe, if the unit accepts them: enough tokens that no ReLU channel is dead."""


def buffer_slots(root: nn.Module) -> list[Slot]:
    """Returns every buffer of `root` and its children."""
    return [
        Slot(f"{prefix}.{key}" if prefix else key, module, key, tensor)
        for prefix, module in root.named_modules()
        for key, tensor in own_buffers(module).items()
        if tensor is not None
    ]


def is_float(tensor: torch.Tensor) -> bool:
    """Returns True if gradients can flow through `tensor`."""
    return tensor.dtype.is_floating_point


@contextmanager
def shadowed(entries: list[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Sets `module.key` to a value for each entry; the instance dictionary is read before parameters and buffers."""
    saved: list[tuple[nn.Module, str, Any]] = []
    try:
        for module, key, value in entries:
            saved.append((module, key, module.__dict__.get(key, ...)))
            module.__dict__[key] = value
        yield
    finally:
        for module, key, value in reversed(saved):
            if value is ...:
                del module.__dict__[key]
            else:
                module.__dict__[key] = value


def flat_weights(root: nn.Module, values: dict[tuple[int, str], torch.Tensor]) -> list[tuple[nn.Module, str, Any]]:
    """Returns entries for `shadowed` for recurrent modules, which keep a second list of their weights."""
    return [
        (module, "_flat_weights", [values[id(module), key] for key in flat_weight_names(module)])
        for module in root.modules()
        if isinstance(module, nn.RNNBase)
    ]


@contextmanager
def probing(root: nn.Module) -> Iterator[None]:
    """Runs in evaluation mode with gradients and a fixed seed, without autocast and recomputation; restores `root`."""
    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(preserved_module_state(root))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(recomputation_off())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        torch.default_generator.manual_seed(0)
        for module in root.modules():
            module.__dict__["training"] = False
        yield


@dataclass
class Numbers:
    """Values of all tensors that a unit computes with.

    `parameters` and `buffers` are by relative name, `arguments` by path; `args` and `kwargs` contain the arguments.
    """

    module: nn.Module
    parameters: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    arguments: dict[Path, torch.Tensor]
    derived: set[Path]
    """Arguments that depend on parameters, so gradients flow back through them."""
    args: tuple
    kwargs: dict
    slots: list[Slot] = field(default_factory=list)
    buffer_slots: list[Slot] = field(default_factory=list)

    def entries(
        self, parameters: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]
    ) -> list[tuple[nn.Module, str, Any]]:
        """Returns entries for `shadowed` that make the unit compute with `parameters` and `buffers`."""
        entries: list[tuple[nn.Module, str, Any]] = [(s.module, s.key, parameters[s.name]) for s in self.slots]
        entries += [(s.module, s.key, buffers[s.name]) for s in self.buffer_slots]
        by_place = {(id(s.module), s.key): parameters[s.name] for s in self.slots}
        return entries + flat_weights(self.module, by_place)

    def run(self, arguments: dict[Path, torch.Tensor]) -> list[torch.Tensor]:
        """Runs the unit on `arguments`, by path; attributes of its modules are as before.

        Returns:
            The tensors that the unit has returned, and after them all others that code outside of it can see: in
            lists and dictionaries among its arguments, in attributes of its modules, and in hooks of the user.
        """
        args = map_tensors(lambda path, _: arguments[path], self.args, ("args",))
        kwargs = map_tensors(lambda path, _: arguments[path], self.kwargs, ("kwargs",))
        given = {id(tensor) for tensor in arguments.values()}
        modules = list(self.module.modules())
        with preserved_objects(modules), _seen_by_hooks(self.module) as seen:
            before = [dict(vars(module)) for module in modules]
            out = tensors_of(self.module(*args, **kwargs))
            filled = [tensor for tensor in tensors_of((args, kwargs)) if id(tensor) not in given]
            for module, attributes in zip(modules, before, strict=True):
                changed = {k: v for k, v in vars(module).items() if k[0] != "_" and v is not attributes.get(k, ...)}
                filled += tensors_of(changed)
        return [*out, *filled, *seen]


@contextmanager
def _seen_by_hooks(unit: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects the tensors that forward hooks of the user see inside of `unit`."""
    seen: list[torch.Tensor] = []

    def note(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        seen.extend(tensors_of((args, kwargs, output)))

    hooked = [module for module in unit.modules() if module is not unit and forward_hooks_of(module)]
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in hooked]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def make_numbers(
    module: nn.Module,
    args: tuple,
    kwargs: dict,
    *,
    seed: int,
    sizes: dict[int, int] | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> Numbers:
    """Draws the values of one trial.

    Args:
        module: The unit.
        args: Recorded positional arguments.
        kwargs: Recorded keyword arguments.
        seed: Seed of the values; equal on all ranks, different for each trial.
        sizes: Shorter dim lengths of the arguments, by full length (see `shorter_sizes`).
        weights: Weights of an earlier trial to use again, so that a large block is in memory once.
    """
    generator = torch.Generator().manual_seed(seed)
    slots, buffers = sorted_slots(module), buffer_slots(module)
    drawn: dict[int, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for slot in slots:
        if weights is not None:
            values[slot.name] = weights[slot.name]
            continue
        if id(slot.tensor) not in drawn:
            drawn[id(slot.tensor)] = _random_weight(slot, generator)
        values[slot.name] = drawn[id(slot.tensor)]
    arguments: dict[Path, torch.Tensor] = {}
    derived: set[Path] = set()
    same: dict[int, torch.Tensor] = {}

    def argument(path: Path, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in same:
            same[id(tensor)] = _argument_value(tensor, generator, sizes or {})
        arguments[path] = same[id(tensor)]
        if is_float(tensor) and (isinstance(tensor, Ghost) or tensor.requires_grad):
            derived.add(path)
        return arguments[path]

    return Numbers(
        module=module,
        parameters=values,
        buffers={s.name: _known_or_random(s.tensor, generator) for s in buffers},
        args=map_tensors(argument, without_caches(args), ("args",)),
        kwargs=map_tensors(argument, without_caches(kwargs), ("kwargs",)),
        arguments=arguments,
        derived=derived,
        slots=slots,
        buffer_slots=buffers,
    )


def shorter_sizes(args: tuple, kwargs: dict) -> list[dict[int, int]]:
    """Returns choices of shorter dim lengths for a cheap probe, by full length; the last choice shortens none.

    Batch and sequence length are those of the first floating-point argument of shape [batch, length, ..., channels].
    """
    main = next((t for t in tensors_of((args, kwargs)) if is_float(t) and t.ndim >= 2), None)
    if main is None:
        return [{}]
    batch = {main.shape[0]: _PROBE_BATCH} if main.shape[0] > _PROBE_BATCH else {}
    length = {main.shape[1]: _PROBE_LENGTH} if main.ndim > 2 and main.shape[1] > _PROBE_LENGTH else {}
    choices = [{**batch, **length}, length, batch, {}]
    return [c for i, c in enumerate(choices) if c not in choices[:i]]


def without_caches(tree: Any) -> Any:
    """Returns `tree` with None instead of key-value caches, which a probe would read and fill again."""
    if isinstance(tree, dict) and type(tree) is dict:
        return {k: without_caches(v) for k, v in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(without_caches(v) for v in tree)
    return None if any(base.__name__ == "Cache" for base in type(tree).__mro__) else tree


def _is_known(tensor: torch.Tensor) -> bool:
    return type(tensor) in _PLAIN and tensor.device.type != "meta"


def _random_weight(slot: Slot, generator: torch.Generator) -> torch.Tensor:
    """Draws scales around 1 and biases around 0, so that activations lie on both sides of a ReLU."""
    shape = slot.tensor.shape
    if not is_float(slot.tensor):
        return _known_or_random(slot.tensor, generator)
    value = torch.empty(shape, dtype=torch.float32)
    if slot.key.endswith("bias"):
        return value.uniform_(-0.5, 0.5, generator=generator)
    if len(shape) < 2:
        return value.uniform_(0.5, 1.5, generator=generator)
    bound = math.sqrt(3.0 / max(math.prod(shape[1:]), 1))
    return value.uniform_(-bound, bound, generator=generator)


def _known_or_random(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if _is_known(tensor):
        value = tensor.detach().cpu()
        return value.float() if is_float(value) else value.clone()
    if is_float(tensor):
        return torch.empty(tensor.shape, dtype=torch.float32).normal_(generator=generator)
    return (
        torch.ones(tensor.shape, dtype=torch.bool)
        if tensor.dtype == torch.bool
        else torch.zeros(tensor.shape).to(tensor.dtype)
    )


def _argument_value(tensor: torch.Tensor, generator: torch.Generator, sizes: dict[int, int]) -> torch.Tensor:
    if is_float(tensor) and (tensor.requires_grad or not _is_known(tensor)):
        shape = [sizes.get(n, n) for n in tensor.shape]
        return torch.empty(shape, dtype=torch.float32).normal_(generator=generator)
    value = _known_or_random(tensor, generator)
    for dim, length in enumerate(value.shape):
        value = value.narrow(dim, 0, sizes.get(length, length))
    return value.clone()
