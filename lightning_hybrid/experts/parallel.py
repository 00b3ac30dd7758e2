"""Expert parallelism: each rank of the `ep` axis holds a part of the experts and computes them for all ranks of `ep`.

A module of experts is called with the tokens of this rank. Dispatch: tokens are sorted by expert and sent to the ranks
that hold their experts (all-to-all with variable sizes, no token is dropped). The module runs on the received tokens
with the experts of this rank. Combine: outputs are sent back by the same all-to-all, weighted and summed.

References:
    Lepikhin et al., GShard, arXiv:2006.16668, section 3.1 (experts over data-parallel ranks).
    DeepSeek-V3, arXiv:2412.19437, section 3.2 (dispatch and combine, no dropped token), implemented in
    `DividedExperts.forward()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hybrid._torch_private import all_to_all_rows, in_backward, own_parameters
from lightning_hybrid.experts.copies import ExpertCopies
from lightning_hybrid.spec.expert_plan import ExpertPlan, plan_of
from lightning_hybrid.spec.tensor_plan import Path


class DividedExperts:
    """One module of experts; its `forward` replaces that of the module.

    Args:
        module: The module; its parameters are this rank's part already.
        plan: The division of the module.
        group: The ranks of the `ep` axis.
    """

    def __init__(self, module: nn.Module, plan: ExpertPlan, group: dist.ProcessGroup) -> None:
        self._module, self._plan, self._group = module, plan, group
        self._whole_forward: Callable[..., Any] = module.forward
        self._local = plan.experts // group.size()
        self._copies = None if plan.hosts is None else ExpertCopies(plan, plan.hosts, group)
        self._order: tuple[Tensor, Tensor] | None = None
        """The expert at each place and the place of each expert; None before the first call."""
        self.whole_attributes = {key: module.__dict__[key] for key in plan.attributes}
        """The attributes that contain the number of experts, as the user has set them."""
        module.__dict__.update(dict.fromkeys(plan.attributes, self._local))
        self.load: Tensor | None = None
        """Tokens sent by this rank to each expert in training, shape `(E,)`; None before the first step."""

    def restore(self) -> None:
        """Restores the module's attributes with the number of experts."""
        self._module.__dict__.update(self.whole_attributes)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Computes the module's `forward` on the ranks that hold the experts."""
        plan = self._plan
        x_ND, index_NA, weights_NA = (_argument(p, args, kwargs) for p in (plan.tokens, plan.index, plan.weights))
        counts_E = torch.bincount(index_NA.flatten(), minlength=plan.experts)
        if torch.is_grad_enabled() and not in_backward():  # a recomputation does not count
            self.load = counts_E if self.load is None else self.load + counts_E
        place_M, counts_P = self._places(index_NA.flatten(), counts_E)
        order_M = place_M.argsort(stable=True)
        received_RP, sent, received = self._exchange_counts(counts_P)
        x_MD = x_ND[order_M // index_NA.shape[1]]
        arrived_MD = all_to_all_rows(x_MD, sent, received, self._group)
        y_MD = all_to_all_rows(self._compute(arrived_MD, received_RP, args, kwargs), received, sent, self._group)
        y_MD = y_MD * weights_NA.flatten()[order_M, None]
        y_NAD = torch.zeros_like(y_MD).index_copy(0, order_M, y_MD).unflatten(0, index_NA.shape)
        return y_NAD.sum(dim=1).to(x_ND.dtype)

    def _places(self, index_M: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the place of each token, and the number of tokens for each place of all ranks."""
        if self._copies is not None:
            return self._copies.choose(index_M, counts_E)
        if self._plan.order is None:
            return index_M, counts_E
        if self._order is None:
            expert_P = torch.tensor(self._plan.order, device=index_M.device)
            self._order = expert_P, expert_P.argsort()
        expert_P, place_E = self._order
        return place_E[index_M], counts_E[expert_P]

    def dry(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the module's `forward` with experts of this rank only, for a dry run, where only shapes matter."""
        index_NA = _argument(self._plan.index, args, kwargs)
        args, kwargs = _with_argument(self._plan.index, index_NA % self._local, args, kwargs)
        return self._whole_forward(*args, **kwargs)

    def _exchange_counts(self, counts_P: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Exchanges token counts over `ep`.

        Returns:
            Tokens from each rank for each place of this rank; tokens sent to each rank; tokens received from each rank.
        """
        counts_RP = counts_P.view(self._group.size(), -1)
        received_RP = torch.empty_like(counts_RP)
        dist.all_to_all_single(received_RP, counts_RP, group=self._group)
        both_2R = torch.stack([counts_RP.sum(dim=1), received_RP.sum(dim=1)])
        sent, received = both_2R.tolist()
        return received_RP, sent, received

    def _compute(self, x_MD: Tensor, received_RP: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Runs the module on the received tokens, each with one expert."""
        experts_RP = torch.arange(received_RP.shape[1], device=x_MD.device).expand_as(received_RP)
        index_M1 = experts_RP.flatten().repeat_interleave(received_RP.flatten())[:, None]
        rows = len(x_MD)
        if not rows:  # the backward pass has to reach the all-to-all on every rank
            x_MD, index_M1 = torch.cat([x_MD, x_MD.new_zeros(1, x_MD.shape[1])]), index_M1.new_zeros(1, 1)
        weights = _argument(self._plan.weights, args, kwargs)
        for path, value in (
            (self._plan.tokens, x_MD),
            (self._plan.index, index_M1),
            (self._plan.weights, weights.new_ones(len(x_MD), 1)),
        ):
            args, kwargs = _with_argument(path, value, args, kwargs)
        if self._copies is None:
            return self._whole_forward(*args, **kwargs)[:rows]
        with self._copies.gathered_weights(self._module, self._plan.attributes):
            return self._whole_forward(*args, **kwargs)[:rows]


class ExpertParallel:
    """The modules of experts of a model that are divided over `ep`.

    Args:
        root: The LightningModule.
        plans: The division of each module, by name.
        group: The ranks of the `ep` axis.
    """

    def __init__(self, root: nn.Module, plans: Mapping[str, ExpertPlan], group: dist.ProcessGroup) -> None:
        self.plans = plans
        self.group = group
        self._root = root
        self._divided: dict[str, DividedExperts] = {}

    def plan_of(self, parameter: str) -> ExpertPlan | None:
        """Returns the plan of the module that `parameter` belongs to; None if it is not a parameter of experts."""
        return plan_of(self.plans, parameter)

    def part_of(self, parameter: str, whole: Tensor) -> Tensor:
        """Returns a copy of this rank's part of `parameter`; `whole` itself if it is not a parameter of experts."""
        plan = self.plan_of(parameter)
        if plan is None:
            return whole
        part = plan.part(self.group.rank(), self.group.size())
        return whole[torch.tensor(list(part), device=whole.device)]

    def whole_shape(self, parameter: str, shape: torch.Size) -> torch.Size:
        """Returns the shape of the whole parameter whose part has `shape`."""
        return shape if self.plan_of(parameter) is None else torch.Size((shape[0] * self.group.size(), *shape[1:]))

    def gathered(self, parameter: str, part: Tensor) -> Tensor:
        """Gathers the whole of a tensor laid out like `parameter`. Collective over `ep` for parameters of experts."""
        if self.plan_of(parameter) is None:
            return part
        places = part.new_empty(self.whole_shape(parameter, part.shape))
        dist.all_gather(list(places.chunk(self.group.size())), part.contiguous(), group=self.group)
        order = self.plans[parameter.rpartition(".")[0]].order
        return places if order is None else places[torch.tensor(order, device=part.device).argsort()]

    def install(self, local: Callable[[str], bool]) -> list[tuple[nn.Module, Callable]]:
        """Replaces the `forward` of the modules held by this rank's stage, whose parameters are divided already.

        Args:
            local: Returns True for the parameters (by name) that this rank's stage holds.

        Returns:
            The modules with their new `forward`.
        """
        overrides: list[tuple[nn.Module, Callable]] = []
        for name, plan in self.plans.items():
            module = self._root.get_submodule(name)
            if any(local(f"{name}.{key}") for key in own_parameters(module)):
                divided = self._divided[name] = DividedExperts(module, plan, self.group)
                # reads the number of received rows in each call, which a compiled graph cannot do
                forward = module.__dict__["forward"] = torch.compiler.disable(divided.forward)
                overrides.append((module, forward))
        return overrides

    def remove(self) -> None:
        """Restores the modules' attributes; the caller restores each `forward`."""
        for divided in self._divided.values():
            divided.restore()
        self._divided.clear()

    def modules(self) -> list[nn.Module]:
        """Returns the modules of experts on this rank."""
        return [self._root.get_submodule(name) for name in self._divided]

    def own(self, owner: str) -> bool:
        """Returns True if `owner` names a divided module, one inside of it, or a class of one (see `StatePlace`)."""
        inside = any(f"{owner}.".startswith(f"{name}.") for name in self.plans)
        kinds = {
            kind for name in self.plans for m in self._root.get_submodule(name).modules() for kind in type(m).__mro__
        }
        return inside or owner in {f"class {kind.__module__}.{kind.__qualname__}" for kind in kinds}

    def dry_forwards(self) -> list[tuple[nn.Module, Callable]]:
        """Returns the modules of experts with their `forward` for a dry run."""
        return [(self._root.get_submodule(name), divided.dry) for name, divided in self._divided.items()]

    @contextmanager
    def undivided(self) -> Iterator[None]:
        """Restores the modules' own `forward` and attributes, for whole weights, for the duration of the context."""
        with ExitStack() as stack:
            for name, divided in self._divided.items():
                attributes = self._root.get_submodule(name).__dict__
                stack.callback(attributes.update, {key: attributes[key] for key in divided.whole_attributes})
                attributes.update(divided.whole_attributes)
                if "forward" in attributes:
                    stack.callback(attributes.__setitem__, "forward", attributes.pop("forward"))
            yield

    def loads(self) -> dict[str, Tensor]:
        """Returns the tokens sent to each expert in training so far, by module of this rank."""
        return {name: divided.load for name, divided in self._divided.items() if divided.load is not None}


def _argument(path: Path, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    return args[path[1]] if path[0] == "args" else kwargs[path[1]]  # type: ignore[index]


def _with_argument(path: Path, value: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if path[0] == "kwargs":
        return args, {**kwargs, path[1]: value}  # type: ignore[dict-item]
    position = int(path[1])
    return (*args[:position], value, *args[position + 1 :]), kwargs
