"""Ghost tensors: shape, dtype and the real device, but no storage.

A parameter that a rank does not own is replaced by a ghost. Every operation on a ghost returns a ghost, so the user's
code runs unchanged up to the part that the rank owns; operations on real tensors (masks, position ids) stay real. Once
the tensor that a ghost represents has been received, `Ghost.materialize` makes every later use of the ghost, from any
list or local variable of the user's code, use the received tensor.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_hybrid._torch_private import (
    READ_SCALAR,
    TO_COPY,
    called_by_torch,
    data_setter,
    disable_torch_function,
    is_data_setter,
    is_mutable,
    make_wrapper,
    mark_as_parameter,
    own_parameters,
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
    user_location,
    written_arguments,
)
from lightning_hybrid.ghosts.shapes import shapes_of_result

_aten = torch.ops.aten
_WHOLE_READS = ("tolist", "numpy", "__array__")
"""Methods that return all values of a tensor to Python; each value is the result of `read`."""
_VALUE_READS = {READ_SCALAR, _aten.equal, _aten.is_nonzero}


_elsewhere: ContextVar[bool] = ContextVar("elsewhere", default=False)


@contextmanager
def unit_of_other_stage() -> Iterator[None]:
    """Runs a unit of another stage on ghosts: what it writes into its buffers is written there."""
    token = _elsewhere.set(True)
    try:
        yield
    finally:
        _elsewhere.reset(token)


class GhostReadError(RuntimeError):
    """The value of a ghost was read (`.item()`, `if tensor:`), which needs a tensor of another rank."""


class GhostWriteError(RuntimeError):
    """A real tensor was written in place with the value of a ghost, which would lose the write."""


class GhostObserver:
    """Callbacks for operations on ghosts. The dry run overrides them to record; the defaults serve a real run."""

    gradients = False
    """True while user code runs for which ghosts of parameters have gradients."""

    def used(self, func: Any, ghosts: list[Ghost]) -> None:
        """Called before `func` runs on `ghosts`."""

    def made(self, func: Any, args: tuple, kwargs: dict, out: Any, ghosts: list[Ghost]) -> None:
        """Called after `func(*args, **kwargs)` (on meta tensors) returned `out`; `ghosts` are the new ghosts."""

    def ran(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        """Called after `func(*args, **kwargs)` (on ghosts) returned `result`."""

    def read(self, ghost: Ghost) -> Any:
        """Called when the value of `ghost` is read; returns the value for the caller, or raises a GhostReadError."""
        raise GhostReadError(
            f"{user_location()} reads the value of a tensor of shape {tuple(ghost.shape)} that is computed on another "
            "pipeline stage."
        )

    def shaped_by(self, ghost: Ghost) -> None:
        """Called when the shape of a result depends on the values of `ghost`; raises, or lets an example decide."""
        self.read(ghost)

    def written(self, func: Any, target: torch.Tensor) -> None:
        """Called when a real tensor `target` is written in place with the value of a ghost."""
        if _elsewhere.get():
            return
        raise GhostWriteError(
            f"{user_location()} writes a value that is computed on another pipeline stage into a tensor of shape "
            f"{tuple(target.shape)} with `{func}`."
        )


class Ghost(torch.Tensor):
    """A tensor with shape, dtype and device, but without storage."""

    meta: torch.Tensor
    received: torch.Tensor | None
    observer: GhostObserver
    uid: int
    """Id set by the observer; -1 if none is set."""
    made_by: Any
    """The operator that has made this ghost; None for a ghost that was made otherwise."""
    wants_grad: bool
    """For a ghost of a parameter: True if the parameter is trained."""
    gradient_hooks: dict[str, OrderedDict]
    """For a ghost of a parameter: hooks on its gradient, by the name of the parameter's table of hooks."""

    @staticmethod
    def __new__(  # noqa: D102 -- the class docstring describes it
        cls,
        meta: torch.Tensor,
        device: torch.device,
        observer: GhostObserver | None = None,
        requires_grad: bool = False,
    ) -> Ghost:
        self = make_wrapper(cls, meta, device, requires_grad)
        self.meta, self.received, self.uid, self.wants_grad = meta, None, -1, requires_grad
        self.observer = observer if observer is not None else GhostObserver()
        self.gradient_hooks, self.made_by = {}, None
        return self

    @property
    def grad(self) -> Ghost | None:  # type: ignore[override]
        """The gradient of a parameter of another stage: a ghost for user code in hooks, None for functions of torch."""
        if not (self.observer.gradients and self.wants_grad) or called_by_torch():
            return None
        return Ghost(torch.empty_like(self.meta), self.device, self.observer)  # writes to it are not to the parameter

    @grad.setter
    def grad(self, value: Any) -> None:
        return None

    def register_hook(self, hook: Any) -> RemovableHandle:
        """Keeps `hook` for the parameter that this ghost represents; it runs on the rank that has the parameter."""
        return self._keep_hook("_backward_hooks", hook)

    def register_post_accumulate_grad_hook(self, hook: Any) -> RemovableHandle:
        """Keeps `hook` as `register_hook` does."""
        return self._keep_hook("_post_accumulate_grad_hooks", hook)

    def _keep_hook(self, table: str, hook: Any) -> RemovableHandle:
        hooks = self.gradient_hooks.setdefault(table, OrderedDict())
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        return handle

    def materialize(self, real: torch.Tensor) -> None:
        """Makes every later use of this ghost use `real` (same shape and dtype)."""
        self.received = real

    def __deepcopy__(self, memo: dict) -> Ghost:
        return self

    def __format__(self, spec: str) -> str:
        if self.received is not None:
            return format(self.received, spec)
        return format(self.item(), spec) if spec and not self.ndim else repr(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Ghost(shape={tuple(self.meta.shape)}, dtype={self.meta.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        flat, spec = tree_flatten((args, kwargs))
        if any(isinstance(x, Ghost) and x.received is not None for x in flat):
            present = [x.received if isinstance(x, Ghost) and x.received is not None else x for x in flat]
            real: Any = tree_unflatten(present, spec)
            return func(*real[0], **real[1])
        if is_data_setter(func) and args[0].shape == args[1].shape:  # a write, which observers shall see
            with torch.no_grad():
                args[0].copy_(args[1])
            return None
        if func is torch.Tensor.__deepcopy__:  # of a real tensor that a ghost was written into
            return args[0]
        if getattr(func, "__name__", "") in _WHOLE_READS and isinstance(args[0], Ghost):
            value = args[0].observer.read(args[0])
            return func(torch.full(args[0].shape, value, dtype=args[0].dtype), *args[1:], **kwargs)
        with disable_torch_function():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if torch.is_inference_mode_enabled():  # ghosts of inference could not become views of others
            with torch.inference_mode(False), torch.no_grad():
                return cls.__torch_dispatch__(func, types, args, kwargs)
        ghosts = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Ghost)]
        observer, device = ghosts[0].observer, ghosts[0].device
        packet = func.overloadpacket
        observer.used(func, ghosts)
        if packet in _VALUE_READS:
            return observer.read(_truth_of(func, ghosts[0]) if packet is _aten.equal else ghosts[0])
        _check_real_writes(func, args, kwargs or {}, observer)
        if packet is TO_COPY:
            device = (kwargs or {}).get("device") or device
        out, meta_args, meta_kwargs = shapes_of_result(
            func, args, kwargs or {}, Ghost, lambda: observer.shaped_by(ghosts[0])
        )
        known: dict[int, Any] = {id(g.meta): g for g in ghosts}
        if is_mutable(func):  # it returns what it writes, which may be real
            known |= {id(meta): real for real, meta in zip(args, meta_args, strict=True)}
        new: list[Ghost] = []

        def wrap(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) in known:
                return known[id(tensor)]  # an in-place operation returns its own argument
            if tensor.device.type != "meta":
                return tensor
            ghost = Ghost(tensor, device, observer)
            ghost.made_by = packet
            new.append(ghost)
            return ghost

        wrapped = tree_map_only(torch.Tensor, wrap, out)
        observer.made(func, meta_args, meta_kwargs, out, new)
        observer.ran(func, args, kwargs or {}, wrapped)
        return wrapped


def ghosts_not_assigned() -> AbstractContextManager:
    """Returns a context in which `tensor.data = ghost` is a write of a ghost; torch would take its missing memory."""

    def assign(tensor: torch.Tensor, value: torch.Tensor, original: Callable[..., None]) -> None:
        if not isinstance(value, Ghost) or isinstance(tensor, Ghost):
            original(tensor, value)
        elif value.received is not None:
            original(tensor, value.received)
        else:
            value.observer.written(_aten.copy_, tensor)

    return data_setter(assign)


def _truth_of(func: Any, ghost: Ghost) -> Ghost:
    """Returns the truth value that `func` finds as a ghost."""
    truth = Ghost(torch.empty((), dtype=torch.bool, device="meta"), ghost.device, ghost.observer)
    truth.made_by = func.overloadpacket
    return truth


def _check_real_writes(func: Any, args: tuple, kwargs: dict, observer: GhostObserver) -> None:
    if not is_mutable(func):
        return
    written = [*zip(written_arguments(func), args, strict=False), *((key == "out", kwargs[key]) for key in kwargs)]
    for value in tree_leaves([value for is_written, value in written if is_written]):
        if isinstance(value, torch.Tensor) and not isinstance(value, Ghost):
            observer.written(func, value)


def is_differentiable(dtype: torch.dtype) -> bool:
    """Returns True if gradients can flow through tensors of this dtype."""
    return dtype.is_floating_point or dtype.is_complex


class Slot(NamedTuple):
    """A tensor and its place in a module tree."""

    name: str
    module: nn.Module
    key: str
    tensor: torch.Tensor


def parameter_slots(root: nn.Module) -> Iterator[Slot]:
    """Yields every parameter of `root` and its children, real or ghost, in order; shared ones under each name."""
    for prefix, module in root.named_modules():
        ghosts = {k: v for k, v in module.__dict__.items() if isinstance(v, Ghost)}
        for key, tensor in {**own_parameters(module), **ghosts}.items():
            if tensor is not None:
                yield Slot(f"{prefix}.{key}" if prefix else key, module, key, tensor)


def ghost_like(
    tensor: torch.Tensor, observer: GhostObserver | None = None, device: torch.device | None = None
) -> Ghost:
    """Returns a leaf ghost with shape, dtype and `requires_grad` of `tensor`, on `device` (None: that of `tensor`)."""
    if isinstance(tensor, Ghost):
        meta = tensor.meta
    else:
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    ghost = Ghost(meta, device or tensor.device, observer, tensor.requires_grad)
    mark_as_parameter(ghost, isinstance(tensor, nn.Parameter))
    return ghost
