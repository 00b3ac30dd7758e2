"""A step that returns the number of its tokens as `weight` has the token mean of the global batch as its loss."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tests.distributed.jobs import Block, quiet, verified_trainer_for, weights
from tests.harness import RankError, RankGroup
from tests.pairwise import quick, slow

IGNORED = -100


class Sentences(Dataset):
    """Sequences of 6 vectors, with 1 to 6 of 6 targets; from sample `empty` on, none."""

    def __init__(self, count: int, empty: int = 1000) -> None:
        generator = torch.Generator().manual_seed(2)
        self.x = torch.randn(count, 6, 16, generator=generator)
        self.y = torch.randint(4, (count, 6), generator=generator)
        lengths = torch.randint(1, 7, (count, 1), generator=generator)
        lengths[empty:] = 0
        self.y[torch.arange(6) >= lengths] = IGNORED

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index]}


class Tagger(L.LightningModule):
    """Returns the mean over tokens, and their number."""

    divide = False
    """Whether the mean is a division, which has no gradient without tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(Block(16) for _ in range(4))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x = self.stem(batch["x"])
        for block in self.blocks:
            x = block(x)
        logits, y = self.head(x).flatten(0, 1), batch["y"].flatten()
        kept = y != IGNORED
        if not self.divide:
            return nn.functional.cross_entropy(logits, y, ignore_index=IGNORED), kept.sum()
        losses = nn.functional.cross_entropy(logits, y, ignore_index=IGNORED, reduction="none")
        return losses.sum() / kept.sum(), kept.sum()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        loss, count = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("tokens", count.float(), reduce_fx="sum", on_step=False, on_epoch=True)
        self.log("by tokens", loss.detach(), batch_size=int(count), on_step=False, on_epoch=True)
        return {"loss": loss, "weight": count, "rows": batch["y"]}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        loss, count = self.loss(batch)
        self.log("val", loss)
        return {"loss": loss, "weight": int(count)}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


class Divided(Tagger):
    divide = True


class Zero(Tagger):
    """Its loss is 0 without tokens."""

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss, count = super().loss(batch)
        return torch.where(count > 0, loss, 0.0), count


class Unweighted(Tagger):
    """Returns no weight."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)["loss"]


class Outputs(L.Callback):
    """Keeps the weights that `on_train_batch_end` gets, and the gradients that `on_after_backward` sees."""

    def __init__(self) -> None:
        self.weights: list[float] = []
        self.bias: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.weights.append(float(outputs["weight"]))


def fit(
    layout: str | None,
    kind: type[Tagger] = Tagger,
    *,
    batch: int = 16,
    samples: int = 48,
    empty: int = 1000,
    accumulate: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Trains with global batches of `batch` samples, each in `accumulate` parts unless in one process."""
    quiet()
    L.seed_everything(7, verbose=False)
    module, outputs = kind(), Outputs()
    if layout is not None:
        options["accumulate_grad_batches"] = accumulate
    else:
        options.pop("strategy_options", None)
        accumulate = 1
    if options.pop("scaler", False):
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**14))]
    callbacks = [outputs] if kind is not Unweighted else []
    trainer, replicas = verified_trainer_for(layout, callbacks=callbacks, max_epochs=2, **options)
    size = batch // accumulate // replicas
    data = DataLoader(Sentences(samples, empty), batch_size=size)
    trainer.fit(module, data, DataLoader(Sentences(samples), batch_size=size))
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    return {"weights": weights(trainer, module), "metrics": metrics, "outputs": outputs.weights}


def compare(expected: dict[str, Any], found: list[dict[str, Any]], rel: float = 1e-5) -> None:
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found[0]["weights"][name], value, rtol=rel, atol=rel / 10, msg=name)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate": 2},
    "uneven last batch": {"samples": 45},
    "uneven last batch, accumulated": {"samples": 41, "accumulate": 2},
    "clipped": {"gradient_clip_val": 0.05},
    "batches without tokens": {"samples": 40, "empty": 35},
}


