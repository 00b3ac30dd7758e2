"""Batches that change: a smaller last batch, sequences of other lengths, accumulation over batches."""

from __future__ import annotations

import itertools
import logging
from functools import partial
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.harness import RankGroup
from tests.pairwise import quick
from tests.zoo.case import VOCABULARY, Samples, token_ids
from tests.zoo.cases import CASES
from tests.zoo.reference import SEED, Recorder, Run, compare, full_state

LAYOUTS = ["tp2", "pp2"]
"""Layouts with one replica: both processes and the single one read the same batches in the same order."""


class Batches(Dataset):
    """Whole batches of token ids, of changing size or length."""

    def __init__(self, shapes: tuple[tuple[int, int], ...]) -> None:
        generator = torch.Generator().manual_seed(3)
        self.batches = [torch.randint(5, VOCABULARY, shape, generator=generator) for shape in shapes]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.batches[index]


def _train(shapes: tuple[tuple[int, int], ...], strategy: Any, devices: int, **trainer_options: Any) -> Run:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(SEED, verbose=False)
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **trainer_options,
    )
    trainer.fit(CASES["tied"].build(), DataLoader(Batches(shapes), batch_size=None))
    recorder.run.final = full_state(trainer)
    return recorder.run


def _train_hybrid(layout: str, shapes: tuple[tuple[int, int], ...], **trainer_options: Any) -> Run:
    from lightning_hybrid import HybridStrategy

    return _train(shapes, HybridStrategy(layout=layout), 2, **trainer_options)


SHAPES = {
    "smaller last batch": ((16, 16), (16, 16), (6, 16)),
    "one sample, prime number of samples": ((16, 16), (1, 16), (7, 16)),
    "length changes": ((8, 16), (8, 12), (8, 9), (8, 16)),
}


@pytest.mark.parametrize(
    ("shapes", "layout"),
    quick(itertools.product(SHAPES, LAYOUTS), *((shapes, "pp2") for shapes in SHAPES), ("length changes", "tp2")),
)
def test_changing_shapes(layout: str, shapes: str, ranks2: RankGroup) -> None:
    sizes = SHAPES[shapes]
    comparison = compare(_train(sizes, "auto", 1), ranks2.call(_train_hybrid, layout, sizes))
    assert not comparison.problems


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping by norm": {"gradient_clip_val": 0.05},
    "both": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    "clipping by value": {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
}


@pytest.mark.parametrize(
    ("layout", "case"),
    quick(itertools.product(LAYOUTS, OPTIONS), ("tp2", "clipping by value"), ("pp2", "both")),
)
def test_accumulation_and_clipping(layout: str, case: str, ranks2: RankGroup) -> None:
    shapes, options = ((8, 16),) * 4, OPTIONS[case]
    comparison = compare(_train(shapes, "auto", 1, **options), ranks2.call(_train_hybrid, layout, shapes, **options))
    assert not comparison.problems


def _fit_validate_test_predict(layout: str | None) -> list[Any]:
    """Validate, fit, validate, fit again, predict; a new Trainer for each with the same module."""
    from lightning_hybrid import HybridStrategy

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(SEED, verbose=False)
    module = CASES["tied"].build()
    make = partial(
        L.Trainer,
        accelerator="cpu",
        devices=1 if layout is None else 2,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    seen: list[Any] = []
    for action in ("validate", "fit", "validate", "fit", "predict"):
        trainer = make(strategy="auto" if layout is None else HybridStrategy(layout=layout))
        data = DataLoader(Samples(token_ids, 16), batch_size=8)
        result = getattr(trainer, action)(module, data, **({"verbose": False} if action == "validate" else {}))
        seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        if action == "predict":
            seen.append([float(logits.double().abs().sum()) for logits in result])
    return seen


@pytest.mark.parametrize("layout", quick(["fsdp2", *LAYOUTS], "pp2"))
def test_trainers_one_after_another(layout: str, ranks2: RankGroup) -> None:
    expected = _fit_validate_test_predict(None)
    for seen in ranks2.call(_fit_validate_test_predict, layout):
        for values, wanted in zip(seen, expected, strict=True):
            assert values == pytest.approx(wanted, rel=1e-4)
