"""Every private PyTorch API that this package uses, in one place. Checked with torch 2.13 on the CPU."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import nn
from torch._C._distributed_c10d import FakeWork
from torch._C._distributed_c10d import _resolve_process_group as resolve_process_group
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter as ReduceScatter
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

_SKIPPED_FOLDERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_TORCH, _PACKAGE = Path(torch.__file__).parent, Path(__file__).parent
_COLLECTIVE_PLACES = tuple(str(p) for p in (_TORCH / "distributed", _TORCH / "_ops.py", _TORCH / "autograd", _PACKAGE))
_EXAMPLES = (str(_PACKAGE / "models"), str(_PACKAGE / "data"))
_OTHERS_CODE = (*_SKIPPED_FOLDERS, str(Path(threading.__file__).parent), str(_TORCH.parent / "lightning"))


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


def intercept_calls(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Routes `module(...)` to `call`, before any of its hooks; None ends it.

    `nn.Module.__call__` hands over to `_compiled_call_impl` where it is set, which `nn.Module.compile` also uses.
    """
    module._compiled_call_impl = call


def intercepted_call(module: nn.Module) -> Callable[..., Any]:
    """What `module(...)` runs at present, to be called by an interceptor."""
    return module._compiled_call_impl or module._call_impl


def user_location() -> str:
    """File and line of the innermost frame outside torch and this package, as `file.py:12 (function)`."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_SKIPPED_FOLDERS) and not name.startswith("<"):
            return f"{name}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "unknown location"


def main_thread_location() -> tuple[str, bool]:
    """Where the main thread is, as `file.py:12 (function)`, and whether it waits in a collective.

    The place is the innermost frame of the user's code; without one, the innermost of all.
    """
    innermost = frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if innermost is None:
        return "unknown location", False
    name = innermost.f_code.co_filename
    waiting = name.startswith(_COLLECTIVE_PLACES) and not name.startswith(_EXAMPLES)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_OTHERS_CODE) and not name.startswith("<"):
            break
        frame = frame.f_back
    frame = frame or innermost
    return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})", waiting


def is_view(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a view in the eyes of autograd."""
    return tensor._is_view()


def default_group() -> dist.ProcessGroup:
    """The process group of all ranks."""
    return dist.distributed_c10d._get_default_group()


def store_client() -> Any:
    """A connection of its own to the store with which the ranks met, to be used beside the process groups' threads."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


def limit_waiting(timeout: timedelta) -> None:
    """Collectives of all groups of this process wait so long; groups that are made without a time-out wait 30 min."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


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


def after_this_backward(callback: Callable[[], None]) -> None:
    """Runs `callback` at the end of the backward pass that is running, as DistributedDataParallel does."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def in_backward() -> bool:
    """Whether autograd runs in this thread: a forward pass in it is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def finish_sharded_backward(module: FSDPModule) -> None:
    """Reduces the gradients that a fully sharded module has accumulated over the microbatches of a pipeline.

    As `torch.distributed.pipelining` does it at the end of a schedule for a stage that is itself fully sharded.
    """
    module.set_is_last_backward(True)
    module.set_reshard_after_backward(True)
    module.set_requires_gradient_sync(True)
    root = fully_shard.state(module)  # type: ignore[attr-defined]
    for state in root._state_ctx.all_states:
        for group in _sharding_groups(state):
            group.post_backward()
    root._root_post_backward_final_callback()


def forget_fully_shard(module: FSDPModule) -> None:
    """Gives a fully sharded module its own class back; its parameters and hooks are the caller's to restore."""
    plain: Any = module
    plain.__class__ = type(module).__bases__[1]  # fully_shard makes `class FSDPX(FSDPModule, X)`
    for key in (STATE_KEY, REGISTRY_KEY):
        plain.__dict__.pop(key, None)
    _module_state_mapping.pop(plain, None)


def hook_tables(module: nn.Module) -> list[dict]:
    """Every table in which hooks of a module are registered under their ids."""
    return [
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
        module._state_dict_pre_hooks,
        module._state_dict_hooks,
        module._load_state_dict_pre_hooks,
        module._load_state_dict_post_hooks,
    ]


class _Direct:
    """In the place of `CheckpointFunction`: no recomputation."""

    @staticmethod
    def apply(function: Callable[..., Any], _: bool, *args: Any) -> Any:
        return function(*args)


