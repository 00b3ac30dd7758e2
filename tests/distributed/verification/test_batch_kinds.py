"""A batch with kinds of values that no verified batch had is verified after its step."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hybrid.engine.batch_kinds import BatchKinds
from tests.distributed.jobs import quiet, verified_trainer_for
from tests.harness import RankError, RankGroup
from tests.pairwise import slow

BATCHES, SAMPLES, TOKENS = 5, 8, 6


class Tokens(L.LightningModule):
    """A mean over tokens that are not ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(8, 9)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = self.embedding(batch[0])
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Weighted(Tokens):
    """The same with the number of tokens as the weight."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "weight": (batch[1] != -100).sum()}


class Hardest(Tokens):
    """The tokens with the largest losses, from the second epoch on."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = self.embedding(batch[0])
        for block in self.blocks:
            x = block(x)
        losses = F.cross_entropy(self.head(x).flatten(0, 1), batch[1].flatten(), reduction="none")
        return losses.topk(4).values.mean() if self.current_epoch else losses.mean()


def fit_hardest(layout: str, epochs: int) -> list[str]:
    """Trains on the hardest tokens from the second epoch on; the texts of warnings."""
    quiet()
    L.seed_everything(7, verbose=False)
    trainer, replicas = verified_trainer_for(layout, max_epochs=epochs)
    tokens = torch.randint(0, 9, (BATCHES * SAMPLES, TOKENS), generator=torch.Generator().manual_seed(3))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        data = DataLoader(TensorDataset(tokens, tokens.roll(-1, 1)), batch_size=SAMPLES // replicas)
        trainer.fit(Hardest(), data)
    return [text for w in seen if "mean over the samples" in (text := str(w.message))]


def fit(layout: str, ignored: str, weighted: bool = False, **options: Any) -> list[str]:
    """Trains on labels of which some are ignored from the third batch on; the texts of all warnings."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Weighted() if weighted else Tokens()
    trainer, replicas = verified_trainer_for(layout, strategy_options=options, max_epochs=1)
    tokens = torch.randint(0, 9, (BATCHES * SAMPLES, TOKENS), generator=torch.Generator().manual_seed(3))
    labels = tokens.roll(-1, 1)
    late = labels[2 * SAMPLES :]
    if ignored == "unequal":
        late[torch.arange(len(late))[:, None] % SAMPLES * TOKENS // SAMPLES > torch.arange(TOKENS)] = -100
    elif ignored == "equal":
        late[:, -1] = -100
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(TensorDataset(tokens, labels), batch_size=SAMPLES // replicas))
    return [text for w in seen if "mean over the samples" in (text := str(w.message))]


@pytest.mark.feature("ignored labels that come later")
@pytest.mark.parametrize(
    ("layout", "text"),
    [("dp2", "is off by"), slow("fsdp2", "is off by"), ("pp2", "From here on 1 is used")],
)
def test_ignored_labels_that_come_later_warn(ranks2: RankGroup, layout: str, text: str) -> None:
    (message,) = ranks2.call(fit, layout, "unequal")[0]
    assert text in message
    assert ranks2.call(fit, layout, "unequal", weighted=True)[0] == []


@pytest.mark.feature("a loss that is computed in another way from an epoch on")
@pytest.mark.parametrize("layout", ["dp2", slow("fsdp2")])
def test_another_loss_that_comes_later_warns(ranks2: RankGroup, layout: str) -> None:
    assert ranks2.call(fit_hardest, layout, 1)[0] == []
    (message,) = ranks2.call(fit_hardest, layout, 2)[0]
    assert "`Hardest.training_step`" in message


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "pp2"])
@pytest.mark.parametrize("ignored", ["equal", "none"])
def test_equal_numbers_of_tokens_do_not_warn(ranks2: RankGroup, layout: str, ignored: str) -> None:
    assert ranks2.call(fit, layout, ignored)[0] == []


@pytest.mark.slow
def test_a_given_number_of_microbatches_is_refused_then(ranks2: RankGroup) -> None:
    with pytest.raises(RankError, match="`microbatches=2`.*computes a loss that is not the mean over the samples"):
        ranks2.call(fit, "pp2", "unequal", microbatches=2)


def test_kinds() -> None:
    kinds = BatchKinds(torch.device("cpu"), list)
    labels, mask = torch.ones(4, 3, dtype=torch.int64), torch.ones(4, 3, dtype=torch.bool)
    value = torch.ones(4, 2)

    def step() -> bool:
        kinds.note(({"labels": labels, "mask": mask, "value": [value]}, 0), {})
        kinds.hear(kinds.numbers().tolist())
        due, kinds.due = kinds.due, None
        return due is not None

    assert not step(), "the first batch is verified"
    assert not step()
    for change in (lambda: labels[:, 1].fill_(-100), lambda: labels[0, 2].fill_(-100), lambda: mask[1, 1].fill_(False)):
        change()
        assert step()
        assert not step()
    value[0, 0] = float("nan")
    assert step()
    value[0, 0] = 0.0
    assert step()
    assert kinds.numbers().sum() == 0, "no step is noted"
