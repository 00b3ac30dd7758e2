"""A LightningModule as a `ModelSpec`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lightning_hybrid.ghosts.parameters import Parameters
from lightning_hybrid.ghosts.record import Trace
from lightning_hybrid.ghosts.units import Units
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.expert_plan import ExpertPlan
from lightning_hybrid.spec.model import ModelSpec, ParameterSpec
from lightning_hybrid.spec.plan import call_costs
from lightning_hybrid.spec.tensor_plan import TensorPlan


def describe(root: nn.Module, units: Units, parameters: Parameters) -> ModelSpec:
    """Returns what is known of a module without running it."""
    return ModelSpec(
        units={name: _classes(root.get_submodule(name)) for name in units.names},
        blocks=units.blocks,
        parameters={
            name: ParameterSpec(
                dtype=str(parameters[name].dtype).removeprefix("torch."), shape=tuple(parameters[name].shape)
            )
            for name in parameters.names
        },
    )


def refused_addition(hook: str, what: str) -> PartitionError:
    """Returns the error of a hook that adds weights to a module whose partition is planned."""
    return PartitionError(
        f"{hook} adds {what}, whose weights the layout does not divide or synchronize. Make it in `__init__`, `setup` "
        "or `configure_model`, and write its weights in the hook, as by `copy.load_state_dict(...)` within "
        "`torch.no_grad()`."
    )


def with_calls(model: ModelSpec, step: str, trace: Trace, parameters: Parameters) -> ModelSpec:
    """Returns `model` with the calls of a `step` and their cost.

    Raises:
        PartitionError: If a hook that runs before the first step adds weights.
    """
    added = next((n for n in trace.parameter_uses if n not in parameters.first_names), None)
    if added is not None:
        raise refused_addition(
            "`layout`: a hook that runs before the first step, such as `on_fit_start`,", f"`{added}`"
        )
    uses = {parameters.first_names[n]: found for n, found in trace.parameter_uses.items()}
    calls = {n: tuple(sorted({max(0, interval) for interval in uses.get(n, ())})) for n in model.parameters}
    for target, sources in trace.followers.items():  # a hook that writes a weight needs the others on the same stages
        for source in sources:
            name, written = parameters.first_names[source], parameters.first_names[target]
            calls[name] = tuple(sorted({*calls[name], *(calls[written] or (0,))}))
    return replace(
        model,
        parameters={n: replace(p, calls=calls[n]) for n, p in model.parameters.items()},
        step=step,
        calls=tuple(call.name for call in trace.calls),
        costs=call_costs(trace.flops),
        places=tuple(c for c, cut in trace.cuts.items() if cut.refusal is None),
    )


def divided_attributes(
    root: nn.Module, tensor_plan: TensorPlan | None, expert_plans: Mapping[str, ExpertPlan]
) -> dict[str, dict[str, int]]:
    """Returns the integer attributes that the plans divide, by module, as the module has them."""
    keys: dict[str, list[str]] = {name: list(plan.attributes) for name, plan in expert_plans.items()}
    if tensor_plan is not None:
        for unit, plan in tensor_plan.units.items():
            for name, divided in plan.attributes.items():
                keys.setdefault(".".join(filter(None, (unit, name))), []).extend(divided)
        for name in tensor_plan.attention:
            keys.setdefault(name, []).append("num_heads")
    modules = dict(root.named_modules())
    found = {
        name: {k: v for k in wanted if type(v := getattr(modules.get(name), k, None)) is int}
        for name, wanted in keys.items()
    }
    return {name: values for name, values in found.items() if values}


def _classes(module: nn.Module) -> str:
    """Returns the classes of the modules in `module`, in order, such as `Block, 2 LayerNorm, 4 Linear`."""
    counts = Counter(type(m).__name__ for m in module.modules())
    return ", ".join(f"{count} {name}" if count > 1 else name for name, count in counts.items())