class _NotReentrant:
    """In the place of `CheckpointFunction`: the other kind of recomputation."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


@contextmanager
def recomputation_off() -> Iterator[None]:
    """Inside, `torch.utils.checkpoint.checkpoint` calls its function and keeps what it saves for the backward pass."""
    module: Any = torch.utils.checkpoint
    kept = module._checkpoint_without_reentrant_generator, module.CheckpointFunction

    def generator(*_: Any, **__: Any) -> Iterator[None]:
        yield

    module._checkpoint_without_reentrant_generator, module.CheckpointFunction = generator, _Direct
    try:
        yield
    finally:
        module._checkpoint_without_reentrant_generator, module.CheckpointFunction = kept


@contextmanager
def checkpoints_not_reentrant() -> Iterator[None]:
    """Inside, `torch.utils.checkpoint.checkpoint(use_reentrant=True)` works as with `use_reentrant=False`.

    The results are the same. The reentrant kind keeps the arguments it is called with and finds their gradients only,
    which a pipeline stage that begins inside the function receives by another way.
    """
    module: Any = torch.utils.checkpoint
    kept = module.CheckpointFunction
    module.CheckpointFunction = _NotReentrant
    try:
        yield
    finally:
        module.CheckpointFunction = kept


def agree_on_overflow(scaler: Any, reduce: Callable[[torch.Tensor], Any]) -> Callable[[], None]:
    """Has a `GradScaler` leave out a step on all ranks if gradients overflow on any.

    Its own check sees this rank's gradients only, and raises where a rank has none. Both ways in which it unscales
    (before the step, or inside of a fused optimizer) go through `_unscale_grads_`.

    Args:
        scaler: The scaler.
        reduce: Sums a tensor in place over all ranks.

    Returns:
        Undoes it.
    """

    def unscale(
        optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            if not allow_fp16 and parameter.grad.dtype == torch.float16:
                raise ValueError("Attempting to unscale FP16 gradients.")
            gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            by_dtype.setdefault(gradient.dtype, []).append(gradient._values() if gradient.is_sparse else gradient)
        for gradients in by_dtype.values():
            check: Any = torch._amp_foreach_non_finite_check_and_unscale_  # pyright: ignore[reportPrivateImportUsage]
            check(gradients, found_inf, inv_scale)
        reduce(found_inf)
        return {found_inf.device: found_inf}

    scaler.__dict__["_unscale_grads_"] = unscale
    return lambda: scaler.__dict__.pop("_unscale_grads_", None)


@contextmanager
def gradients_taken_by(function: Callable[..., Any]) -> Iterator[None]:
    """Inside, `torch.autograd.grad` is `function`."""
    kept = torch.autograd.grad
    torch.autograd.grad = function
    try:
        yield
    finally:
        torch.autograd.grad = kept


# ---- one rank alone: collectives, storages and optimizers seen from below

DispatchMode = TorchDispatchMode
"""What sees every operator that runs, below autograd; results of collectives included."""


def wrap_others(types: Any) -> bool:
    """Whether any of these tensor classes runs operators itself, on other tensors, as DTensor does.

    `FakeTensor`, with which DTensor finds out shapes, leaves that to its mode.
    """
    plain: Any = torch.Tensor.__dict__["__torch_dispatch__"]
    return any(getattr(kind, "__torch_dispatch__", plain) != plain and kind is not FakeTensor for kind in types)


def completed_work() -> Any:
    """The handle of a collective that is done, in the box in which operators return it."""
    return FakeWork().boxed()


def boxed_group(box: Any) -> dist.ProcessGroup:
    """The process group in the box in which operators of `c10d` take it."""
    return dist.ProcessGroup.unbox(box)


def group_named(name: Any) -> dist.ProcessGroup:
    """The process group that functional collectives take by name, or itself."""
    return name if isinstance(name, dist.ProcessGroup) else resolve_process_group(name)


@contextmanager
def coalescing_off() -> Iterator[None]:
    """Inside, collectives that would be started together are operators of their own, which a `DispatchMode` sees.

    Backends that coalesce (NCCL) are told so without an operator.
    """
    module: Any = dist.distributed_c10d
    kept = module._coalescing_manager

    @contextmanager
    def manager(*_: Any, **__: Any) -> Iterator[Any]:
        yield module._CoalescingManager()

    module._coalescing_manager = manager
    try:
        yield
    finally:
        module._coalescing_manager = kept


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


def forget_sharded_step(module: FSDPModule) -> None:
    """Has a fully sharded module begin its next step anew, wherever the last one has ended; its gradients are lost."""
    root = fully_shard.state(module)  # type: ignore[attr-defined]
    if root._is_root is None:
        return  # no step has come as far as its forward pass
    if hasattr(module, "reset_iter_state"):
        module.reset_iter_state()
    else:
        _reset_iteration(root)
    for state in root._state_ctx.all_states:
        for parameter in (p for group in _sharding_groups(state) for p in group.fsdp_params):
            # what a backward pass without reduction has added up; `reset_iter_state` leaves it
            parameter.unsharded_accumulated_grad = None
            unsharded = getattr(parameter, "_unsharded_param", None)
            if unsharded is not None:
                unsharded.grad = None
    module.set_is_last_backward(True)
    module.set_reshard_after_backward(True)
    module.set_requires_gradient_sync(True)


def _sharding_groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # earlier releases have one group a state
        return [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return groups


def _reset_iteration(root: Any) -> None:
    """What `FSDPModule.reset_iter_state` does, for releases before it (it is in torch 2.13)."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()  # instead of waiting for each event
    root._comm_ctx.all_gather_state = None
    root._comm_ctx.post_forward_order.clear()
    for name in ("reduce_scatter_states", "_last_post_reduce_events"):
        getattr(root._comm_ctx, name, []).clear()
    if hasattr(root._comm_ctx, "reduce_scatter_state"):
        root._comm_ctx.reduce_scatter_state = None
    idle = type(root._training_state).IDLE
    for state in root._state_ctx.all_states:
        state._training_state = idle
        state._modules_to_run_forward.clear()
        for group in _sharding_groups(state):
            group._all_gather_result = group._post_reduce_event = group._reshard_after_forward_event = None
            group._all_reduce_state = group._partial_reduce_output = None
            group._post_forward_indices.clear()
            group._training_state = idle
            group._to_sharded()
    root._state_ctx.iter_forward_root = None
    root._state_ctx.post_backward_final_callback_queued = False


def step_without_hooks(optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> None:
    """An optimizer's own step: no hooks on it, and nothing that learning-rate schedulers have wrapped it in."""
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    step(optimizer, closure)
