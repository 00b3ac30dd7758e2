"""Requests: a layout and the options that belong to it, as the user gives them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypedDict

from typing_extensions import Unpack

from lightning_hybrid.spec.checks import check_choices
from lightning_hybrid.spec.gradient_sync import GradientSync
from lightning_hybrid.spec.layout import Layout
from lightning_hybrid.spec.plan import Plan, Recompute

Schedule = Literal["GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"]


class LayoutOptions(TypedDict, total=False):
    """Options of a change of layout; None is the same as leaving an option out."""

    schedule: Schedule | None
    """The pipeline schedule; by default as before."""
    microbatches: int | Literal["auto"] | None
    """The number of microbatches; by default as before."""
    gradient_sync: str | GradientSync | None
    """Gradient synchronization between replicas; by default as before."""
    cuts: Sequence[int] | None
    """The first call of each pipeline stage but the first, by number of the call in the plan; by default by FLOPs."""
    expert_orders: Mapping[str, Sequence[int]] | None
    """By name of a module of experts: the expert at each place over the ranks of `ep`; by default in their order."""
    expert_hosts: Mapping[str, Sequence[Sequence[int]]] | None
    """By name of a module of experts: the experts that each rank of `ep` computes; by default those that it has.

    Ranks that compute the same expert share the expert's tokens. Missing weights are sent to a rank in every forward
    pass, and the gradients are sent back.
    """


@dataclass(frozen=True, kw_only=True)
class Request:
    """A layout and its options, as the user gives them.

    Raises:
        ValueError: If a value is not one of its possible values.
    """

    layout: Layout
    schedule: str = "1F1B"
    microbatches: int | str = "auto"
    tensor_plan: Mapping[str, str] | None = None
    cuts: tuple[int, ...] | None = None
    """First call of each pipeline stage but the first, by its index in the step's trace; None: by FLOPs."""
    gradient_sync: GradientSync = GradientSync()
    """Gradient synchronization between replicas."""
    expert_orders: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By name of a module of experts: the expert at each place over the ranks of `ep`; by default in their order."""
    expert_hosts: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """By name of a module of experts: the experts that each rank of `ep` computes; by default those that it holds."""
    recompute: Recompute | None = None
    """Activation checkpointing of blocks."""
    compile: bool = False
    """True if each block is compiled."""
    on_nonfinite: Literal["raise", "skip"] = "raise"
    """Policy if a gradient or the loss is not finite."""
    plan: Plan | None = None
    """A plan to use unchanged, with whose values the other fields agree; None: the request is planned."""

    def __post_init__(self) -> None:
        check_choices(self.schedule, self.microbatches, self.recompute)
        if not isinstance(self.compile, bool):
            raise ValueError(f"`compile` must be True or False. Got {self.compile!r}.")
        if self.on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"`on_nonfinite` must be 'raise' or 'skip'. Got {self.on_nonfinite!r}.")

    def in_layout(self, layout: str | Layout | None) -> tuple[Layout | None, Request]:
        """Returns the layout that `layout` gives, or None, and this request in that layout.

        Args:
            layout: A layout or its text form; or the path of a plan, which ends in `.yaml` or `.yml`.

        Raises:
            ValueError: If `layout` cannot be read, or this request contradicts the plan.
        """
        if not isinstance(layout, str) or not layout.endswith((".yaml", ".yml")):
            if layout is not None and not isinstance(layout, str | Layout):
                raise ValueError(
                    f"`layout` must be text such as 'dp2-tp2-pp2', a `Layout`, or the path of a plan. Got {layout!r}."
                )
            given = Layout.parse(layout) if isinstance(layout, str) else layout
            return given, replace(self, layout=given or Layout())
        plan = Plan.from_yaml(layout)
        usual, request = Request(layout=plan.layout), replace(Request.of(plan), on_nonfinite=self.on_nonfinite)
        names = ["tensor_plan", "gradient_sync", "recompute", "compile"]
        if plan.layout.pp > 1:
            names += ["schedule", "microbatches"]
        else:  # the plan has none; later layouts may
            request = replace(request, schedule=self.schedule, microbatches=self.microbatches)
        for name in names:
            given = getattr(self, name)
            if given == getattr(usual, name) or given == getattr(plan, name):
                continue
            planned = "a plan for every weight" if name == "tensor_plan" else repr(getattr(plan, name))
            raise ValueError(
                f"`{name}={given!r}` contradicts `layout={layout!r}`, a plan that has {planned}. Leave `{name}` out, "
                f"or give `layout='{plan.layout}'` instead of the plan."
            )
        return plan.layout, request

    @classmethod
    def of(cls, plan: Plan) -> Request:
        """Returns the request for exactly this plan."""
        return cls(
            layout=plan.layout,
            schedule=plan.schedule,
            microbatches=plan.microbatches if plan.layout.pp > 1 else "auto",
            cuts=plan.cuts or None,
            gradient_sync=plan.gradient_sync,
            expert_orders={n: e.order for n, e in plan.expert_plans.items() if e.order is not None},
            expert_hosts={n: e.hosts for n, e in plan.expert_plans.items() if e.hosts is not None},
            recompute=plan.recompute,
            compile=plan.compile,
            plan=plan,
        )

    def for_another_module(self) -> Request:
        """Returns the request without cuts and experts' places, which were chosen for one module; a plan stays."""
        return self if self.plan is not None else replace(self, cuts=None, expert_orders={}, expert_hosts={})

    def arguments(self) -> dict[str, object]:
        """Returns the fields by name, a plan by its SHA-256; the values must be equal on all ranks."""
        plan = None if self.plan is None else hashlib.sha256(self.plan.to_text().encode()).hexdigest()[:12]
        return {**vars(self), "plan": plan}

    def changed(self, layout: str | Layout, **options: Unpack[LayoutOptions]) -> Request:
        """Returns this request under another layout."""
        sync = options.get("gradient_sync")
        cuts, orders, hosts = (options.get(name) for name in ("cuts", "expert_orders", "expert_hosts"))
        return replace(
            self,
            layout=Layout.parse(layout) if isinstance(layout, str) else layout,
            plan=None,
            schedule=options.get("schedule") or self.schedule,
            microbatches=options.get("microbatches") or self.microbatches,
            gradient_sync=self.gradient_sync if sync is None else GradientSync.of(sync),
            cuts=None if cuts is None else tuple(cuts),
            expert_orders={name: tuple(order) for name, order in (orders or {}).items()},
            expert_hosts={name: tuple(map(tuple, placed)) for name, placed in (hosts or {}).items()},
        )
