"""Measures the workload of ranks, and computes divisions that balance it, for callbacks that rebalance load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_hybrid.adapt.expert_placement import imbalance, kept_in_place, owners, place_experts
from lightning_hybrid.adapt.shares import share_by_speed
from lightning_hybrid.adapt.stage_cuts import StageTime, best_cuts, fit_costs, step_seconds
from lightning_hybrid.collectives import gather_objects
from lightning_hybrid.dataloader.replica import ReplicaData
from lightning_hybrid.engine.clocks import Clocks
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.spec.stages import stages_per_rank


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Measurements of all ranks since the last observation, equal on all ranks."""

    stages: tuple[StageTime, ...]
    """Times of the pipeline's stages, of the slowest rank of each."""
    replicas: tuple[float, ...]
    """Seconds of computation per sample of each replica; under `fsdp`, in the forward passes of its blocks."""
    experts: Mapping[str, tuple[int, ...]]
    """Tokens of each expert, by module of experts."""


class Workload:
    """Measures the workload of a running training.

    Args:
        engine: The engine of the running fit.
        data: The data of this rank's replica.
    """

    def __init__(self, engine: Engine, data: ReplicaData) -> None:
        self._data = data
        self._clocks = Clocks(engine.device)
        self.follow(engine)

    def follow(self, engine: Engine) -> None:
        """Discards the measurements of the previous layout, and measures under `engine`. Collective."""
        self._clocks.release()
        self.engine, self._samples = engine, 0
        self._clocks = Clocks(engine.device)
        engine.runner.time_computation(self._clocks)
        engine.expert_loads(self)

    def release(self) -> None:
        """Stops measuring."""
        self._clocks.release()

    def count(self, samples: int) -> None:
        """Counts the samples of a batch that this replica has run."""
        self._samples += samples

    def end_step(self) -> None:
        """Ends a step of the optimizer."""
        self._clocks.end_step()

    def observe(self, steps: int) -> Observation:
        """Returns the measurements of the last `steps` steps. Collective."""
        runner = self.engine.runner
        mesh, plan, pipeline = runner.mesh, runner.partition.plan, runner.pipeline
        stages, step = self._clocks.read(pipeline.parts if pipeline is not None else 1)
        own = (stages, step * steps / max(self._samples, 1))
        self._samples = 0
        slowest: dict[int, float] = {}
        replicas = [0.0] * mesh.layout.replicas
        for place, (of_rank, seconds) in zip(mesh.places, gather_objects(own), strict=True):
            for stage, found in of_rank.items():
                slowest[stage] = max(found, slowest.get(stage, 0.0))
            replica = place.replica(mesh.layout)
            replicas[replica] = max(replicas[replica], seconds)
        times = [
            StageTime(rank=s.rank, first=s.first, stop=s.stop, seconds=slowest[s.index])
            for s in plan.stages
            if s.index in slowest
        ]
        loads = {name: tuple(found.tolist()) for name, found in self.engine.expert_loads(self).items()}
        return Observation(stages=tuple(times), replicas=tuple(replicas), experts=loads)

    # ---- balanced divisions, each with its predicted gain as a fraction of a step

    def better_cuts(self, seen: Sequence[StageTime], now: Sequence[StageTime]) -> tuple[float, tuple[int, ...]] | None:
        """Returns gain and cuts of the pipeline by `adapt.stage_cuts`; None if no cuts are known.

        Args:
            seen: All measurements of this model on these ranks.
            now: Measurements of the current stages.
        """
        runner = self.engine.runner
        plan, pipeline = runner.partition.plan, runner.pipeline
        if pipeline is None or len(now) < len(plan.stages) or stages_per_rank(plan.schedule) > 1:
            return None
        costs, speeds = fit_costs(plan.model.costs, seen, plan.layout.pp)
        cuts = best_cuts(costs, speeds, pipeline.parts, plan.model.places)
        if cuts is None:
            return None
        bounds = [0, *cuts, len(costs)]
        better = [sum(costs[a:b]) * s for a, b, s in zip(bounds, bounds[1:], speeds, strict=False)]
        present = step_seconds([t.seconds for t in now], pipeline.parts)
        return 1 - step_seconds(better, pipeline.parts) / present, cuts

    def better_shares(self, seconds: Sequence[float], most: float) -> tuple[float, tuple[int, ...]] | None:
        """Returns gain and shares of a global batch for replicas of different speed; None if shares cannot differ.

        Args:
            seconds: Seconds per sample of each replica.
            most: Largest share of a replica, as a multiple of an equal share.
        """
        runner, data = self.engine.runner, self._data
        layout = runner.mesh.layout
        if layout.replicas < 2 or layout.ep > 1 or not data.can_share or not all(seconds):
            return None
        size = runner.pipeline.parts if runner.pipeline is not None else 1
        parts, rest = divmod(data.global_batch_size, size)
        if rest or parts < layout.replicas:
            return None
        limit = int(most * parts / layout.replicas)
        shares = tuple(n * size for n in share_by_speed(seconds, parts, max(limit, -(-parts // layout.replicas))))
        old = max(n * t for n, t in zip(data.shares, seconds, strict=True))
        return 1 - max(n * t for n, t in zip(shares, seconds, strict=True)) / old, shares

    def better_experts(
        self, loads: Mapping[str, Sequence[int]], copies: int
    ) -> tuple[float, dict[str, dict[str, Any]]] | None:
        """Returns gain and placement of experts on the ranks of `ep`; None if none are divided or have tokens.

        The gain is that of the most loaded rank, summed over the model.

        Args:
            loads: Tokens of each expert, by module.
            copies: Number of experts that a rank computes in addition to as many as it holds.
        """
        runner = self.engine.runner
        ranks, plans = runner.mesh.layout.ep, runner.partition.plan.expert_plans
        loads = {name: of_module for name, of_module in loads.items() if sum(of_module)}
        if ranks < 2 or not loads:
            return None
        orders, hosts, old, new = {}, {}, 0.0, 0.0
        for name, of_module in loads.items():
            plan = plans[name]
            own = [plan.part(rank, ranks) for rank in range(ranks)]
            most = plan.experts - plan.experts // ranks  # more copies would place an expert twice on a rank
            hosted = kept_in_place(place_experts(of_module, ranks, ranks * min(copies, most)), own)
            orders[name] = tuple(expert for part in owners(hosted, own) for expert in part)
            if copies:
                hosts[name] = tuple(map(tuple, hosted))
            old += self._imbalance(name, of_module)
            new += imbalance(of_module, hosted)
        return 1 - new / old, {"orders": orders, "hosts": hosts}

    def expert_imbalance(self, loads: Mapping[str, Sequence[int]]) -> float:
        """Returns the current ratio of the largest load of a rank to the mean, summed over the modules of experts."""
        return sum(self._imbalance(name, of_module) for name, of_module in loads.items())

    def _imbalance(self, name: str, loads: Sequence[int]) -> float:
        runner = self.engine.runner
        plan, ranks = runner.partition.plan.expert_plans[name], runner.mesh.layout.ep
        return imbalance(loads, [plan.computed(rank, ranks) for rank in range(ranks)])
