"""Shows a partitioned module as the user wrote it, with whole weights, and divides it again.

The partition stays: its parameters, hooks and classes are set aside, and set back by `divide`, which copies this rank's
parts of the whole weights. Optimizers and process groups keep the objects that they refer to. Where weights are not
shown whole outside of a run, `Refusals` raise for every use that would need them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hybrid.collectives import to_local
from lightning_hybrid.device_memory import free_bytes
from lightning_hybrid.ghosts.contract import StatePlace
from lightning_hybrid.ghosts.ghost import parameter_slots
from lightning_hybrid.parallelize.apply import Partition
from lightning_hybrid.parallelize.placement import index_of, selected
from lightning_hybrid.patching import patched
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout

SHARE_OF_FREE_MEMORY = 0.25
"""Whole weights are shown after a run if they need at most this share of each rank's free memory. Empirical."""


class Weights(NamedTuple):
    """The whole weights of a module on one rank."""

    values: dict[str, Tensor]
    trained: dict[str, bool]
    """`requires_grad` of each parameter on the ranks that hold it."""
    state: dict[StatePlace, Any] = {}  # noqa: RUF012 -- a default of a named tuple
    """State of the module that has values of other pipeline stages on this rank, such as copies of weights, whole."""

    @classmethod
    def gather(cls, partition: Partition) -> Weights:
        """Gathers copies of all weights on every rank. Collective over all ranks."""
        partition.reshard()
        parameters, local = partition.parameters, partition.parameters.local()
        names = parameters.names
        own = [float(n in local and local[n].requires_grad) for n in names]
        flags = torch.tensor(own, device=parameters[names[0]].device if names else None)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        trained = dict(zip(names, map(bool, flags.tolist()), strict=True))
        return cls({name: partition.whole_parameter(name) for name in names}, trained)


class WholeModule:
    """The module of a partition, shown whole or divided.

    Args:
        partition: The applied partition.
    """

    def __init__(self, partition: Partition) -> None:
        self._partition, self._parameters = partition, partition.parameters
        self._divided: dict[str, Tensor] = {}
        self._emptied: dict[str, Tensor] = {}
        """The parameters that were shown last, without storage: they are shown again, since the user may hold them."""
        self._hidden = ExitStack()
        self._structure: list[Any] = []
        self.attributes: dict[str, Any] = {}
        """Attributes of the divided module that the user has not set."""
        self.is_shown = False
        """True while the module is as the user wrote it."""

    # ---- memory

    def fits(self, device: torch.device, ranks: int) -> bool:
        """Returns True if the whole weights need at most `SHARE_OF_FREE_MEMORY` of this rank's free memory.

        Args:
            device: This rank's device.
            ranks: Number of ranks on this machine.
        """
        shapes = {n: self._partition.shape_of(n) for n in self._parameters.names}
        needed = sum(shape.numel() * self._parameters[n].element_size() for n, shape in shapes.items())
        return needed <= SHARE_OF_FREE_MEMORY * (free_bytes(device, ranks) or 0)

    # ---- changes

    def show(self) -> None:
        """Gathers the weights, and shows the module whole. Collective over all ranks."""
        weights = Weights.gather(self._partition)
        self._partition.share_buffers()
        self._put_whole({n: self._shown(n, whole, weights.trained[n]) for n, whole in weights.values.items()})

    def _shown(self, name: str, whole: Tensor, trained: bool) -> Tensor:
        shown = self._emptied.pop(name, None)
        if shown is None:
            shown = nn.Parameter(whole, requires_grad=False)  # of any dtype
        shown.data = whole
        return shown.requires_grad_(trained)

    def _put_whole(self, wholes: dict[str, Tensor]) -> None:
        self._divided = {name: self._parameters[name] for name in self._parameters.names}
        self._hidden.enter_context(self._partition.as_written())
        self._put(wholes)
        for key in self.attributes:
            self._partition.root.__dict__.pop(key, None)
        self._structure = structure_of(self._partition.root)
        self.is_shown = True

    def _put(self, values: dict[str, Tensor]) -> None:
        """Puts other parameters in place, with the user's gradient hooks."""
        hooks = self._partition.gradient_hooks
        if hooks is not None:
            hooks.collect()
        self._parameters.put_all(values)
        if hooks is not None:
            hooks.attach()

    def is_changed(self) -> bool:
        """Returns True if the user has added, removed or replaced parameters of the shown module."""
        return self._structure != structure_of(self._partition.root)

    def agree(self, device: torch.device) -> None:
        """Makes weights of the shown module that differ between ranks those of rank 0. Collective over all ranks."""
        same_weights([self._parameters.visible(name) for name in self._parameters.names], device)

    def divide(self, device: torch.device) -> None:
        """Divides the shown module again and frees the whole weights. Each rank copies parts of its own weights."""
        wholes = self._divide(device)
        for whole in wholes.values():
            whole.data, whole.grad = whole.data.new_empty(0), None
        self._emptied = wholes

    def _divide(self, device: torch.device) -> dict[str, Tensor]:
        self._partition.root.to(device)
        wholes = self.set_back()
        with torch.no_grad():
            for name, part in self._parameters.local().items():
                trained = wholes[name].requires_grad
                part.requires_grad_(trained)
                to_local(part.detach()).copy_(selected(wholes[name].detach(), index_of(self._partition, name)))
        self._parameters.requires_grad.update({n: whole.requires_grad for n, whole in wholes.items()})
        return wholes

    def set_back(self) -> dict[str, Tensor]:
        """Sets the divided parameters back as they were; returns the whole weights."""
        wholes = {name: self._parameters.visible(name) for name in self._parameters.names}
        self._hidden.close()
        self._put(self._divided)
        self._partition.root.__dict__.update(self.attributes)
        self._divided, self.is_shown = {}, False
        return wholes

    @contextmanager
    def divided(self, device: torch.device) -> Iterator[None]:
        """Divides the module for the duration of the context, if it is shown whole."""
        if not self.is_shown:
            yield
            return
        if self.is_changed():
            raise PartitionError(
                "Parameters of the module were added, removed or replaced after the run, so its state no longer "
                "belongs to the optimizers and the layout of the run. Call this before you change the module."
            )
        wholes = self._divide(device)
        try:
            yield
        finally:
            self._put_whole(wholes)


