"""User code around models equals one process, or is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.distributed.ghosts import modules
from tests.distributed.jobs import quiet, verified_trainer_for, weights
from tests.harness import RankError, RankGroup
from tests.pairwise import quick


class Rows(Dataset):
    """Rows with targets, labels and lengths; batches differ in the number of rows with a positive first value."""

    def __init__(self, count: int = 24) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x, self.y = (
            torch.randn(count, modules.WIDTH, generator=generator),
            torch.randn(count, 4, generator=generator),
        )

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "y": self.y[index], "label": index * 7 % 4, "length": 1 + index % 3}


def fit(layout: str | None, kind: str, batch: int = 8, samples: int | None = None, **options: Any) -> dict[str, Any]:
    """Trains two epochs of three batches, or of `samples`; returns weights and logged values."""
    return fit_class(layout, getattr(modules, kind), batch, samples, **options)


def fit_class(
    layout: str | None, kind: type[L.LightningModule], batch: int = 8, samples: int | None = None, **options: Any
) -> dict[str, Any]:
    """Trains a module of the class `kind`, as `fit` does."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = kind()
    trainer, replicas = verified_trainer_for(layout, max_epochs=2, **options)
    trainer.fit(module, DataLoader(Rows(samples or 3 * batch), batch_size=batch // replicas))
    return {"weights": weights(trainer, module), "logs": {k: float(v) for k, v in trainer.callback_metrics.items()}}


def check(ranks: RankGroup, layout: str, kind: str, **options: Any) -> None:
    """Compares every rank's result with that of one process."""
    compare(ranks, layout, getattr(modules, kind), **options)


def compare(ranks: RankGroup, layout: str, kind: type[L.LightningModule], **options: Any) -> None:
    """Compares every rank's result for a module of the class `kind` with that of one process."""
    expected = fit_class(None, kind, **options)
    found = ranks.call(fit_class, layout, kind, **options)
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found[0]["weights"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    for result in found:
        assert result["logs"] == pytest.approx(expected["logs"], rel=1e-4)


SELECTED = "user code: masks and lengths of the batch select elements"
FILLED = "user code: tensors filled with results of blocks"
LOOKED_AT = "user code: values that are checked, printed and logged"
MEASURED = "user code: functions of torchmetrics, distributions with argument checks"
PREPARED = "user code: what hooks and the trainer prepare before the first batch"
WEIGHTS = "user code: weights of other modules, `torch.func`"
RETAINED = "user code: a metric with `dist_sync_on_step=True`"
SEPARATE = "gradients that share memory (batches of one sample)"
KINDS = {
    "Masked": SELECTED,
    "Selected": SELECTED,
    "Assigned": SELECTED,
    "Packed": SELECTED,
    "Filled": FILLED,
    "Checked": LOOKED_AT,
    "CheckedInside": LOOKED_AT,
    "Distributed": MEASURED,
    "Measured": MEASURED,
    "Retained": RETAINED,
    "Prepared": PREPARED,
    "Token": SEPARATE,
    "TwoParents": WEIGHTS,
    "SharedParts": WEIGHTS,
    "Vmapped": WEIGHTS,
    "Functional": WEIGHTS,
}
QUICK = {("Masked", "tp2"), ("Prepared", "tp2"), ("Checked", "pp2"), ("TwoParents", "tp2"), ("SharedParts", "pp2")}


def cases(layouts: tuple[str, ...], kinds: Iterable[str]) -> list[Any]:
    """Returns parameters `kind` and `layout`, marked by feature."""
    found = []
    for kind, layout in itertools.product(kinds, layouts):
        marks = [pytest.mark.feature(KINDS[kind])]
        found.append(pytest.param(kind, layout, marks=marks if (kind, layout) in QUICK else [*marks, pytest.mark.slow]))
    return found


@pytest.mark.parametrize(("kind", "layout"), cases(("tp2", "pp2"), KINDS))
def test_equals_one_process(ranks2: RankGroup, layout: str, kind: str) -> None:
    check(ranks2, layout, kind)


@pytest.mark.parametrize(("kind", "layout"), cases(("tp2-pp2",), ["Masked", "Checked", "Token", "TwoParents"]))
def test_equals_one_process_on_four_ranks(ranks4: RankGroup, layout: str, kind: str) -> None:
    check(ranks4, layout, kind)


@pytest.mark.slow
def test_a_value_that_decides_is_on_one_stage(ranks2: RankGroup) -> None:
    check(ranks2, "pp2", "Scaled", strategy_options={"microbatches": 1})


@pytest.mark.feature(SEPARATE)
@pytest.mark.parametrize("layout", quick(["tp2", "pp2", "dp2", "fsdp2"], "pp2"))
def test_accumulated_gradients_of_one_sample_do_not_share_memory(ranks2: RankGroup, layout: str) -> None:
    expected = fit(None, "Token", batch=4)
    replicas = 2 if layout in ("dp2", "fsdp2") else 1
    options: dict[str, Any] = {"batch": replicas, "accumulate_grad_batches": 4 // replicas, "samples": 12}
    if layout == "pp2":
        options = {"batch": 4, "strategy_options": {"microbatches": 4}}
    found = ranks2.call(fit, layout, "Token", **options)
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found[0]["weights"][name], value, rtol=1e-4, atol=1e-5, msg=name)


LINE = r"modules.py:\d+ \((loss_of|forward)\)"
BROKEN = rf"`training_step` cannot be planned.* fails at .*{LINE} with KeyError: 'missing'.*`dp`"
ERRORS, DECIDES = (
    "user code: errors in the step, with the line",
    "user code: values that decide what later stages compute",
)
LAZY, LOSS = "user code: lazy modules", "user code: a metric with `dist_sync_on_step=True` as the loss"
UNSHAPED = r"`head` \(LazyLinear\) of Lazy has weights without a shape"
LOST = r"modules.py:\d+ \(loss_of\) computes a value with a gradient from the metric"


@pytest.mark.parametrize(
    ("kind", "layout", "message"),
    [
        *(
            pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.feature(feature, refused=True)])
            for case, feature in (
                (("Broken", "tp2", BROKEN), ERRORS),
                (("Broken", "pp2", BROKEN), ERRORS),
                (("ScaledAlways", "pp2", rf"{LINE} reads the value of a tensor before this point"), DECIDES),
                (("Unpadded", "pp2", "the shape of a tensor depends on values of the batch"), DECIDES),
            )
        ),
        pytest.param("Lazy", "tp2", UNSHAPED, marks=pytest.mark.feature(LAZY, refused=True)),
        pytest.param("Lazy", "dp2", UNSHAPED, marks=[pytest.mark.slow, pytest.mark.feature(LAZY, refused=True)]),
        pytest.param("MetricLoss", "dp2", LOST, marks=[pytest.mark.slow, pytest.mark.feature(LOSS, refused=True)]),
    ],
)
def test_is_refused_with_the_users_line(ranks2: RankGroup, kind: str, layout: str, message: str) -> None:
    with pytest.raises(RankError, match=f"(?s)PartitionError.*{message}"):
        ranks2.call(fit, layout, kind)


def test_modules_that_values_choose_need_the_whole_batch(ranks2: RankGroup) -> None:
    check(ranks2, "pp2", "Chosen")
    with pytest.raises(RankError, match=r"(?s)PartitionError.*`microbatches=4`.*call 8 is `heads.[01]` in one part"):
        ranks2.call(fit, "pp2", "Chosen", strategy_options={"microbatches": 4})
