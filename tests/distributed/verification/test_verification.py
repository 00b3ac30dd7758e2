"""`verify`: a run compares its first step with one process; errors of the strategy are found before training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from lightning_hybrid import PartitionError
from lightning_hybrid.batches import count_samples
from lightning_hybrid.engine import gradients, pipeline, stage
from lightning_hybrid.engine.context import StepContext
from lightning_hybrid.engine.pipeline import Pipeline
from lightning_hybrid.launch.failures import RankFailed
from lightning_hybrid.patching import patched
from lightning_hybrid.replicas import reducer
from lightning_hybrid.replicas.reduction import Exact
from lightning_hybrid.tensor import collectives as tensor_collectives
from lightning_hybrid.verification import comparison, whole_step
from tests.distributed.jobs import Classifier, Numbers, quiet, verified_trainer_for, weights
from tests.harness import RankError, RankGroup
from tests.pairwise import quick


class Random(Classifier):
    """With dropout, noise, running statistics, and other state that the step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.norm = nn.BatchNorm1d(16)
        self.counted = 0

    def training_step(self, batch, batch_idx):
        self.counted += 1
        x = batch.pop("x")
        batch["x"] = self.norm(self.dropout(x)) + 0.1 * torch.randn_like(x)
        return super().training_step(batch, batch_idx)


def fit(
    layout: str | None, verify: str, module: type = Classifier, strategy: Mapping = {}, **options: Any
) -> dict[str, Any]:  # noqa: B006 -- not changed
    """Trains the module; weights, logs, rows of the last verification."""
    quiet()
    L.seed_everything(7, verbose=False)
    built = module()
    trainer, replicas = verified_trainer_for(
        layout, strategy_options=None if layout is None else {"verify": verify, **strategy}, **options
    )
    trainer.fit(built, DataLoader(Numbers(), batch_size=16 // replicas))
    verifier: Any = getattr(trainer.strategy, "_verifier", None)
    return {
        "weights": weights(trainer, built),
        "logs": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "rows": [] if verifier is None else verifier.rows,
    }


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "tp2", "pp2"], "fsdp2", "pp2"))
def test_verification_has_no_effect(ranks2: RankGroup, layout: str) -> None:
    with_it, without = ranks2.call(fit, layout, "start", Random)[0], ranks2.call(fit, layout, "off", Random)[0]
    assert with_it["rows"][0][0].startswith("loss and gradients of")
    assert "largest relative difference" in with_it["rows"][0][1], with_it["rows"]
    assert without["rows"] == []
    assert with_it["logs"] == without["logs"]
    for name, value in without["weights"].items():
        assert torch.equal(with_it["weights"][name], value), name


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "tp2", "pp2"], "fsdp2"))
def test_accumulated_gradients_stay(ranks2: RankGroup, layout: str) -> None:
    """In each batch, also between the two of an update; the last update of an epoch has one."""
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 2}
    with_it = ranks2.call(fit, layout, "every 1 step", **options)[0]
    without = ranks2.call(fit, layout, "off", **options)[0]
    assert "largest relative difference" in with_it["rows"][0][1], with_it["rows"]
    assert with_it["logs"] == without["logs"]
    for name, value in without["weights"].items():
        assert torch.equal(with_it["weights"][name], value), name


class InLowerPrecision(Classifier):
    """The step computes blocks in bfloat16 itself, whatever the precision of the run is."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            for block in self.blocks:
                x = block(x)
        return self.head(x.float())


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "tp2", "pp2"], "tp2"))
def test_the_bound_is_that_of_the_precision_that_the_step_enters(ranks2: RankGroup, layout: str) -> None:
    rows = ranks2.call(fit, layout, "start", InLowerPrecision)[0]["rows"]
    assert "largest relative difference" in rows[0][1], rows


class Tied(Classifier):
    """With one weight at both ends of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(16, 16, bias=False)
        self.unembedding = nn.Linear(16, 16, bias=False)
        self.unembedding.weight = self.embedding.weight

    def forward(self, x):
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.unembedding(x))


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _skipping_one(self: Any, out: Any, step: Any, original: Any = Pipeline._loss) -> Any:
    return original(self, out, step) * float(bool(step.losses))