def parameters() -> list[Any]:
    layouts = ["dp2", "fsdp2", "tp2", "pp2"]
    kept = [("plain", "dp2"), ("plain", "tp2"), ("accumulated", "fsdp2"), ("uneven last batch", "pp2")]
    return quick([(case, layout) for case in CASES for layout in layouts], *kept)


@pytest.mark.feature(by="case", prefix="weight of the loss: ")
@pytest.mark.parametrize(("case", "layout"), parameters())
def test_token_means_are_those_of_the_global_batch(ranks2: RankGroup, case: str, layout: str) -> None:
    expected, found = fit(None, **CASES[case]), ranks2.call(fit, layout, **CASES[case])
    compare(expected, found)
    if case == "plain":
        for result in found:
            assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
        replicas = 2 if layout in ("dp2", "fsdp2") else 1
        per_step = [sum(ws) for ws in zip(*(r["outputs"] for r in found), strict=True)]
        assert per_step == [w * 2 / replicas for w in expected["outputs"]]


@pytest.mark.parametrize("layout", quick(["dp2", "pp2"], "dp2"))
def test_without_weights_the_mean_is_another(ranks2: RankGroup, layout: str) -> None:
    # with verification microbatches are avoided, and replicas warn
    expected, found = fit(None, Unweighted), ranks2.call(fit, layout, Unweighted, strategy_options={"verify": "off"})
    with pytest.raises(AssertionError):
        compare(expected, found)


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [2, 4, 8])
@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
def test_microbatches_are_weighted(ranks2: RankGroup, microbatches: int, schedule: str) -> None:
    options = {"microbatches": microbatches, "schedule": schedule}
    compare(fit(None), ranks2.call(fit, "pp2", strategy_options=options))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2-pp2", "tp2-pp2", "fsdp2-pp2", "dp2-tp2", "dp4"])
@pytest.mark.parametrize("case", CASES)
def test_products_of_axes(ranks4: RankGroup, layout: str, case: str) -> None:
    compare(fit(None, **CASES[case]), ranks4.call(fit, layout, **CASES[case]))


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "pp2"], "dp2"))
def test_a_division_by_no_token_does_not_spread(ranks2: RankGroup, layout: str) -> None:
    case = {"samples": 40, "empty": 35}  # the last batch has 3 samples with tokens, in one replica or microbatch
    compare(fit(None, Divided, **case), ranks2.call(fit, layout, Divided, **case))


@pytest.mark.parametrize("layout", [slow("dp2"), slow("fsdp2"), slow("pp2")])
def test_a_global_batch_without_tokens(ranks2: RankGroup, layout: str) -> None:
    expected, found = fit(None, Zero, empty=32), ranks2.call(fit, layout, Zero, empty=32)
    compare(expected, found)
    assert found[0]["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "pp2"], "pp2"))
def test_with_a_loss_scaler(ranks2: RankGroup, layout: str) -> None:
    options = {"accumulate": 2, "scaler": True, "gradient_clip_val": 0.1}
    compare(fit(None, **options), ranks2.call(fit, layout, **options), rel=5e-3)


class Manual(Tagger):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        loss, count = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return {"loss": loss, "weight": count}


class Sometimes(Tagger):
    """Returns a weight with the first batch only."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        out = super().training_step(batch, batch_idx)
        return out if batch_idx == 0 else out["loss"]


class OnOneReplica(Tagger):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        out = super().training_step(batch, batch_idx)
        return out if self.global_rank == 0 else out["loss"]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Manual, {}, "optimizes manually"),
        (Tagger, {"strategy_options": {"gradient_sync": "diloco"}}, "gradient_sync='diloco'"),
        (Sometimes, {}, "of others none"),
        (OnOneReplica, {}, "of others none"),
    ],
)
def test_what_cannot_be_weighted_is_refused(ranks2: RankGroup, kind: Any, options: Any, message: str) -> None:
    with pytest.raises(RankError, match=message) as error:
        ranks2.call(fit, "dp2", kind, **options)
    assert error.value.kind == "PartitionError"
    assert f"{__file__}:" in str(error.value)
