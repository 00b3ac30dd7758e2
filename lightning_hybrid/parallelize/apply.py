"""Applies a plan to a LightningModule in the one wrapping order, and removes it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_hybrid._torch_private import (
    forget_fully_shard,
    forget_sharded_step,
    forget_sharding_marks,
    hook_tables,
    keep_inputs,
    sharding_hidden,
)
from lightning_hybrid.collectives import gather_objects
from lightning_hybrid.experts.parallel import ExpertParallel
from lightning_hybrid.ghosts.deferred_init import DeferredInit
from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.ghosts.parameters import Parameters
from lightning_hybrid.ghosts.units import CallInterceptor
from lightning_hybrid.mesh import Mesh
from lightning_hybrid.parallelize.optimizers import OriginalParameters
from lightning_hybrid.parallelize.recompute import recomputed
from lightning_hybrid.patching import Patches, patched
from lightning_hybrid.replicas.batch_norm import BatchStatistics, has_batch_norm
from lightning_hybrid.replicas.calls import StepCalls, alike_on_all, problem_of
from lightning_hybrid.replicas.fsdp import shard_replicas
from lightning_hybrid.replicas.gradient_hooks import GradientHooks
from lightning_hybrid.replicas.missing import MissingGradients
from lightning_hybrid.replicas.reduction import (
    Exact,
    Hierarchical,
    InBfloat16,
    InBfloat16AddedExactly,
    Reduction,
    ShardedInBfloat16,
)
from lightning_hybrid.spec.expert_plan import ExpertPlan
from lightning_hybrid.spec.plan import Plan
from lightning_hybrid.tensor.apply import TensorParallel, apply_tensor_plan, part_of


class StepModule(nn.Module):
    """Runs a step of the LightningModule in its `forward`, so that hooks of `fully_shard` surround the step."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root
        self.contexts: list[Callable[[], AbstractContextManager]] = []
        """Entered around every step."""

    def forward(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns `step(*args, **kwargs)`, where `step` is a bound method of the LightningModule."""
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            return step(*args, **kwargs)


@dataclass
class Partition:
    """A plan and everything that `apply` installs on a module."""

    root: nn.Module
    mesh: Mesh
    plan: Plan
    interceptor: CallInterceptor
    parameters: Parameters
    step_module: StepModule
    whole_batch: str | None = None
    """Why a pipeline must not split a training batch into microbatches; None if it may, as far as is known."""
    tensor: TensorParallel | None = None
    experts: ExpertParallel | None = None
    whole: set[str] = field(default_factory=set)
    """Parameters that `fsdp` does not shard: scalars, and those that the step writes."""
    written: dict[str, str] = field(default_factory=dict)
    """The line that writes each parameter which the step writes, by name, under `fsdp`."""
    calls: StepCalls = StepCalls()
    """The calls of units on this replica's own first batch, under `fsdp`."""
    missing: MissingGradients | None = None
    """Completes the gradients of weights that some replicas do not use, under `fsdp`."""
    tied_weight_groups: dict[str, dist.ProcessGroup] = field(default_factory=dict)
    """The group of holders of each weight that several pipeline ranks hold, this rank included."""
    padding: Callable[[], bool] = lambda: False
    """Returns True if the samples of the running step count for nothing (see `engine.context.StepContext`)."""
    alone: Callable[[], bool] = lambda: False
    """Returns True while replicas run different numbers of steps."""
    shows_whole: bool = False
    """True while the module is as the user wrote it, with whole weights."""
    gradient_hooks: GradientHooks | None = None
    on_remove: Callable[[], None] | None = None
    """Called first when the partition is removed."""
    _overrides: list[tuple[nn.Module, Callable]] = field(default_factory=list)
    _batch_norms: Patches = field(default_factory=Patches)
    """Of torch's functions whose statistics are those of the global batch."""
    sync_norms: Patches = field(default_factory=Patches)
    """Of the forward of `SyncBatchNorm`, applied also in dry runs."""
    _hooks: dict[nn.Module, list[set]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.step_group = self.mesh.replica_group
        """One rank of each replica, for collectives inside steps."""
        self._statistics: BatchStatistics | None = None
        self.originals = OriginalParameters(self.parameters)
        """The user's parameters, which an optimizer may have that was made with the module."""

    def apply(self, device: torch.device, deferred_init: DeferredInit | None) -> None:
        """Applies the plan to the module. The wrapping order is defined here only.

        1. parameters of other stages become ghosts; 2. the others become real, or move to the device; 3. experts are
        divided; 4. tensor parallelism; 5. common batch statistics; 6. recomputation and compilation of blocks;
        7. sharded replicas; 8. groups for tied weights. Parameters of a model with deferred initialization become real
        one at a time, each divided before the next.

        Args:
            device: This rank's device.
            deferred_init: The recorded initialization of a module without weights; None for a module with weights.
        """
        before = {m: [set(table) for table in hook_tables(m)] for m in self.root.modules()}
        self.gradient_hooks = GradientHooks(self.parameters)
        local = self._local_names()
        plan, layout = self.plan, self.plan.layout
        self.parameters.release([n for n in self.parameters.names if n not in local], device)
        if plan.expert_plans:
            self.experts = ExpertParallel(self.root, plan.expert_plans, self.mesh.group("ep"))
        if deferred_init is not None:
            deferred_init.make_buffers_real(self.root)
            if plan.tensor_plan is not None or layout.fsdp == 1:
                self._make_real(deferred_init, local, device)
        self._divide_experts(local, deferred_init is not None)
        self.root.to(device)
        if plan.tensor_plan is not None:
            mesh = self.mesh.device_mesh["tp"]
            self.tensor = apply_tensor_plan(
                self.root, plan.tensor_plan, mesh, local.__contains__, deferred_init is not None
            )
            self.step_module.contexts.append(self.tensor.root_context)
        if layout.replicas > 1:
            self._share_batch_statistics()
        units = self.interceptor.units
        blocks = [b for b in units.blocks if local & self.parameters.inside(b)]
        if plan.recompute is not None:
            self.interceptor.wrap(blocks, partial(recomputed, how=plan.recompute))
        if plan.compile:
            self.interceptor.wrap(blocks, torch.compile)
        if layout.fsdp > 1:
            self._shard(local, blocks, deferred_init, device)
        self.gradient_hooks.attach()
        self.gradient_hooks.run_on_gathered([self.step_module, *self.root.modules()])
        self._create_tied_weight_groups()
        self._hooks = self._new_hooks(before)

    def _shard(
        self, local: set[str], blocks: list[str], deferred_init: DeferredInit | None, device: torch.device
    ) -> None:
        make_real = (
            None
            if deferred_init is None or self.tensor is not None
            else partial(self._make_real, deferred_init, device=device)
        )
        step_module = self.step_module
        if not getattr(self.root, "automatic_optimization", True):
            # weights change within a step, so none may stay gathered: shard every unit
            step_module, blocks = None, [u for u in self.interceptor.units.names if local & self.parameters.inside(u)]
        found = gather_objects(self.calls)
        blocks = self._called_alike(found, blocks)
        for calls in found:
            self.written |= calls.written
        experts = [] if self.experts is None else self.experts.modules()
        self.whole, overrides = shard_replicas(
            self.root, step_module, blocks, experts, self.parameters, local, self.written, self.mesh, make_real
        )
        self._overrides += overrides
        sync = self.plan.gradient_sync
        if sync.kind in ("bf16", "bf16_fp32acc"):
            reduce_scatter = ShardedInBfloat16(sync.kind == "bf16_fp32acc")
            for module in [self.step_module, *self.root.modules()]:
                if isinstance(module, FSDPModule):
                    module.set_custom_reduce_scatter(reduce_scatter)
        modules = [self.step_module, *self.root.modules()]
        for module in modules:
            if isinstance(module, FSDPModule):
                keep_inputs(module)
        self.missing = MissingGradients(self.step_module, modules, self.mesh.replica_group)

    def _called_alike(self, found: list[StepCalls], blocks: list[str]) -> list[str]:
        """Returns the blocks that all replicas call alike, by the calls of all ranks."""
        problem = problem_of(found)
        if problem is not None:
            rank_zero_warn(
                f"`layout='{self.plan.layout}'`: a trial run of the step without weights has failed, so it is not "
                "known which modules the replicas call, and all weights are gathered together instead of block by "
                f"block, which needs more memory. The error: {problem}"
            )
        return alike_on_all(found, blocks, self.plan.model.units)

    def reduction(self) -> Reduction:
        """Returns the reduction of whole gradients over replicas. Collective."""
        sync = self.plan.gradient_sync
        if sync.kind == "hierarchical":
            return Hierarchical(*self.mesh.nested_groups(sync.inner or self.mesh.neighbors))
        known = {"exact": Exact, "diloco": Exact, "bf16": InBfloat16, "bf16_fp32acc": InBfloat16AddedExactly}
        return known[sync.kind]()

    def _divide_experts(self, local: Collection[str], divided: bool) -> None:
        """Keeps this rank's part of the experts, unless `divided` already, and installs their `forward`."""
        experts = self.experts
        if experts is None:
            return
        for name in [] if divided else [n for n in self.parameters.names if n in local and experts.plan_of(n)]:
            part = experts.part_of(name, self.parameters[name].detach())
            self.parameters.put(name, nn.Parameter(part, requires_grad=self.parameters.requires_grad[name]))
        self._overrides += experts.install(local.__contains__)

    def _make_real(self, deferred_init: DeferredInit, names: Collection[str], device: torch.device) -> None:
        """Initializes the parameters `names`, and divides each before the next."""
        for name in [n for n in self.parameters.names if n in names]:
            present = self.parameters[name]
            if isinstance(present, DTensor):
                continue  # sharded already, as experts are
            real = deferred_init.make_real(present) if isinstance(present, Ghost) else present.detach()
            if self.experts is not None and self.experts.plan_of(name) is not None:
                real = self.experts.part_of(name, real)
            elif (sharded := self.plan.sharded_over_tp(name)) is not None:
                real = part_of(real, sharded, self.mesh.rank("tp"), self.plan.layout.tp)
            elif not isinstance(present, Ghost):
                continue
            wants = self.parameters.requires_grad[name]
            self.parameters.put(name, nn.Parameter(real.to(device), requires_grad=wants))

    def remove(self, wholes: Mapping[str, torch.Tensor] | None = None) -> None:
        """Removes the partition; then every rank has the user's module with all present weights. Collective.

        Args:
            wholes: Whole parameters by name; None: gathered from all ranks.
        """
        hooks, given = self._begin_removal(), wholes is not None
        wholes = wholes or {name: self.whole_parameter(name) for name in self.parameters.names}
        if self.tensor is not None:
            self.tensor.remove()
        self._uninstall()
        for name, whole in wholes.items():
            present = self.parameters[name]
            if given:
                self.parameters.put(name, whole)
            elif self.tensor is None or isinstance(present, Ghost) or self.expert_plan_of(name) is not None:
                self.parameters.put(name, nn.Parameter(whole, requires_grad=self.parameters.requires_grad[name]))
        if hooks is not None:
            hooks.attach()
        self.share_buffers()

    def detach(self, shapes: Mapping[str, Sequence[int]], device: torch.device) -> None:
        """Removes the partition and replaces all parameters by ghosts, for another partition.

        No weight is gathered: the caller keeps this rank's parts.

        Args:
            shapes: Shapes of the whole parameters, by name.
            device: This rank's device.
        """
        hooks = self._begin_removal()
        if self.tensor is not None:
            self.tensor.remove_hooks()
        self._uninstall()
        self.parameters.make_ghosts(shapes, device)
        if hooks is not None:
            hooks.attach()

    def pause(self) -> None:
        """Lets the user call the module within a run, between two steps, until `resume`."""
        self.reshard()
        self._batch_norms.restore()
        self.sync_norms.restore()
        self.interceptor.suspend()

    def resume(self) -> None:
        """Routes calls of units, metrics and BatchNorm through this partition again after `suspend`."""
        self.interceptor.resume()
        self._batch_norms.apply()
        self.sync_norms.apply()

    def suspend(self) -> None:
        """Lets the user call the module outside of a run, as far as a rank alone can; weights stay divided."""
        if isinstance(self.step_module, FSDPModule):
            forget_sharded_step(self.step_module)  # a step that has failed leaves weights gathered
        self.pause()

    def abandon(self) -> None:
        """Removes what an unfinished `apply` has installed, except attributes of modules, which the caller restores."""
        if self.tensor is not None:
            self.tensor.remove_hooks()
        for module in [self.step_module, *self.root.modules()]:
            if isinstance(module, FSDPModule):
                forget_fully_shard(module)
        if self.experts is not None:
            self.experts.remove()
        self._batch_norms.restore()
        self.sync_norms.restore()
        self.interceptor.remove()

    def _begin_removal(self) -> GradientHooks | None:
        if self.on_remove is not None:
            self.on_remove()
        self.reshard()
        if self.gradient_hooks is not None:
            self.gradient_hooks.collect()
        return self.gradient_hooks

    def _uninstall(self) -> None:
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                forget_fully_shard(module)
        if self.plan.layout.fsdp > 1:
            forget_sharding_marks(self.root)
        for module, ours in self._hooks.items():
            for table, ids in zip(hook_tables(module), ours, strict=True):
                for key in ids:
                    table.pop(key, None)
        self._batch_norms.restore()
        self.sync_norms.restore()
        for module, _ in self._overrides:
            del module.__dict__["forward"]
        if self.experts is not None:
            self.experts.remove()
        self.interceptor.remove()

    def sharded_blocks(self) -> list[nn.Module]:
        """Returns the modules that `fsdp` gathers, without those that contain another one."""
        sharded = [m for m in self.root.modules() if isinstance(m, FSDPModule)]
        return [m for m in sharded if not any(isinstance(c, FSDPModule) for c in m.modules() if c is not m)]

    def reshard(self) -> None:
        """Frees weights that `fsdp` has gathered for evaluation, so that the parameters are the sharded ones."""
        if self.plan.layout.fsdp == 1:
            return
        for module in [self.step_module, *self.root.modules()]:
            if isinstance(module, FSDPModule):
                module.reshard()

    def whole_parameter(self, name: str) -> torch.Tensor:
        """Returns the whole of parameter `name` on every rank. Collective."""
        return self.whole_of(name, self.parameters[name].detach())

    def whole_of(self, name: str, tensor: torch.Tensor | None) -> torch.Tensor:
        """Returns the whole of a tensor laid out like parameter `name`, on every rank. Collective.

        Args:
            name: A parameter's first name.
            tensor: This rank's part; not used on ranks that do not hold the parameter.
        """
        source = self.plan.ranks_of(name)[0]
        present = self.parameters[name]
        if self.mesh.rank("pp") == source and tensor is not None:
            whole = self.gathered(name, tensor).clone(memory_format=torch.contiguous_format)
        else:
            whole = torch.empty(self.shape_of(name), dtype=present.dtype, device=present.device)
        if self.plan.layout.pp > 1:
            group = self.mesh.group("pp")
            dist.broadcast(whole, dist.get_global_rank(group, source), group=group)
        return whole

    def gathered(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the whole of a tensor laid out like parameter `name`. Collective over the ranks that hold it."""
        if self.tensor is not None:
            tensor = self.tensor.full_tensor(name, tensor)
        elif isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        return tensor if self.experts is None else self.experts.gathered(name, tensor)

    def expert_plan_of(self, name: str) -> ExpertPlan | None:
        """Returns the division of parameter `name` over `ep`; None if it is not a parameter of experts."""
        return self.plan.expert_plan_of(name)

    def shape_of(self, name: str) -> torch.Size:
        """Returns the shape of the whole parameter `name`."""
        present = self.parameters[name]
        if self.experts is None or isinstance(present, Ghost):
            return present.shape
        return self.experts.whole_shape(name, present.shape)

    def share_buffers(self) -> None:
        """Gives every rank the buffers of all stages. Collective over the ranks of a pipeline."""
        if self.plan.layout.pp == 1:
            return
        group = self.mesh.group("pp")
        for name, buffer in self.root.named_buffers():
            dist.broadcast(buffer, dist.get_global_rank(group, self.buffer_rank(name)), group=group)

    def buffer_rank(self, name: str) -> int:
        """Returns the pipeline rank whose stage uses the buffer `name`."""
        for stage in self.plan.stages:
            if any(name.startswith(f"{unit}.") for unit in stage.units):
                return stage.rank
        return 0

    def _local_names(self) -> set[str]:
        rank = self.mesh.rank("pp")
        return {n for n in self.parameters.names if rank in self.plan.ranks_of(n)}

    def _share_batch_statistics(self) -> None:
        if has_batch_norm(self.root):
            self.step_group = self.mesh.step_group()
        statistics = self._statistics = BatchStatistics(self.step_group, lambda: self.padding(), lambda: self.alone())
        statistics.patch(self._batch_norms)
        self.step_module.contexts.append(statistics.in_step)
        self._batch_norms.apply()

    def _create_tied_weight_groups(self) -> None:
        """Creates the groups of pipeline ranks that hold the same weight. Collective over all ranks."""
        shared = {n: self.plan.ranks_of(n) for n in self.parameters.names if len(self.plan.ranks_of(n)) > 1}
        groups = {ranks: self.mesh.holder_group(ranks) for ranks in sorted(set(shared.values()))}
        self.tied_weight_groups = {n: group for n, ranks in shared.items() if (group := groups[ranks]) is not None}

    # ---- the module as the user wrote it

    @contextmanager
    def as_written(self, *, batch_statistics: bool = False) -> Iterator[None]:
        """Disables everything installed on the module, and restores classes; the caller makes the weights whole.

        Args:
            batch_statistics: True to keep the statistics of BatchNorm over all replicas.
        """
        with ExitStack() as stack:
            stack.enter_context(self.bare(batch_statistics=batch_statistics))
            if self.plan.layout.fsdp > 1:
                stack.enter_context(sharding_hidden(self.root))
            if self.experts is not None:
                stack.enter_context(self.experts.undivided())
            stack.enter_context(patched(self, shows_whole=True))
            yield

    @contextmanager
    def bare(self, *, batch_statistics: bool = False) -> Iterator[None]:
        """Disables everything installed on the module, for a run of a step on ghosts or whole weights.

        Args:
            batch_statistics: True to keep the statistics of BatchNorm over all replicas.
        """
        with ExitStack() as stack:
            for module, ours in self._hooks.items():
                for table, ids in zip(hook_tables(module), ours, strict=True):
                    kept = dict(table)
                    stack.callback(_restore, table, kept, ids)
                    _replace(table, {k: v for k, v in kept.items() if k not in ids})
            if not batch_statistics:
                stack.enter_context(self._batch_norms.restored())
            elif self._statistics is not None:
                stack.enter_context(self._statistics.in_step())
            for module, forward in self._overrides:
                del module.__dict__["forward"]
                stack.callback(module.__dict__.__setitem__, "forward", forward)
            for module, forward in () if self.experts is None else self.experts.dry_forwards():
                module.__dict__["forward"] = forward
            if self.tensor is not None:
                stack.enter_context(self.tensor.disabled())
            yield

    def _new_hooks(self, before: dict[nn.Module, list[set]]) -> dict[nn.Module, list[set]]:
        found = {
            m: [set(t) - old for t, old in zip(hook_tables(m), before[m], strict=True)] for m in self.root.modules()
        }
        return {m: ours for m, ours in found.items() if any(ours)}


def _restore(table: dict, kept: dict, ids: set) -> None:
    """Puts the hooks `ids` of `kept` back into a table of hooks, where the user may have added and removed others."""
    added = {k: v for k, v in table.items() if k not in kept}
    _replace(table, {**{k: v for k, v in kept.items() if k in ids or k in table}, **added})


def _replace(target: dict, content: dict) -> None:
    target.clear()
    target.update(content)
