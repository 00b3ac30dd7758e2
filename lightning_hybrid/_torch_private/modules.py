"""Private attributes of `nn.Module`, of its parameters and of a few modules of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _modules
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

BatchNorm = _BatchNorm
"""The base class of all modules that normalize with the statistics of the batch."""

InstanceNorm = _InstanceNorm
"""The base class of all modules that normalize each sample, and may keep running statistics."""


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """Returns the registered children of `module` itself, by name; the dictionary is the module's own."""
    return module._modules


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Returns the dictionary in which `module` registers its own parameters, without those of its children.

    Changes of the dictionary change the module.
    """
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Returns the dictionary in which `module` registers its own buffers, without those of its children."""
    return module._buffers


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the buffers of `module` and its children that are part of its state dict, by name."""
    return {
        f"{path}.{key}" if path else key: buffer
        for path, owner in module.named_modules()
        for key, buffer in owner._buffers.items()
        if buffer is not None and key not in owner._non_persistent_buffers_set
    }


def flat_weight_names(module: nn.RNNBase) -> list[str]:
    """Returns the names of the parameters that a recurrent module also keeps in its list `_flat_weights`."""
    return module._flat_weights_names


def refresh_flat_weights(module: nn.Module) -> None:
    """Sets the list `_flat_weights` of a recurrent module to its present parameters; other modules have none."""
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


def mark_as_parameter(tensor: Any, is_parameter: bool) -> None:
    """Makes `isinstance(tensor, nn.Parameter)` return `is_parameter` for a tensor of a subclass."""
    tensor._is_param = is_parameter


def gradient_hooks_of(tensor: torch.Tensor) -> list[Callable[[torch.Tensor], torch.Tensor | None]]:
    """Returns the hooks that `register_hook` has added to `tensor`."""
    return list((tensor._backward_hooks or {}).values())


def backward_hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """Returns the backward hooks of `module` itself."""
    return [*module._backward_pre_hooks.values(), *module._backward_hooks.values()]


def forward_hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """Returns the forward hooks and pre-hooks of the user; not those of torch (`weight_norm`) and this package."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [h for h in hooks if not str(getattr(h, "__module__", "")).startswith(("torch.", "lightning_hybrid."))]


def backward_hooks_of_all() -> list[Callable[..., Any]]:
    """Returns the backward hooks that every module has."""
    return [*_modules._global_backward_pre_hooks.values(), *_modules._global_backward_hooks.values()]


def interception(call: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Returns the attributes of a module with which `module(...)` runs `call` instead of its hooks and forward.

    `nn.Module.__call__` runs `_compiled_call_impl` if it is set; `nn.Module.compile` uses the same attribute.
    """
    return {"_compiled_call_impl": call}


def intercepted_call(module: nn.Module) -> Callable[..., Any]:
    """Returns the callable that `module(...)` currently runs, to be called by an interceptor."""
    return module._compiled_call_impl or module._call_impl


def hook_tables(module: nn.Module) -> list[dict]:
    """Returns every table in which `module` registers hooks by id."""
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
