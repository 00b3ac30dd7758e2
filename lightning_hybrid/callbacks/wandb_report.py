"""Shows plan, balance and events of a run in Weights & Biases, and the system metrics of every node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_hybrid._lightning_private import wandb_loggers
from lightning_hybrid.callbacks.events import Event
from lightning_hybrid.metrics.loggers import KEY
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.plan import Plan

_PLAN_COLUMNS: list[Any] = ["part", "rank", "modules", "parameters", "predicted share of FLOPs"]
_EVENT_COLUMNS: list[Any] = ["step", "kind", "change"]


class WandbReport:
    """What `HybridMonitor` sends to the `WandbLogger`s of a trainer beside values; made on rank 0 only.

    Args:
        trainer: The trainer.
        pictures: Whether the balance of stages and experts is drawn.
    """

    def __init__(self, trainer: pl.Trainer, pictures: bool) -> None:
        self._trainer, self._pictures = trainer, pictures
        self._loggers = wandb_loggers(trainer)
        self._events: list[Event] = []
        self._draws = 0

    def show_plan(self, plan: Plan, step: int, *, changed: bool = False) -> None:
        """Logs a plan as a table; a plan that has changed also as configuration, where the first one is already."""
        import wandb

        self._draws = 0
        record = plan.record()
        for logger in self._loggers:
            if changed and self._trainer.enable_autolog_hparams:
                logger.log_hyperparams({KEY: record})
            self._log(logger, {"plan/table": wandb.Table(columns=_PLAN_COLUMNS, data=[*plan_rows(plan)])}, step)

    def show_events(self, new: Sequence[Event], step: int) -> None:
        """Logs all events so far as a table, if there are new ones."""
        import wandb

        if not new:
            return
        self._events += new
        rows: list[Any] = [list(event) for event in self._events]
        for logger in self._loggers:
            self._log(logger, {"events/table": wandb.Table(columns=_EVENT_COLUMNS, data=rows)}, step)

    def draw(self, values: Mapping[str, float], loads: Mapping[str, Sequence[int]], plan: Plan, step: int) -> None:
        """Draws the balance of stages and experts, at the first logged step that has it, the second, fourth and so on.

        Args:
            values: The values that are logged with this step.
            loads: Tokens of each expert since the last logged step, by module.
            plan: The plan in force.
            step: The logged step.
        """
        stages = [stage.index for stage in plan.stages if f"stages/share_{stage.index}" in values]
        routed = any(map(sum, loads.values()))
        if not (stages or routed):
            return
        self._draws += 1
        if not self._pictures or self._draws & (self._draws - 1):
            return
        found: dict[str, Any] = {}
        if stages:
            measured, predicted = ([values[f"stages/share_{s}{end}"] for s in stages] for end in ("", "_predicted"))
            found["plan/stage_balance"] = stage_picture(measured, predicted)
        if routed:
            found["experts/load"] = expert_picture(loads)
        for logger in self._loggers:
            self._log(logger, found, step)

    def _log(self, logger: Any, values: dict[str, Any], step: int) -> None:
        logger.log_metrics(values, step=step)


def plan_rows(plan: Plan) -> list[list[Any]]:
    """Returns a plan as rows of a table: its stages, and what is sharded."""
    record = plan.record()
    rows: list[list[Any]] = [["layout", "", record["layout"], "", ""]]
    for index, stage in enumerate(record.get("stages", ())):
        modules = f"{stage['first_module']} .. {stage['last_module']}"
        rows.append([f"stage {index}", str(stage["rank"]), modules, str(stage["parameters"]), str(stage["flop_share"])])
    return rows + [["sharded", "", text, "", ""] for text in record.get("sharded", ())]


def stage_picture(measured: Sequence[float], predicted: Sequence[float]) -> Any:
    """Returns a picture of the shares of stages, by matplotlib, or a bar chart of W&B if that is not installed."""
    import wandb

    figure = _figure()
    if figure is None:
        rows: list[Any] = [[f"stage {i}", share] for i, share in enumerate(measured)]
        columns: list[Any] = ["stage", "share"]
        table = wandb.Table(columns=columns, data=rows)
        return wandb.plot.bar(table, "stage", "share", title="Share of computation")
    axes = figure.add_subplot()
    for shift, shares, label in ((-0.2, measured, "measured"), (0.2, predicted, "predicted")):
        axes.bar([i + shift for i in range(len(shares))], list(shares), width=0.4, label=label)
    axes.set_xticks(range(len(measured)))
    axes.set_xlabel("stage")
    axes.set_ylabel("share of computation")
    axes.legend()
    return wandb.Image(figure)


def expert_picture(loads: Mapping[str, Sequence[int]]) -> Any:
    """Returns a heat map of the tokens of experts relative to the mean; a table if matplotlib is not installed."""
    import wandb

    shares = {name: [n * len(counts) / max(1, sum(counts)) for n in counts] for name, counts in loads.items()}
    figure = _figure()
    if figure is None:
        rows: list[Any] = [
            [name, expert, share] for name, of_module in shares.items() for expert, share in enumerate(of_module)
        ]
        columns: list[Any] = ["module", "expert", "tokens, relative to the mean"]
        return wandb.Table(columns=columns, data=rows)
    axes = figure.add_subplot()
    width = max(map(len, shares.values()))
    image = axes.imshow(
        [[*row, *[float("nan")] * (width - len(row))] for row in shares.values()], aspect="auto", vmin=0
    )
    axes.set_yticks(range(len(shares)), list(shares))
    axes.set_xlabel("expert")
    figure.colorbar(image, label="tokens, relative to the mean")
    return wandb.Image(figure)


def _figure() -> Any:
    """Returns an empty figure, which belongs to no window; None if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(6, 4), layout="constrained")


# ---- every node


def join_run(trainer: pl.Trainer) -> Any:
    """Joins the run of the first `WandbLogger` from every other node, so that W&B shows its system metrics. Collective.

    Returns:
        The client on the first rank of a node other than the first one; None on the other ranks.

    Raises:
        PartitionError: On all ranks, if the run cannot be joined.
    """
    loggers = wandb_loggers(trainer)
    found = None
    if loggers and trainer.is_global_zero:
        run = loggers[0].experiment
        found = (run.id, run.project, run.entity, run.settings.mode)
    found = trainer.strategy.broadcast(found)
    if found is None or found[-1] != "shared":
        raise PartitionError(
            "`wandb_every_node=True` needs a run that several processes may write, but there is "
            f"{'no `WandbLogger`' if found is None else f'one in the mode {found[-1]!r}'}. Use `WandbLogger(settings="
            "wandb.Settings(mode='shared', x_primary=True, x_label='node0'))`."
        )
    if trainer.node_rank == 0 or trainer.local_rank > 0:
        return None
    import wandb

    run_id, project, entity, _ = found
    settings = wandb.Settings(
        mode="shared", x_primary=False, x_label=f"node{trainer.node_rank}", x_update_finish_state=False
    )
    return wandb.init(id=run_id, project=project, entity=entity or None, settings=settings)
