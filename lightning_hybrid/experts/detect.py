"""Finds modules of experts in any model, and verifies numerically that their experts can be divided over ranks.

No model is named. A candidate is a module whose parameters all have the same first dim, at least one of them with three
dims or more: experts fused into one tensor. A candidate is a module of experts if the step calls it with tokens
`(N, D)`, indices of the chosen experts `(N, A)` and their weights `(N, A)`; and if, on random values, the result is the
same when each pair of token and expert is computed separately, by a module with a part of the experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_hybrid._torch_private import own_parameters
from lightning_hybrid.ghosts.ghost import parameter_slots
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.expert_plan import ExpertPlan
from lightning_hybrid.spec.layout import Layout
from lightning_hybrid.spec.tensor_plan import Path
from lightning_hybrid.tensor.numbers import is_float, probing, shadowed

_PROBED_EXPERTS, _PROBED_TOKENS, _PROBED_CHOICES = 4, 16, 2
_TOLERANCE = 1e-4
"""Relative; the error of a wrong division is about 1."""
_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError)
"""Errors of a module that does not support a part of its experts."""


def candidates(root: nn.Module) -> dict[str, int]:
    """Returns the number of experts of each module that may hold fused experts, by name."""
    counts = {}
    for name, module in root.named_modules():
        shapes = [p.shape for p in module.parameters()]
        own = [p for p in own_parameters(module).values() if p is not None]
        if not own or len(own) < len(shapes) or type(module).__module__.startswith("torch.nn."):
            continue
        first = {shape[0] if len(shape) else 0 for shape in shapes}
        if len(first) == 1 and max(len(shape) for shape in shapes) >= 3 and min(first) > 1:
            counts[name] = min(first)
    return counts


@contextmanager
def recorded_calls(root: nn.Module, names: Mapping[str, int]) -> Iterator[dict[str, dict[Path, Tensor]]]:
    """Records the tensor arguments of the last call of each module in `names`."""
    calls: dict[str, dict[Path, Tensor]] = {}
    handles = []
    for name in names:

        def before(_: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
            tensors = {("args", i): x for i, x in enumerate(args) if isinstance(x, Tensor)}
            calls[name] = {**tensors, **{("kwargs", k): x for k, x in kwargs.items() if isinstance(x, Tensor)}}

        handles.append(root.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def plan_experts(
    root: nn.Module, names: Mapping[str, int], calls: Mapping[str, Mapping[Path, Tensor]], layout: Layout
) -> dict[str, ExpertPlan]:
    """Decides which modules are divided over `ep`.

    Args:
        root: The LightningModule.
        names: The candidates, with their number of experts.
        calls: Tensor arguments of each candidate's call.
        layout: The layout, with `ep > 1`.

    Raises:
        PartitionError: If there are no experts, or their number is not divisible by `ep`.
    """
    plans, refusals = {}, []
    known: dict[tuple, str | None] = {}  # results by kind of module, since blocks of a stack are alike
    for name, count in names.items():
        paths = _paths(calls.get(name, {}))
        if paths is None:
            continue
        module = root.get_submodule(name)
        tokens, index, weights = paths
        attributes = tuple(k for k, v in module.__dict__.items() if "expert" in k and type(v) is int and v == count)
        plan = ExpertPlan(experts=count, tokens=tokens, index=index, weights=weights, attributes=attributes)
        if count % layout.ep:
            sizes = [d for d in range(2, count + 1) if count % d == 0]
            raise PartitionError(
                f"`layout='{layout}'` has `ep={layout.ep}`, which must divide the number of experts. `{name}` has "
                f"{count}. Use an `ep` of {', '.join(map(str, sizes))}."
            )
        kind = (type(module), plan, tuple((s.key, tuple(s.tensor.shape)) for s in parameter_slots(module)))
        if kind not in known:
            known[kind] = _problem(module, plan, calls[name])
        problem = known[kind]
        if problem is None:
            plans[name] = plan
        else:
            refusals.append(f"`{name}` {problem}")
    if not plans:
        why = f" {refusals[0]}." if refusals else ""
        raise PartitionError(
            f"`layout='{layout}'` has `ep={layout.ep}`, but {type(root).__name__} has no experts that can be divided: "
            "a module whose parameters have the experts along dim 0, called with tokens (N, D), the experts chosen "
            f"(N, A) and their weights (N, A).{why} Use '{layout.moved('ep', 'dp')}'."
        )
    if refusals:
        rank_zero_warn(f"Some experts stay whole on every rank of `layout='{layout}'`: {'; '.join(refusals)}.")
    return plans


def _paths(call: Mapping[Path, Tensor]) -> tuple[Path, Path, Path] | None:
    """Returns the arguments that are tokens, chosen experts and their weights; None if there are none."""
    index = next((p for p, t in call.items() if t.ndim == 2 and not is_float(t) and t.dtype != torch.bool), None)
    if index is None:
        return None
    floats = [p for p, t in call.items() if t.ndim == 2 and is_float(t) and t.shape[0] == call[index].shape[0]]
    weights = next((p for p in reversed(floats) if call[p].shape == call[index].shape), None)
    tokens = next((p for p in floats if p != weights), None)
    return None if tokens is None or weights is None else (tokens, index, weights)


def _problem(module: nn.Module, plan: ExpertPlan, call: Mapping[Path, Tensor]) -> str | None:
    """Returns the reason why the module's experts cannot be divided, from a run on random values; None if they can."""
    generator = torch.Generator().manual_seed(0)
    width = call[plan.tokens].shape[1]
    experts = min(_PROBED_EXPERTS, plan.experts)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights = {}
    for slot in parameter_slots(module):
        inner = slot.tensor.shape[-1] if slot.tensor.ndim > 2 else 1
        weights[slot.key] = numbers(experts, *slot.tensor.shape[1:]) / inner**0.5
    tokens_ND = numbers(_PROBED_TOKENS, width)
    index_NA = torch.rand(_PROBED_TOKENS, experts, generator=generator).topk(min(_PROBED_CHOICES, experts)).indices
    weights_NA = numbers(*index_NA.shape).abs() + 0.1

    def run(part: range, tokens: Tensor, index: Tensor, factors: Tensor) -> Tensor:
        entries: list[tuple[nn.Module, str, Any]] = [(module, k, w[part.start : part.stop]) for k, w in weights.items()]
        entries += [(module, key, len(part)) for key in plan.attributes]
        args: dict[int, Any] = {}
        kwargs: dict[str, Any] = {}
        for path, value in ((plan.tokens, tokens), (plan.index, index), (plan.weights, factors)):
            (args if path[0] == "args" else kwargs)[path[1]] = value  # type: ignore[index]
        with shadowed(entries), torch.no_grad():
            return module(*(args[i] for i in sorted(args)), **kwargs)

    try:
        with probing(module):
            whole_ND = run(range(experts), tokens_ND, index_NA, weights_NA)
            parts_ND = torch.zeros_like(whole_ND)
            for part in (range(experts // 2), range(experts // 2, experts)):
                token_M, choice_M = torch.where((index_NA >= part.start) & (index_NA < part.stop))
                local_M1 = (index_NA[token_M, choice_M] - part.start)[:, None]
                y_MD = run(part, tokens_ND[token_M], local_M1, torch.ones(len(token_M), 1))
                parts_ND.index_add_(0, token_M, y_MD * weights_NA[token_M, choice_M, None])
    except _FAILURES as error:
        return f"cannot be run with a part of its experts ({type(error).__name__}: {str(error).splitlines()[0]})"
    if whole_ND.shape != tokens_ND.shape:
        return f"returns the shape {tuple(whole_ND.shape)} for tokens of shape {tuple(tokens_ND.shape)}"
    error = (whole_ND - parts_ND).abs().max() / whole_ND.abs().max().clamp_min(1e-12)
    if not error <= _TOLERANCE:
        return "does not return the weighted sum of the outputs of its experts for each token"
    return None