def structure_of(root: nn.Module) -> list[Any]:
    """Returns a description of all parameters: names, the modules that they belong to, shapes, dtypes, sharing."""
    seen: dict[int, int] = {}
    return [
        (s.name, id(s.module), tuple(s.tensor.shape), s.tensor.dtype, seen.setdefault(id(s.tensor), len(seen)))
        for s in parameter_slots(root)
    ]


def same_weights(wholes: Sequence[Tensor], device: torch.device) -> None:
    """Makes weights that differ between ranks those of rank 0, as at the start of a run. Collective over all ranks."""
    if not wholes:
        return
    values = [torch.view_as_real(w.detach()) if w.is_complex() else w.detach() for w in wholes]
    digest = torch.stack([torch.stack([v.double().sum(), v.double().square().sum()]) for v in values]).to(device)
    largest = torch.stack([digest, -digest]).nan_to_num()
    own = largest.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    different = torch.tensor(float(not torch.equal(largest, own)), device=device)
    dist.all_reduce(different)
    if not bool(different):
        return
    with torch.no_grad():
        for whole in wholes:
            sent = whole.detach().to(device).contiguous()
            dist.broadcast(sent, 0)
            whole.copy_(sent)


# ---- where weights are not whole


class Refusals:
    """Raises for uses of a divided module that need whole weights.

    Args:
        root: The module.
        layout: The layout.
    """

    def __init__(self, root: nn.Module, layout: Layout) -> None:
        self._root, self._layout = root, layout
        self._installed = ExitStack()
        self._are_installed = False

    def install(self) -> None:
        """Starts to refuse uses of the module, and of every module inside that has weights."""
        if self._are_installed:
            return
        self._are_installed = True
        for module in self._root.modules():
            if next(parameter_slots(module), None) is None:
                continue
            uses = ("a call", "`state_dict()`", "`load_state_dict()`", "a copy", "a pickle")
            call, state, load, copy, pickle = (Refusal(self._layout, use) for use in uses)
            handles: list[Any] = [
                # before the hooks of `fully_shard`, which would wait for other ranks
                module.register_forward_pre_hook(call, prepend=True),
                module.register_state_dict_pre_hook(state),
                module.register_load_state_dict_pre_hook(load),
            ]
            for handle in handles:
                self._installed.callback(handle.remove)
            self._installed.enter_context(patched(module, __deepcopy__=copy, __reduce_ex__=pickle))

    def remove(self) -> None:
        """Stops to refuse."""
        self._installed.close()
        self._are_installed = False

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Stops to refuse for the duration of the context."""
        installed = self._are_installed
        self.remove()
        try:
            yield
        finally:
            if installed:
                self.install()


class Refusal:
    """A hook, or a method of a module, that raises."""

    def __init__(self, layout: Layout, what: str) -> None:
        self._layout, self._what = layout, what

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Raises the error."""
        raise needs_whole_weights(self._layout, self._what)


def needs_whole_weights(layout: Layout, what: str) -> PartitionError:
    """Returns the error for a use of a divided module that needs whole weights."""
    return PartitionError(
        f"Each rank holds a part of this module's weights, by `layout='{layout}'`, and {what} needs all of them. Use "
        "`with trainer.strategy.whole(module):` around it on all ranks, or `strategy.full_state_dict()`, or a saved "
        "checkpoint, of which `lightning-hybrid consolidate FOLDER OUT` makes one file."
    )
