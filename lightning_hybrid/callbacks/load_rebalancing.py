"""`LoadRebalancing`: rebalances blocks, experts and samples across ranks during training."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any, Literal

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_hybrid._lightning_private import Callback, steps_after_batch
from lightning_hybrid.adapt.rebalance import RebalancingRules, Watch, judge, look
from lightning_hybrid.adapt.stage_cuts import StageTime
from lightning_hybrid.batches import count_samples
from lightning_hybrid.callbacks.required import hybrid_strategy
from lightning_hybrid.dataloader.sharding import ByLength
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.request import Request
from lightning_hybrid.strategy import HybridStrategy
from lightning_hybrid.tuning.workload import Observation, Workload

Kind = Literal["stages", "experts", "replicas"]
KINDS: tuple[Kind, ...] = ("stages", "experts", "replicas")
EXPERTS_SHARE = 0.5
"""Assumed share of a step spent in experts, empirical: their balance is measured in tokens, not in seconds."""
GUESSED_STEPS = 2
"""Assumed cost of the first move, in steps, empirical; a later move is assumed to cost as much as the last one."""


class LoadRebalancing(Callback):
    """Moves load between ranks during training, and reverts moves that do not help.

    Every few steps the ranks exchange their measurements and rank 0 decides. A move is made when two consecutive checks
    predict that the step becomes shorter by `rules.min_gain` and the remaining steps pay for the move. Results do not
    change: blocks and experts move with their optimizer state, and gradients are weighted by samples.

    - stages, under `pp` with one stage per rank: the cuts with the smallest step time by measured times of the stages,
      on ranks that may differ in speed.
    - experts, under `ep`: the same number on each rank, packed by the tokens routed to them. With `expert_copies`, hot
      experts are replicated on several ranks, which share their tokens; weights of copies are sent in every forward
      pass.
    - sequences, with `lengths`: the samples of each global batch are distributed over replicas and microbatches so that
      all have the same cost, 6 h L + L^2 for a sequence of L tokens; gradients are weighted by tokens. For collate
      functions that do not pad.
    - replicas, under `dp` and `fsdp` without `ep`: samples of each global batch, by the speed of the replicas.

    Logs `rebalancing/<kind>_gain`, the share of a step that a better balance would save, and `rebalancing/moves`.

    Args:
        kinds: Kinds of load that may be moved.
        lengths: Tokens of every sample of the training dataset, by its index.
        width: Width of the model, h, in the cost of a sequence.
        expert_copies: Experts that each rank of `ep` computes in addition to its own.
        max_share: Upper limit of a replica's samples, as a multiple of an equal share; it has to fit into memory.
        rules: Thresholds and intervals of the decisions.

    Raises:
        ValueError: If an argument is not one of its possible values.
    """

    def __init__(
        self,
        kinds: tuple[Kind, ...] = KINDS,
        *,
        lengths: Sequence[int] | None = None,
        width: int = 1024,
        expert_copies: int = 0,
        max_share: float = 2.0,
        rules: RebalancingRules = RebalancingRules(),  # noqa: B008 -- frozen
    ) -> None:
        if not kinds or not set(kinds) <= set(KINDS):
            raise ValueError(f"`kinds` must be some of {', '.join(KINDS)}. Got {kinds!r}.")
        if max_share < 1:
            raise ValueError(f"`max_share` must be at least 1. Got {max_share}.")
        if width < 1:
            raise ValueError(f"`width` must be at least 1. Got {width}.")
        if expert_copies < 0:
            raise ValueError(f"`expert_copies` must be at least 0. Got {expert_copies}.")
        if lengths is not None and "replicas" in kinds:
            kinds = tuple(kind for kind in kinds if kind != "replicas")  # whose shares are counted in samples
        self._lengths, self._width, self._copies = lengths, width, expert_copies
        self._kinds, self._max_share, self._rules = tuple(kinds), max_share, rules
        self._watches = {kind: Watch() for kind in self._kinds}
        self._seen: list[StageTime] = []
        self._before: dict[str, Any] = {}
        """By kind, the division before a move that has not been judged yet."""
        self._wall: list[float] = []
        self._last: float | None = None
        self._steps = 0
        self._move_seconds = 0.0
        self._load: Workload | None = None
        self._strategy: HybridStrategy | None = None
        self._moves = False
        """True while this callback itself changes the layout."""
        self._restored: dict[str, Any] = {}
        self.moves: list[dict[str, Any]] = []
        """Every move so far: global step, kind, new division, predicted gain, and whether it reverted another move."""

    # ---- start

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            hybrid_strategy(trainer, self)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = hybrid_strategy(trainer, self)
        restored, self._restored = self._restored, {}
        if restored.get("layout") == str(strategy.layout):
            present = self._division(strategy)
            for kind in self._kinds:
                if restored["division"].get(kind) != present[kind]:
                    self._apply(strategy, kind, restored["division"][kind])
        self._steps, self._strategy = 0, strategy
        self._load = Workload(strategy.engine, strategy.data)
        self._begin(strategy)
        strategy.listeners.append(self)
        strategy.engine.run.patches.callback(self._end)

    def _end(self) -> None:
        if self._load is not None:
            self._load.release()

    def _begin(self, strategy: HybridStrategy) -> None:
        """Divides the data by length if `lengths` are given, and discards step times."""
        if self._lengths is not None:
            self._shard_by_length(strategy, self._lengths)
        self._wall, self._last = [], None

    def check_layout(self, request: Request) -> None:
        """Accepts every layout, since load can be measured in each."""

    def layout_changed(self, engine: Engine) -> None:
        """Measures in the new layout; discards earlier measurements, unless this callback has changed the layout."""
        if self._load is None or self._strategy is None:
            return
        self._load.follow(engine)
        if not self._moves:
            self._watches = {kind: Watch() for kind in self._kinds}
            self._seen, self._before = [], {}
            self._begin(self._strategy)

    def _shard_by_length(self, strategy: HybridStrategy, lengths: Sequence[int]) -> None:
        data, runner = strategy.data, strategy.engine.runner
        if not data.can_share:
            raise PartitionError(
                "`lengths` needs a single training DataLoader with a sampler, a `batch_size` and a length. Use "
                "`TokenBatchSampler` for batches of a token budget."
            )
        parts = runner.microbatches_of(data.global_batch_size // runner.mesh.layout.replicas)
        data.divide(ByLength(lengths=lengths, width=self._width, parts=parts))

    # ---- steps

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = hybrid_strategy(trainer, self)
        if self._load is None:
            return
        self._load.count(0 if strategy.engine.runner.padding else count_samples(batch))
        if not steps_after_batch(trainer):
            return
        self._load.end_step()
        now = time.perf_counter()
        if self._last is not None:
            self._wall.append(now - self._last)
        self._last = now
        self._steps += 1
        if self._steps % self._rules.every_n_steps == 0:
            self._look(trainer, pl_module, self._load)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = None

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, load: Workload) -> None:
        strategy = hybrid_strategy(trainer, self)
        seen = load.observe(self._rules.every_n_steps)
        self._note(seen)
        decided = None
        if trainer.global_rank == 0:
            seconds = median(self._wall) if self._wall else 0.0
            decided = self._decide(load, seen, seconds, self._steps_left(trainer))
        kind, division, back, gains, self._watches = strategy.broadcast(decided)
        self._wall = []
        if kind is not None:
            self._move(trainer, kind, division, gains.get(kind, 0.0), back)
        values = {f"rebalancing/{name}_gain": gain for name, gain in gains.items()}
        pl_module.log_dict({**values, "rebalancing/moves": float(len(self.moves))}, batch_size=1)

    def _note(self, seen: Observation) -> None:
        """Stores the latest time of each stage, identified by rank and blocks."""
        for time_ in seen.stages:
            same = (time_.rank, time_.first, time_.stop)
            self._seen = [t for t in self._seen if (t.rank, t.first, t.stop) != same]
            self._seen.append(time_)

    def _decide(
        self, load: Workload, seen: Observation, seconds: float, steps_left: int
    ) -> tuple[Kind | None, Any, bool, dict[str, float], dict[Any, Watch]]:
        """Returns the kind to move, its division, whether it reverts a move, the gains by kind, and the new state."""
        watches = dict(self._watches)
        found = {kind: self._better(kind, load, seen) for kind in self._kinds}
        gains = {str(kind): better[0] for kind, better in found.items() if better is not None}
        for kind in self._kinds:
            if watches[kind].rest:
                measure = load.expert_imbalance(seen.experts) if kind == "experts" else seconds
                back, watches[kind] = judge(watches[kind], measure, self._rules)
                return (kind if back else None), self._before.get(kind), back, gains, watches
        for kind in sorted(self._kinds, key=lambda k: -gains.get(k, 0.0)):
            better = found[kind]
            if better is None:
                continue
            takes = self._move_seconds or GUESSED_STEPS * seconds
            share = EXPERTS_SHARE if kind == "experts" else 1.0
            moves, watches[kind] = look(watches[kind], better[0], share * seconds, steps_left, takes, self._rules)
            if moves and kind == "experts":
                watches[kind] = replace(watches[kind], before_seconds=load.expert_imbalance(seen.experts))
            if moves:
                return kind, better[1], False, gains, watches
        return None, None, False, gains, watches

    def _better(self, kind: Kind, load: Workload, seen: Observation) -> tuple[float, Any] | None:
        if kind == "stages":
            return load.better_cuts(self._seen, seen.stages)
        if kind == "experts":
            return load.better_experts(seen.experts, self._copies)
        return load.better_shares(seen.replicas, self._max_share)

    def _steps_left(self, trainer: pl.Trainer) -> int:
        left = trainer.estimated_stepping_batches - trainer.global_step
        return int(min(left, sys.maxsize)) if left >= 0 and left != float("inf") else self._rules.horizon_steps

    # ---- moves

    def _move(self, trainer: pl.Trainer, kind: Kind, division: Any, gain: float, back: bool) -> None:
        strategy = hybrid_strategy(trainer, self)
        self._before[kind] = self._division(strategy)[kind]
        began = time.perf_counter()
        self._moves = True
        try:
            self._apply(strategy, kind, division)
        finally:
            self._moves = False
        if kind == "replicas" and self._load is not None:  # without a change of layout
            self._load.follow(strategy.engine)
        self._move_seconds = strategy.broadcast(time.perf_counter() - began)
        self._last = None
        self.moves.append(
            {"step": trainer.global_step, "kind": kind, "division": division, "gain": gain, "taken_back": back}
        )
        what = "reverted" if back else f"a step should become {gain:.0%} shorter"
        rank_zero_info(f"LoadRebalancing: {kind} {_shown(division)}: {what}.")

    def _division(self, strategy: HybridStrategy) -> dict[str, Any]:
        """Returns the current division of each kind of load."""
        request, data = strategy.request, strategy.data
        return {
            "stages": request.cuts,
            "experts": {"orders": dict(request.expert_orders), "hosts": dict(request.expert_hosts)},
            "replicas": data.shares if data.can_share else None,
        }

    def _apply(self, strategy: HybridStrategy, kind: str, division: Any) -> None:
        request = strategy.request
        if kind == "replicas":
            strategy.data.share(division)
        else:
            stages, experts = ({**self._division(strategy), kind: division}[k] for k in ("stages", "experts"))
            strategy.relayout(
                request.layout, cuts=stages, expert_orders=experts["orders"], expert_hosts=experts["hosts"]
            )

    # ---- end and checkpoints

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._load = self._strategy = None

    @override
    def state_dict(self) -> dict[str, Any]:
        strategy = self._strategy
        if strategy is None:
            return {}
        return {
            "layout": str(strategy.layout),
            "division": self._division(strategy),
            "watches": {kind: asdict(watch) for kind, watch in self._watches.items()},
            "seen": [asdict(t) for t in self._seen],
            "before": dict(self._before),
            "move_seconds": self._move_seconds,
            "moves": list(self.moves),
        }

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if not state_dict:
            return
        self._restored = {"layout": state_dict["layout"], "division": state_dict["division"]}
        self._watches |= {k: Watch(**w) for k, w in state_dict["watches"].items() if k in self._watches}
        self._seen = [StageTime(**t) for t in state_dict["seen"]]
        self._before, self._move_seconds = dict(state_dict["before"]), state_dict["move_seconds"]
        self.moves = list(state_dict["moves"])


def _shown(division: Any) -> str:
    if isinstance(division, Mapping):
        return f"of {len(division['orders'])} modules"
    return "as before" if division is None else f"at {division}"
