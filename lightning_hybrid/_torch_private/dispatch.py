"""Private APIs of tensor subclasses, dispatch modes, operators and storages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

DispatchMode = TorchDispatchMode
"""What sees every operator that runs, below autograd; results of collectives included."""


def make_wrapper(cls: type, meta: torch.Tensor, device: torch.device, requires_grad: bool) -> Any:
    """A storage-less tensor of class `cls` that claims the shape and dtype of `meta` on `device`."""
    return torch.Tensor._make_wrapper_subclass(
        cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=device, requires_grad=requires_grad
    )


def run_on_meta(func: Any, args: tuple, kwargs: dict) -> Any:
    """`func` on meta tensors, also where torch has a meta kernel for bfloat16 only (`_grouped_mm`)."""
    if func.overloadpacket is not torch.ops.aten._grouped_mm:
        return func(*args, **kwargs)
    dtype = args[0].dtype
    return func(*(a.to(torch.bfloat16) for a in args[:2]), *args[2:], **kwargs).to(dtype)


def disable_torch_function() -> AbstractContextManager:
    """Inside, functions run without `__torch_function__` of tensor subclasses."""
    return torch._C.DisableTorchFunctionSubclass()


def wrap_others(types: Any) -> bool:
    """Whether any of these tensor classes runs operators itself, on other tensors, as DTensor does.

    `FakeTensor`, with which DTensor finds out shapes, leaves that to its mode.
    """
    plain: Any = torch.Tensor.__dict__["__torch_dispatch__"]
    return any(getattr(kind, "__torch_dispatch__", plain) != plain and kind is not FakeTensor for kind in types)


def foreach_copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copies every source into its target, in one kernel where there is one."""
    torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


_foreach_norm: Any = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]


def norms_of(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The 2-norm of each tensor, those of half precision in float32; on accelerators in few kernels."""
    found: dict[int, torch.Tensor] = {}
    for half in (False, True):
        kind = [i for i, t in enumerate(tensors) if (t.dtype in (torch.float16, torch.bfloat16)) == half]
        if kind:
            dtype = torch.float32 if half else None
            found.update(zip(kind, _foreach_norm([tensors[i] for i in kind], dtype=dtype), strict=True))
    return [found[i] for i in range(len(tensors))]


@contextmanager
def storage_resizes_seen(seen: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Inside, `seen` is called after a storage has been resized, which FSDP does and no operator shows."""
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
