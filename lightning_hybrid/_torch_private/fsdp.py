"""Private APIs of `fully_shard`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter as ReduceScatter

from lightning_hybrid.patching import patched


def finish_sharded_backward(module: FSDPModule) -> None:
    """Reduces the gradients that a fully sharded module has accumulated over the microbatches of a pipeline.

    Follows `torch.distributed.pipelining`, which does the same at the end of a schedule for a fully sharded stage.
    """
    module.set_is_last_backward(True)
    module.set_reshard_after_backward(True)
    module.set_requires_gradient_sync(True)
    root = fully_shard.state(module)  # type: ignore[attr-defined]
    for state in root._state_ctx.all_states:
        for group in _sharding_groups(state):
            group.post_backward()
    root._root_post_backward_final_callback()


def scale_sharded_gradients(module: FSDPModule, factor: torch.Tensor) -> None:
    """Multiplies the gradients that a fully sharded module has accumulated without reduction by `factor`."""
    for owner, name in _places_of_unreduced_gradients(fully_shard.state(module)):  # type: ignore[attr-defined]
        gradient = getattr(owner, name)
        if gradient is not None:
            gradient.mul_(factor)


def gathered_parameters(module: FSDPModule) -> list[torch.Tensor]:
    """Returns the whole parameters of a fully sharded module, which hold gradients that are not reduced yet."""
    root = fully_shard.state(module)  # type: ignore[attr-defined]
    if root._is_root is None:
        return []  # no step has reached the forward pass
    return [p._unsharded_param for p in _sharded_parameters(root) if hasattr(p, "_unsharded_param")]


def freeze_as_gathered(module: FSDPModule) -> None:
    """Makes weights trained or frozen as their gathered copies are, which user code in a step sees and may change."""
    root = fully_shard.state(module)  # type: ignore[attr-defined]
    if root._is_root is None:
        return  # no step has reached the forward pass
    for parameter in _sharded_parameters(root):
        if parameter.sharded_state.name == "UNSHARDED":
            parameter.sharded_param.requires_grad_(parameter._unsharded_param.requires_grad)


def forget_fully_shard(module: FSDPModule) -> None:
    """Restores the class of a fully sharded module; the caller restores parameters and hooks."""
    plain: Any = module
    plain.__class__ = type(module).__bases__[1]  # fully_shard makes `class FSDPX(FSDPModule, X)`
    for key in (STATE_KEY, REGISTRY_KEY):
        plain.__dict__.pop(key, None)
    _module_state_mapping.pop(plain, None)


def forget_sharding_marks(root: nn.Module) -> None:
    """Removes the marks of `fully_shard` from all modules, and the state-dict hooks that its first step has added."""
    for module in root.modules():
        for mark in _MARKS:
            module.__dict__.pop(mark, None)
        for table in _state_dict_tables(module):
            for key in [key for key, hook in table.items() if _of_fully_shard(hook)]:
                del table[key]


@contextmanager
def sharding_hidden(root: nn.Module) -> Iterator[None]:
    """Gives all modules their own classes, without marks and state of `fully_shard`, for the duration of the context.

    Parameters are not changed, and hooks only where the first step has added them.
    """
    hidden: list[tuple[Any, type, dict[str, Any], list[tuple[dict, dict]]]] = []
    for module in root.modules():
        own: Any = module
        names = (*_MARKS, STATE_KEY, REGISTRY_KEY) if isinstance(module, FSDPModule) else _MARKS
        attributes = {name: own.__dict__.pop(name) for name in names if name in own.__dict__}
        tables = [(table, dict(table)) for table in _state_dict_tables(module)]
        hidden.append((own, own.__class__, attributes, tables))
        for table, hooks in tables:
            for key in [key for key, hook in hooks.items() if _of_fully_shard(hook)]:
                del table[key]
        if isinstance(module, FSDPModule):
            own.__class__ = type(module).__bases__[1]
    try:
        yield
    finally:
        for own, kind, attributes, tables in hidden:
            own.__class__ = kind
            own.__dict__.update(attributes)
            for table, hooks in tables:
                table.update({key: hook for key, hook in hooks.items() if _of_fully_shard(hook)})


_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


def _state_dict_tables(module: nn.Module) -> list[dict[int, Any]]:
    return [
        module._state_dict_pre_hooks,
        module._state_dict_hooks,
        module._load_state_dict_pre_hooks,
        module._load_state_dict_post_hooks,
    ]


def _of_fully_shard(hook: Any) -> bool:
    return str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith("torch.distributed.fsdp")


def forget_sharded_step(module: FSDPModule) -> None:
    """Resets the state of an interrupted step, so that the next step starts from the beginning; drops gradients."""
    root = fully_shard.state(module)  # type: ignore[attr-defined]
    if root._is_root is None:
        return  # no step has reached the forward pass
    if hasattr(module, "reset_iter_state"):
        module.reset_iter_state()
    else:
        _reset_iteration(root)
    for owner, name in _places_of_unreduced_gradients(root):  # `reset_iter_state` keeps them
        setattr(owner, name, None)
    module.set_is_last_backward(True)
    module.set_reshard_after_backward(True)
    module.set_requires_gradient_sync(True)


@contextmanager
def unreduced_gradients_kept(module: FSDPModule) -> Iterator[None]:
    """Sets aside the gradients that a fully sharded module has accumulated without reduction; restores them."""
    root = fully_shard.state(module)  # type: ignore[attr-defined]
    places = [] if root._is_root is None else list(_places_of_unreduced_gradients(root))
    kept = [(owner, name, getattr(owner, name)) for owner, name in places]
    for owner, name in places:
        setattr(owner, name, None)
    try:
        yield
    finally:
        for owner, name, gradient in kept:
            setattr(owner, name, gradient)


class _Announced(AllGather, ReduceScatter):
    """A collective of `fully_shard` that is announced before it runs."""

    def __init__(self, collective: Any, announce: Callable[[], None]) -> None:
        self._collective, self._announce = collective, announce

    def allocate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._collective.allocate(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._announce()
        return self._collective(*args, **kwargs)


def announce_collectives(module: FSDPModule, gather: Callable[[], None], reduce: Callable[[], None]) -> None:
    """Calls `gather` before `module` gathers its weights, and `reduce` before it reduces their gradients."""
    for group in _sharding_groups(fully_shard.state(module)):  # type: ignore[attr-defined]
        module.set_custom_all_gather(_Announced(group._all_gather_comm, gather))
        module.set_custom_reduce_scatter(_Announced(group._reduce_scatter_comm, reduce))


class UnreducedParameter:
    """A sharded parameter with the gradient that this rank has computed and not reduced yet."""

    def __init__(self, parameter: Any) -> None:
        self._parameter = parameter

    @property
    def sharded(self) -> nn.Parameter:
        """The parameter that the optimizer has, with the reduced gradient."""
        return self._parameter.sharded_param

    @property
    def has_gradient(self) -> bool:
        """True if this rank has computed a gradient."""
        unsharded = self._parameter._unsharded_param
        return unsharded.grad is not None or self._parameter.unsharded_accumulated_grad is not None

    def set_zero(self) -> None:
        """Sets a zero gradient."""
        unsharded = self._parameter._unsharded_param
        unsharded.grad = torch.zeros_like(unsharded)


def before_reduction(module: FSDPModule, call: Callable[[list[UnreducedParameter], bool], None]) -> None:
    """Calls `call` before `module` reduces the gradients of its trained parameters.

    `call` gets the parameters, and True if the backward pass has reached the module.
    """
    for group in _sharding_groups(fully_shard.state(module)):  # type: ignore[attr-defined]

        def post_backward(
            *unused: Any, group: Any = group, original: Callable[..., None] = group.post_backward
        ) -> None:
            if group.reduce_grads:
                gathered = [p for p in group.fsdp_params if hasattr(p, "_unsharded_param")]
                trained = [UnreducedParameter(p) for p in gathered if p._unsharded_param.requires_grad]
                call(trained, group._training_state.name == "PRE_BACKWARD")
            original(*unused)

        group.post_backward = post_backward


@contextmanager
def waits_seen(modules: Iterable[nn.Module], around: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Surrounds each wait of the modules that `fully_shard` divides, for gathered weights and for reduced gradients."""
    groups = [
        group
        for module in modules
        if isinstance(module, FSDPModule)
        for group in _sharding_groups(fully_shard.state(module))  # type: ignore[attr-defined]
    ]

    def surrounded(wait: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with around():
                wait()

        return run

    with ExitStack() as stack:
        for group in groups:
            waits = {name: surrounded(getattr(group, name)) for name in ("wait_for_unshard", "finalize_backward")}
            stack.enter_context(patched(group, **waits))
        yield


def keep_inputs(module: FSDPModule) -> None:
    """Makes `module` pass its inputs on unchanged; `fully_shard` moves all tensors to the device of the weights."""
    state = fully_shard.state(module)  # type: ignore[attr-defined]
    original = state._root_pre_forward

    def root_pre_forward(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        original(module, (), {})
        return args, kwargs

    state._root_pre_forward = root_pre_forward


def _sharded_parameters(root: Any) -> Iterator[Any]:
    """Yields what `fully_shard` knows of each parameter, below the state of the root."""
    for state in root._state_ctx.all_states:
        for group in _sharding_groups(state):
            yield from group.fsdp_params


def _places_of_unreduced_gradients(root: Any) -> Iterator[tuple[Any, str]]:
    """Yields the objects and their attributes in which backward passes without reduction accumulate gradients."""
    for parameter in _sharded_parameters(root):
        yield parameter, "unsharded_accumulated_grad"
        if hasattr(parameter, "_unsharded_param"):
            yield parameter._unsharded_param, "grad"


def _sharding_groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # earlier releases: one group per state
        return [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return groups


def _reset_iteration(root: Any) -> None:
    """Does what `FSDPModule.reset_iter_state` does, for releases without it (torch 2.13 has it)."""
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
