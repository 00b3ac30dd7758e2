"""Private attributes of `nn.Module`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def intercept_calls(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Routes `module(...)` to `call`, before any of its hooks; None ends it.

    `nn.Module.__call__` hands over to `_compiled_call_impl` where it is set, which `nn.Module.compile` also uses.
    """
    module._compiled_call_impl = call


def intercepted_call(module: nn.Module) -> Callable[..., Any]:
    """What `module(...)` runs at present, to be called by an interceptor."""
    return module._compiled_call_impl or module._call_impl


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
