"""Optimizers that the user has made before the module was partitioned: they get the parameters that replace theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.ghosts.parameters import Parameters
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout


class OriginalParameters:
    """The user's parameters, before any of them is replaced.

    Args:
        parameters: The parameters of the module.
    """

    def __init__(self, parameters: Parameters) -> None:
        present = {n: parameters[n] for n in parameters.names}
        self._names = {id(p): (n, ref(p)) for n, p in present.items() if not isinstance(p, Ghost)}

    def name_of(self, tensor: Tensor) -> str | None:
        """Returns the name of the user's parameter `tensor`; None if it is none."""
        name, original = self._names.get(id(tensor), ("", None))
        return name if original is not None and original() is tensor else None


def replace_parameters(
    optimizers: Iterable[Optimizer], originals: OriginalParameters, present: Mapping[str, Tensor]
) -> None:
    """Gives optimizers the parameters that have replaced those with which they were made.

    Args:
        optimizers: The optimizers, which keep their identity, as schedulers hold them.
        originals: The parameters before they were replaced.
        present: The parameters that have replaced them, by name.

    Raises:
        PartitionError: If an optimizer has state for a parameter that was replaced.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for i, parameter in enumerate(group["params"]):
                name = originals.name_of(parameter)
                if name is None or present[name] is parameter:
                    continue
                if optimizer.state.get(parameter):
                    raise PartitionError(
                        f"`configure_optimizers` returned {type(optimizer).__name__} with state of `{name}` from "
                        "before the module was partitioned. Make the optimizer in `configure_optimizers`, and pass "
                        "`ckpt_path` to the Trainer to continue a run."
                    )
                optimizer.state.pop(parameter, None)
                group["params"][i] = present[name]


def check_membership(optimizers: Iterable[Optimizer], known: Iterable[Tensor], root: nn.Module, layout: Layout) -> None:
    """Refuses optimizers of tensors that are no parameters of the module.

    Raises:
        PartitionError: If an optimizer has one, whose gradient would not be averaged over replicas.
    """
    if layout.devices == 1:
        return
    ids = {id(p) for p in known}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if id(tensor) not in ids:
                    raise PartitionError(
                        f"`configure_optimizers` returned {type(optimizer).__name__} with {_described(tensor, root)}, "
                        f"which is no parameter of {type(root).__name__} or its modules, so `layout='{layout}'` "
                        "cannot synchronize its gradient. Register it: assign an `nn.Parameter` to an attribute of a "
                        "module, or keep the modules that own it in an `nn.ModuleList` or `nn.ModuleDict`."
                    )


def _described(tensor: Tensor, root: nn.Module) -> str:
    for prefix, module in root.named_modules():
        for key, value in vars(module).items():
            if value is tensor or (isinstance(value, list | tuple) and any(v is tensor for v in value)):
                return f"`{prefix}{'.' if prefix else ''}{key}`"
    return f"a tensor of shape {tuple(tensor.shape)}{'' if tensor.dtype == torch.float32 else f' ({tensor.dtype})'}"
