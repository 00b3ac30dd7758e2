"""Private APIs of tensor subclasses, dispatch modes, operators and storages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.overrides
from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore[reportMissingModuleSource]
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

_aten = torch.ops.aten
GROUPED_MM = _aten._grouped_mm
READ_SCALAR = _aten._local_scalar_dense
"""The operator of `.item()`."""
TO_COPY = _aten._to_copy
"""The operator of `.to(...)` where it copies."""
FLASH_ATTENTION_CPU = _aten._scaled_dot_product_flash_attention_for_cpu
FLASH_ATTENTION_CPU_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward
INDEXED = (_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index, _aten._index_put_impl_)
"""The operators of `tensor[...]` and `tensor[...] = value` with tensors as indices."""
PACK_SEQUENCE = _aten._pack_padded_sequence
"""The operator of `pack_padded_sequence`."""
ATTENTION = (
    FLASH_ATTENTION_CPU,
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_cudnn_attention,
)
"""The operators that `scaled_dot_product_attention` runs."""

_META_RESULTS: dict[Any, list[tuple]] = {}
"""Size, strides and dtype of the results of `run_on_meta`, by call."""
_MANY_RESULTS = 8192
_HASHED = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)

DispatchMode = TorchDispatchMode
"""Base class of modes that see every operator that runs, below autograd, results of collectives included."""


def make_wrapper(cls: type, meta: torch.Tensor, device: torch.device, requires_grad: bool) -> Any:
    """Returns a tensor of class `cls` without storage, with the shape and dtype of `meta`, on `device`."""
    return torch.Tensor._make_wrapper_subclass(
        cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=device, requires_grad=requires_grad
    )


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the local tensor of a DTensor without autograd, and any other tensor unchanged."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def run_on_meta(func: Any, args: tuple, kwargs: dict) -> Any:
    """Runs `func` on meta tensors; equal calls of operators that only compute have their results from the first one.

    A meta kernel written in Python costs up to a millisecond, and equal layers call it again and again.
    """
    key = _meta_key(func, args, kwargs)
    if key is not None and key in _META_RESULTS:
        shapes = [torch.empty_strided(*size, dtype=dtype, device="meta") for *size, dtype in _META_RESULTS[key]]
        return shapes[0] if len(func._schema.returns) == 1 else tuple(shapes)
    result = _run_on_meta(func, args, kwargs)
    outputs = result if isinstance(result, tuple) else (result,)
    if key is not None and len(outputs) == len(func._schema.returns) and _are_new(outputs, args):
        if len(_META_RESULTS) >= _MANY_RESULTS:
            _META_RESULTS.clear()
        _META_RESULTS[key] = [(o.shape, o.stride(), o.dtype) for o in outputs]
    return result


def _run_on_meta(func: Any, args: tuple, kwargs: dict) -> Any:
    """Runs `func` on meta tensors, also where torch has a meta kernel for bfloat16 only (`_grouped_mm`)."""
    if func.overloadpacket is not GROUPED_MM:
        return func(*args, **kwargs)
    dtype = args[0].dtype
    return func(*(a.to(torch.bfloat16) for a in args[:2]), *args[2:], **kwargs).to(dtype)


def _meta_key(func: Any, args: tuple, kwargs: dict) -> Any:
    """Returns all that the shapes of the results depend on; None for an operator that writes or returns a view."""
    if any(value.alias_info is not None for value in (*func._schema.arguments, *func._schema.returns)):
        return None
    given = _shapes_in((*args, *kwargs.items()))
    return None if given is None else (func, given, torch.get_default_dtype(), torch.is_grad_enabled())


def _shapes_in(value: Any) -> Any:
    if isinstance(value, list | tuple):
        inside = [_shapes_in(x) for x in value]
        return None if None in inside else (type(value), *inside)
    if type(value) is torch.Tensor:
        plain = value.is_meta and value.layout == torch.strided and not value.is_complex() and not value.is_nested
        return (value.shape, value.stride(), value.dtype) if plain else None
    return (type(value), value) if value is None or isinstance(value, _HASHED) else None


def _are_new(outputs: tuple, args: tuple) -> bool:
    """Returns True if `outputs` are dense tensors on the meta device in memory of their own."""
    if not all(type(o) is torch.Tensor and o.is_meta and o.layout == torch.strided for o in outputs):
        return False
    memory = [storage_key(t) for t in (*outputs, *args) if isinstance(t, torch.Tensor)]
    return len({*memory[: len(outputs)]} - {*memory[len(outputs) :]}) == len(outputs)


def run_kernel(func: Any, args: tuple, kwargs: dict) -> Any:
    """Runs the kernel of an operator made of other operators, so that an entered `DispatchMode` sees the others."""
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    return func._op_dk(key, *args, **kwargs) if func.has_kernel_for_dispatch_key(key) else func(*args, **kwargs)


@contextmanager
def function_mode_left(mode: TorchFunctionMode) -> Iterator[None]:
    """Leaves `mode` for the duration of the context if it is the innermost mode; otherwise does nothing."""
    stack = torch.overrides._get_current_function_mode_stack()
    if not stack or stack[-1] is not mode:
        yield
        return
    torch.overrides._pop_mode()
    try:
        yield
    finally:
        torch.overrides._push_mode(mode)


def is_data_setter(function: Any) -> bool:
    """Returns True for the function of torch that `tensor.data = value` calls."""
    return getattr(function, "__name__", "") == "__set__" and getattr(function, "__self__", None) is torch.Tensor.data


class _Data:
    """Takes the place of the attribute `torch.Tensor.data`; has what functions of torch have."""

    __name__ = "data"

    def __init__(self, setter: Callable[[torch.Tensor, torch.Tensor, Callable[..., None]], None]) -> None:
        self._setter = setter
        self._original: Any = torch.Tensor.data

    def __get__(self, tensor: torch.Tensor | None, owner: Any = None) -> Any:
        return self if tensor is None else self._original.__get__(tensor, owner)

    def __set__(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        self._setter(tensor, value, self._original.__set__)


@contextmanager
def data_setter(setter: Callable[[torch.Tensor, torch.Tensor, Callable[..., None]], None]) -> Iterator[None]:
    """Calls `setter(tensor, value, original)` for `tensor.data = value`, where torch would not look at `value`."""
    before = vars(torch.Tensor).get("data")
    torch.Tensor.data = _Data(setter)  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        if before is None:
            del torch.Tensor.data  # that of its base class is seen again
        else:
            torch.Tensor.data = before  # type: ignore[misc]


def is_plain(value: Any) -> bool:
    """Returns True for a dense tensor or parameter with memory, of no other subclass."""
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and not value.is_nested
        and not is_functorch_wrapped_tensor(value)
    )


def storage_key(tensor: torch.Tensor) -> int:
    """Returns a number that tensors have in common that are views of the same memory, while one of them is alive."""
    return tensor.untyped_storage()._cdata


def disable_torch_function() -> AbstractContextManager:
    """Returns a context in which functions run without `__torch_function__` of tensor subclasses."""
    return torch._C.DisableTorchFunctionSubclass()


@contextmanager
def running_mode(mode: TorchDispatchMode | TorchFunctionMode) -> Iterator[None]:
    """Runs a mode; code in the context may enter and leave other modes, which outlive the context.

    A mode that is left takes the last one from torch's stack, which may be another one.
    """
    of_functions = isinstance(mode, TorchFunctionMode)
    stack = torch.overrides._get_current_function_mode_stack if of_functions else _get_current_dispatch_mode_stack
    pop, push = (torch.overrides._pop_mode, torch.overrides._push_mode) if of_functions else (_pop_mode, _push_mode)
    with ExitStack() as above:
        mode.__enter__()
        try:
            yield
        finally:
            present: list[Any] = stack()
            for _ in range(len(present) - 1 - present.index(mode) if mode in present else 0):
                above.callback(push, pop())
            mode.__exit__(None, None, None)


def is_mutable(func: Any) -> bool:
    """Returns True if the operator `func` writes to any of its arguments in place."""
    return func._schema.is_mutable


def written_arguments(func: Any) -> list[bool]:
    """Returns, for each positional argument of the operator `func`, whether the operator writes to it in place."""
    return [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]


def wrap_others(types: Any) -> bool:
    """Returns True if any of the tensor classes `types` runs operators on other tensors, as DTensor does.

    `FakeTensor`, which DTensor uses to infer shapes, leaves operators to its mode and does not count.
    """
    plain: Any = torch.Tensor.__dict__["__torch_dispatch__"]
    return any(getattr(kind, "__torch_dispatch__", plain) != plain and kind is not FakeTensor for kind in types)


def foreach_copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copies every tensor of `sources` into that of `targets`, in one kernel if the device has one."""
    torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