def _first_half(batch: dict[str, torch.Tensor], count: int, _: Any = None) -> list[dict[str, torch.Tensor]]:
    return [{key: value[: len(value) // 2] for key, value in batch.items()}] * count


def _stale(self: Any, args: tuple, kwargs: dict, original: Any = stage.StageRun._enter, first: Any = []) -> Any:  # noqa: B006
    first = first or first.append(self.inputs) or first
    self.inputs = [tensor.detach().clone().requires_grad_() for tensor in first[0]]
    return original(self, args, kwargs)


def _summed(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
    ctx.group = group
    return tensor.clone()


ERRORS: dict[str, tuple[str, Any, str, Any]] = {
    "replicas are not averaged": ("dp2", Exact, "begin", lambda *_: _nothing),
    "replicas with fewer samples weigh as much": ("dp2", StepContext, "scaled", lambda _, loss: loss),
    "shards are summed, not averaged": ("fsdp2", StepContext, "scaled", lambda _, loss: loss * 2),
    "the sum over tp is left out": ("tp2", tensor_collectives._Sum, "forward", staticmethod(_summed)),
    "gradients of a stage are dropped": ("pp2", reducer.StashedGradients, "add", _nothing),
    "a microbatch is skipped": ("pp2", Pipeline, "_loss", _skipping_one),
    "a stage sends other values": ("pp2", stage, "_to_send", lambda value, send=stage._to_send: send(value) * 0.99),
    "ghosts are stale": ("pp2", stage.StageRun, "_enter", _stale),
    "tied weights are not summed": ("pp2", gradients, "sum_over_holders", _nothing),
    "each microbatch is the first one": ("pp2", pipeline, "split_batch", _first_half),
}
"""Layout, and what is replaced by what: deliberate errors of the strategy."""


def fit_wrong(error: str) -> str:
    """The message with which a run with a deliberate error is refused."""
    quiet()
    L.seed_everything(7, verbose=False)
    layout, owner, name, wrong = ERRORS[error]
    trainer, replicas = verified_trainer_for(layout, max_steps=1)
    samples = 15 if error == "replicas with fewer samples weigh as much" else 48
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, wrong)
        try:
            trainer.fit(Tied(), DataLoader(Numbers(samples), batch_size=16 // replicas))
        except (PartitionError, RankFailed) as refusal:
            return str(refusal)
    return "trained"


@pytest.mark.parametrize("error", ERRORS)
def test_errors_of_the_strategy_are_found(ranks2: RankGroup, error: str) -> None:
    messages = ranks2.call(fit_wrong, error)
    assert "trained" not in messages
    assert f"`layout='{ERRORS[error][0]}'`: the step of `Tied.training_step` (" in messages[0], messages[0]


class Contrastive(Classifier):
    """Whose loss compares the samples of a batch with each other."""

    def training_step(self, batch, batch_idx):
        rows = nn.functional.normalize(self(batch["x"]), dim=1)
        similar = (rows @ rows.T - 1e3 * torch.eye(len(rows))) / 0.5
        loss = nn.functional.cross_entropy(similar, torch.arange(len(rows)).roll(1))
        self.log("loss_epoch", loss, on_step=False, on_epoch=True)
        return loss


def fit_contrastive(layout: str | None, verify: str, **options: Any) -> tuple[float, list[tuple[str, str]], list[str]]:
    """The loss of an epoch, the rows of the verification, and the warnings."""
    quiet()
    L.seed_everything(7, verbose=False)
    more = None if layout is None else {"verify": verify, **options}
    trainer, replicas = verified_trainer_for(layout, strategy_options=more)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.fit(Contrastive(), DataLoader(Numbers(), batch_size=16 // replicas))
    verifier: Any = getattr(trainer.strategy, "_verifier", None)
    return (
        float(trainer.callback_metrics["loss_epoch"]),
        [] if verifier is None else verifier.rows,
        [str(w.message) for w in found if "mean over the samples" in str(w.message)],
    )


def test_microbatches_are_avoided_where_the_loss_compares_samples(ranks2: RankGroup) -> None:
    expected = fit_contrastive(None, "off")[0]
    for loss, rows, _ in ranks2.call(fit_contrastive, "pp2", "start"):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert rows[0][0] == "microbatches"
        assert rows[0][1].startswith("1 instead of ")
        assert "against one process" in rows[1][0]
    assert ranks2.call(fit_contrastive, "pp2", "off")[0][0] != pytest.approx(expected, rel=1e-3)


def test_chosen_microbatches_are_refused_where_the_loss_compares_samples(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match=r"`microbatches=2`: `Contrastive.training_step` .* Use `microbatches=1`"):
        ranks2.call(fit_contrastive, "pp2", "start", microbatches=2)


def test_a_loss_that_is_no_mean_over_samples_warns(ranks2: RankGroup) -> None:
    for _, rows, found in ranks2.call(fit_contrastive, "dp2", "start"):
        assert rows[-1][0] == "loss as a mean over samples"
        assert rows[-1][1].startswith("differs by ")
        assert len(found) <= 1
    assert "`self.all_gather(..., sync_grads=True)`" in ranks2.call(fit_contrastive, "dp2", "start")[0][2][0]
    with pytest.raises(RankError, match=r"`verify='strict'`: `Contrastive.training_step`"):
        ranks2.call(fit_contrastive, "dp2", "strict")


class Normalized(Classifier):
    """Whose loss compares features over the samples of a batch, which it normalizes first, as Barlow Twins does."""

    def training_step(self, batch, batch_idx):
        rows = nn.functional.batch_norm(self(batch["x"]), None, None, training=True)
        return (rows.T @ rows.roll(1, 1) / len(rows) - torch.eye(rows.shape[1])).square().sum()


class Variance(Classifier):
    """Whose loss is 0 for one sample."""

    def training_step(self, batch, batch_idx):
        rows = self(batch["x"])
        return (rows - rows.mean(0)).square().mean()


class Gathered(Classifier):
    """Whose loss compares samples with those of all replicas."""

    differentiates = True

    def training_step(self, batch, batch_idx):
        rows, others = (nn.functional.normalize(self(batch["x"] + shift), dim=1) for shift in (0.0, 0.1))
        all_others: Any = self.all_gather(others, sync_grads=self.differentiates)
        positives = torch.arange(len(rows)) + len(rows) * self.global_rank
        return nn.functional.cross_entropy(rows @ all_others.flatten(0, 1).T / 0.5, positives)


class GatheredValues(Gathered):
    """Whose gradient is that of this replica's samples only."""

    differentiates = False


class OwnCollective(Classifier):
    """Which communicates itself: the strategy cannot run it as one process does."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        sum_of_all = loss.detach().clone()
        dist.all_reduce(sum_of_all)
        return loss * sum_of_all


class OtherShapes(Classifier):
    """Samples of several lengths, of which a replica has one."""

    def training_step(self, batch, batch_idx):
        return self(batch["x"][:, :16]).square().mean()


class Lengths(Numbers):
    """Rows that are padded within a batch."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {"x": nn.functional.pad(item["x"], (0, index % 3))}


def fit_replicas(
    module: type, data: type, batch: int, verify: str = "start"
) -> tuple[list[tuple[str, str]], list[str]]:
    """The rows of the verification, and the warnings that name the layout."""
    quiet()
    L.seed_everything(7, verbose=False)
    trainer, replicas = verified_trainer_for("dp2", strategy_options={"verify": verify}, max_steps=1)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.fit(module(), DataLoader(data(), batch_size=batch // replicas))
    strategy: Any = trainer.strategy
    return strategy.verification[1:], [str(w.message) for w in found if "`layout='dp2'`" in str(w.message)]


@pytest.mark.parametrize(
    ("module", "batch", "row", "message"),
    [
        (Normalized, 16, "differs by", "on the samples of all replicas it is off by"),
        (Variance, 2, "differs by", "on the samples of all replicas it is off by"),
        (Classifier, 2, "relative difference", None),
        (Gathered, 16, "relative difference", None),
        (GatheredValues, 16, "relative difference", "all_gather(..., sync_grads=True)"),
        (OwnCollective, 16, "not checked: ", "communicates by `torch.distributed` (allreduce)"),
    ],
)
def test_the_global_batch_shows_what_parts_of_a_batch_do_not(
    ranks2: RankGroup, module: type, batch: int, row: str, message: str | None
) -> None:
    rows, found = ranks2.call(fit_replicas, module, Numbers, batch)[0]
    assert rows[0][0] == "loss as a mean over samples"
    assert rows[0][1].startswith(row), rows
    assert len(found) == (message is not None), found
    if message is not None:
        assert message in found[0]
    if row == "relative difference":
        assert rows[1][1].startswith("largest relative difference" if message is None else "differ by"), rows


def test_a_loss_that_cannot_be_checked_is_said(ranks2: RankGroup) -> None:
    rows, found = ranks2.call(fit_replicas, OtherShapes, Lengths, 2)[0]
    assert (
        rows[0][1] == "not checked: a replica has one sample; the batches of the replicas have samples of other shapes"
    )
    assert "could not be checked: a replica has one sample" in found[0]
    ranks2.call(fit_replicas, OtherShapes, Lengths, 2, "strict")  # nothing differs


class Summed(Classifier):
    """Whose loss is a sum over samples: the mean over equal parts depends on their size, not on who is in them."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch["x"]), batch["y"], reduction="sum")


def test_parts_have_another_size_than_microbatches(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match=r"`microbatches=2`: `Summed.training_step` .* not the mean over the samples"):
        ranks2.call(fit, "pp2", "start", Summed, strategy={"microbatches": 2})


def count_steps(layout: str, module: type) -> list[tuple[str, list[int]]]:
    """The steps of one process that verification runs: the comparison, or checks of means; samples of parts."""
    ran: list[tuple[str, list[int]]] = []

    def noted(what: str, run: Any) -> Any:
        def step(runner: Any, weights: Any, parts: Any, *args: Any, **kwargs: Any) -> Any:
            ran.append((what, [count_samples(part[0]) for part in parts]))
            return run(runner, weights, parts, *args, **kwargs)

        return step

    with (
        patched(comparison, run_in_one_process=noted("comparison", comparison.run_in_one_process)),
        patched(whole_step, mean_in_one_process=noted("mean", whole_step.mean_in_one_process)),
    ):
        rows = fit(layout, "start", module)["rows"]
    assert [what for what, _ in rows[1:]] == ([] if layout in ("tp2", "pp2") else ["loss as a mean over samples"]), rows
    return ran


class Counting(Classifier):
    """A step that changes a number: one step of one process must leave the same."""

    counted = 0

    def training_step(self, batch, batch_idx):
        self.counted += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2"], "dp2"))
def test_one_step_of_parts_shows_that_the_loss_is_a_mean(ranks2: RankGroup, layout: str) -> None:
    assert ranks2.call(count_steps, layout, Classifier)[0] == [("comparison", [4, 4])]


@pytest.mark.parametrize("layout", quick(["tp2", "pp2"], "pp2"))
def test_ranks_of_a_replica_share_the_step_of_one_process(ranks2: RankGroup, layout: str) -> None:
    of_bounds = [("mean", [16]), ("mean", [2] * 8)] * 2 if layout == "pp2" else []  # larger values than the batch has
    assert ranks2.call(count_steps, layout, Classifier) == [[("comparison", [8]), *of_bounds]] * 2


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2"], "fsdp2"))
def test_what_parts_do_not_show_takes_a_step_of_the_whole_batch(ranks2: RankGroup, layout: str) -> None:
    assert ranks2.call(count_steps, layout, Counting)[0][-2:] == [("comparison", [8]), ("mean", [4, 4])]
