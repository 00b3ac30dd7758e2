"""Verification compares the values that a step returns besides its loss, and logs, with those of one process."""

from __future__ import annotations

import re
import time
import warnings
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.nn import functional as F  # noqa: N812 -- its usual name
from torch.utils.data import DataLoader

from tests.distributed.jobs import Classifier, Numbers, quiet, verified_trainer_for
from tests.harness import RankError, RankGroup
from tests.pairwise import quick


class Means(Classifier):
    """Reports means, sums and extremes as such, rows, texts, a metric, and the time, which no two steps share."""

    def training_step(self, batch, batch_idx):
        out = self(batch["x"])
        loss, right = F.cross_entropy(out, batch["y"]), (out.argmax(-1) == batch["y"]).float()
        self.accuracy(right)
        self.log_dict({"loss": loss, "accuracy": self.accuracy, "right": right.mean()})
        self.log("count", right.sum(), reduce_fx="sum")
        self.log("largest", out.max(), reduce_fx="max")
        self.log("time", float(time.perf_counter_ns() % 1000))
        return {"loss": loss, "rows": out.detach(), "name": "step", "mean": right.mean(), "list": list(batch["y"])}


class Returned(Classifier):
    """Returns the number of right answers, and lets a hook add them up."""

    right = 0.0

    def training_step(self, batch, batch_idx):
        out = self(batch["x"])
        return {"loss": F.cross_entropy(out, batch["y"]), "samples": torch.tensor(len(out)), "nested": {"n": len(out)}}

    def on_train_batch_end(self, outputs: Any, batch, batch_idx):
        self.right += float(outputs["samples"]) + outputs["nested"]["n"]


class Result:
    """An object that no part of this package knows."""

    def __init__(self, out: torch.Tensor) -> None:
        self.out = out


class Object(Classifier):
    """Returns an object, as `return self.model(**batch)` does with the key-value cache of a language model."""

    def training_step(self, batch, batch_idx):
        out = self(batch["x"])
        return {"loss": F.cross_entropy(out, batch["y"]), "result": Result(out.detach())}

    def on_train_batch_end(self, outputs: Any, batch, batch_idx):
        self.right = float(len(outputs["result"].out))


class Logged(Classifier):
    """Logs the number of samples as if it were a mean over samples, once by each way."""

    def training_step(self, batch, batch_idx):
        out = self(batch["x"])
        loss = F.cross_entropy(out, batch["y"])
        self.log("n", float(len(out)))
        self.log_dict({"loss": loss, "again": float(len(out))})
        return loss


def fit(layout: str, module: type, verify: str = "start", **options: Any) -> dict[str, Any]:
    """Trains the module; rows of the verification, warnings about reported values, and what its hook has added up."""
    quiet()
    L.seed_everything(7, verbose=False)
    built = module()
    trainer, replicas = verified_trainer_for(layout, strategy_options={"verify": verify, **options})
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.fit(built, DataLoader(Numbers(), batch_size=16 // replicas))
    verifier: Any = getattr(trainer.strategy, "_verifier", None)
    return {
        "rows": verifier.rows,
        "warnings": [str(w.message) for w in found if "Log a `torchmetrics.Metric`" in str(w.message)],
        "right": getattr(built, "right", None),
    }


@pytest.mark.feature("what a step returns and logs, compared with one process")
@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "tp2", "pp2"], "dp2", "pp2"))
def test_values_that_are_right_give_no_warning(ranks2: RankGroup, layout: str) -> None:
    for found in ranks2.call(fit, layout, Means, verify="strict"):
        assert found["warnings"] == []
        assert not any(what == "microbatches" for what, _ in found["rows"])


def test_microbatches_are_avoided_where_the_step_returns_a_number_of_samples(ranks2: RankGroup) -> None:
    for found in ranks2.call(fit, "pp2", Returned):
        assert found["rows"][0][0] == "microbatches"
        assert "`training_step['samples']` differs by 0." in found["rows"][0][1]
        assert found["right"] % 32 == 0, "each batch has 16 samples"


def test_chosen_microbatches_are_refused_where_the_step_returns_a_number_of_samples(ranks2: RankGroup) -> None:
    message = r"`microbatches=2`: `Returned.training_step` .* returns values .* `microbatches=1` or 'auto'"
    with pytest.raises(RankError, match=message):
        ranks2.call(fit, "pp2", Returned, microbatches=2)


def test_microbatches_are_avoided_where_the_step_returns_an_object(ranks2: RankGroup) -> None:
    for found in ranks2.call(fit, "pp2", Object):
        assert found["rows"][0][0] == "microbatches"
        assert found["rows"][0][1].startswith("1: `training_step['result']` is a Result that differs between")
        assert found["right"] == 16
    with pytest.raises(RankError, match=r"NotJoinedError: `training_step\['result'\]` .* `microbatches=1`.*py:\d+"):
        ranks2.call(fit, "pp2", Object, microbatches=2, timeout_seconds=30.0)


def test_logs_that_are_computed_from_microbatches_are_a_warning(ranks2: RankGroup) -> None:
    (message,) = ranks2.call(fit, "pp2", Logged)[0]["warnings"]
    assert "`layout='pp2'`: `Logged.training_step` (" in message
    assert re.search(r"`n` is (\d), in one process 16; `again` is \1, in one process 16\.", message), message
    with pytest.raises(RankError, match=r"`verify='strict'`: `layout='pp2'`: `Logged.training_step` "):
        ranks2.call(fit, "pp2", Logged, verify="strict")


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2"], "fsdp2"))
def test_logs_that_are_no_means_over_samples_are_a_warning(ranks2: RankGroup, layout: str) -> None:
    (message,) = ranks2.call(fit, layout, Logged)[0]["warnings"]
    assert message.startswith("`Logged.training_step` (")
    assert "computed from equal parts of the first batch, `n` is 4, in one process 8;" in message
    assert "as under DistributedDataParallel" in message


def test_logs_of_tensor_layouts_are_those_of_one_process(ranks2: RankGroup) -> None:
    assert ranks2.call(fit, "tp2", Logged, verify="strict")[0]["warnings"] == []