_foreach_norm: Any = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]


def norms_of(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the 2-norm of each tensor, in float32 for half precision; on accelerators in few kernels."""
    found: dict[int, torch.Tensor] = {}
    for half in (False, True):
        kind = [i for i, t in enumerate(tensors) if (t.dtype in (torch.float16, torch.bfloat16)) == half]
        if kind:
            dtype = torch.float32 if half else None
            found.update(zip(kind, _foreach_norm([tensors[i] for i in kind], dtype=dtype), strict=True))
    return [found[i] for i in range(len(tensors))]


def storage_id(tensor: torch.Tensor) -> int:
    """Returns an id of the memory of `tensor`, equal for its views; 0 for a tensor without memory."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return 0


@contextmanager
def storage_resizes_seen(seen: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Calls `seen` after each resize of a storage; FSDP resizes storages without an operator."""
    storage: Any = torch.UntypedStorage
    own = storage.__dict__.get("resize_")
    kept = storage.resize_

    def resize_(self: torch.UntypedStorage, size: int) -> Any:
        out = kept(self, size)
        seen(self)
        return out

    storage.resize_ = resize_
    try:
        yield
    finally:
        if own is None:
            del storage.resize_
        else:
            storage.resize_ = own


@contextmanager
def whole_scalars() -> Iterator[None]:
    """Makes reads of the value of a DTensor (`.item()`, `float`) those of the whole tensor for the duration.

    torch reads the value of this rank's part, which of a norm or a sum over divided dimensions is not that of the whole
    tensor. Reads are then collective over the ranks that hold it.
    """
    handlers: dict[Any, Any] = DTensor._op_dispatcher._custom_op_handlers
    kept = handlers.get(READ_SCALAR.default)
    handlers[READ_SCALAR.default] = lambda op, args, kwargs: args[0].full_tensor().item()
    try:
        yield
    finally:
        handlers.pop(READ_SCALAR.default, None)
        if kept is not None:
            handlers[READ_SCALAR.default] = kept
