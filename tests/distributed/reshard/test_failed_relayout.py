"""Whatever raises in a change of layout, training continues in the old one, as if nothing had been asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_hybrid.reshard import exchange
from tests.distributed.jobs import Classifier, Numbers, quiet, trainer_for, weights
from tests.distributed.reshard.relayout_jobs import whole_state
from tests.harness import RankGroup
from tests.pairwise import quick
from tests.snapshot import Snapshot

STEPS, AT = 8, 3


class Grows(Classifier):
    """`extra` can be added while it trains; a group of its own, or an error, comes with it."""

    def __init__(self, fault: str = "") -> None:
        super().__init__(optimizer="adamw")
        self.fault = fault

    def configure_optimizers(self) -> Any:
        extra = getattr(self, "extra", None)
        optimizer: Any = torch.optim.AdamW(
            [p for n, p in self.named_parameters() if not n.startswith("extra")], lr=0.01, eps=1e-4
        )
        if extra is not None and self.fault == "other groups":
            optimizer.add_param_group({"params": list(extra.parameters())})
        if extra is not None and self.fault == "configure_optimizers" and self.global_rank == 1:
            raise ValueError("no room in configure_optimizers")
        return optimizer


class Attempt(L.Callback):
    """Asks for a layout, catches the error, and compares everything with what was there before."""

    def __init__(self, to: str, fault: str, again: bool) -> None:
        self._to, self._again, self._edit = to, again, EDITS.get(fault)
        self._fault = FAULTS.get(fault, contextlib.nullcontext) if fault else None
        self._options: dict[str, Any] = {"cuts": (1, 2, 3)} if fault == "cuts" else {}
        self.error = ""
        self.differences: list[str] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(trainer.callback_metrics["loss_step"]))
        if self._again and trainer.global_step == AT + 2:
            trainer.strategy.relayout(self._to)
        if self._fault is None or trainer.global_step != AT:
            return
        state, before = whole_state(trainer), self._seen(trainer)
        edit = None if self._edit is None else partial(self._edit, pl_module)
        raised = ""
        try:
            with self._fault():
                trainer.strategy.relayout(self._to, edit=edit, **self._options)
        except Exception as error:
            raised = f"{type(error).__name__}: {error}"
        after, seen = whole_state(trainer), self._seen(trainer)
        self.error, self.differences = raised, sorted(state.keys() ^ after.keys())
        self.differences += [k for k in state.keys() & after.keys() if not torch.equal(state[k], after[k])]
        texts, now = before.texts(before), seen.texts(seen)
        self.differences += [
            f"{p}: {texts.get(p)} -> {now.get(p)}"
            for p in {**texts, **now}
            if texts.get(p) != now.get(p) and "state_dict_" not in p  # hooks that `fully_shard` adds in the next step
        ]

    def _seen(self, trainer: Any) -> Snapshot:
        module, optimizers = trainer.lightning_module, list(trainer.optimizers)
        return Snapshot(
            {"module": module, "optimizers": optimizers, "precision": trainer.precision_plugin, "trainer": trainer}
        )


def train(layout: str, to: str, fault: str, folder: str, again: bool = False) -> dict[str, Any]:
    """A run in which a change of layout fails after some steps; without a `fault` none is asked for."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Grows(fault)
    attempt = Attempt(to, fault, again)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer, replicas = trainer_for(
        layout, callbacks=[attempt, saver], max_epochs=-1, max_steps=STEPS, enable_checkpointing=True
    )
    trainer.fit(module, DataLoader(Numbers(64), batch_size=8 // replicas, shuffle=True))
    strategy: Any = trainer.strategy
    return {
        "error": attempt.error,
        "differences": attempt.differences,
        "losses": attempt.losses,
        "layout": str(strategy.layout),
        "weights": weights(trainer, module),
        "files": sorted(p.name for p in Path(folder).iterdir()),
        "modules": [name for name, _ in module.named_children()],
    }


def raises_after_adding(module: Any) -> None:
    module.extra = nn.Linear(4, 4)
    raise ValueError("no room in edit")


def raises_on_one_rank(module: Any) -> None:
    module.extra = nn.Linear(4, 4)
    if module.global_rank == 1:
        raise ValueError("no room in edit")


def adds(module: Any) -> None:
    module.extra = nn.Linear(4, 4)


EDITS: dict[str, Callable[[Any], None]] = {
    "edit": raises_after_adding,
    "edit on one rank": raises_on_one_rank,
    "other groups": adds,
    "configure_optimizers": adds,
}


@contextlib.contextmanager
def fails_in_round(number: int) -> Iterator[None]:
    """Rank 1 has no memory for what it is to receive in that round of the exchange."""
    run, rounds = exchange._prepare_round, []

    def round_or_error(rank: int, *args: Any, **kwargs: Any) -> Callable[[], None]:
        rounds.append(rank)
        if rank == 1 and len(rounds) == number:
            raise MemoryError("no room in exchange")
        return run(rank, *args, **kwargs)

    with patch.object(exchange, "_prepare_round", round_or_error), patch.object(exchange, "ROUND_BYTES", 2048):
        yield
    assert len(rounds) >= number


FAULTS: dict[str, Callable[[], Any]] = {
    "first round": lambda: fails_in_round(1),
    "later round": lambda: fails_in_round(4),
}


TEXTS = {
    "cuts": "`cuts`",
    "edit": "no room in edit",
    "edit on one rank": "no room in edit",
    "first round": "no room in exchange",
    "later round": "no room in exchange",
    "other groups": "so the groups cannot be matched",
    "configure_optimizers": "no room in configure_optimizers",
}
PAIRS = [(layout, fault) for layout in ("dp2", "fsdp2") for fault in TEXTS if (layout, fault) != ("dp2", "later round")]
OFTEN = [
    *(("fsdp2", fault) for fault in ("cuts", "edit", "later round")),
    *(("dp2", fault) for fault in ("edit on one rank", "other groups")),
]
"""From dp2 every rank has all that it needs, in one round."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[RankGroup, str], list[dict[str, Any]]]:
    """Runs from a layout to pp2 without a fault, each made once."""

    @cache
    def run(ranks: RankGroup, layout: str) -> list[dict[str, Any]]:
        return ranks.call(train, layout, "pp2", "", str(tmp_path_factory.mktemp("plain")))

    return run


@pytest.mark.parametrize(("layout", "fault"), quick(PAIRS, *OFTEN))
def test_the_old_layout_is_in_force(
    ranks2: RankGroup, plain: Callable[..., list[dict[str, Any]]], tmp_path: Path, layout: str, fault: str
) -> None:
    to, text = "pp2", TEXTS[fault]
    expected = plain(ranks2, layout)
    found = ranks2.call(train, layout, to, fault, str(tmp_path / "failed"), timeout_seconds=20)
    for rank, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert text in one["error"], f"rank {rank}: all ranks raise"
        assert not one["differences"], f"rank {rank}: not as before: " + "\n".join(one["differences"])
        assert one["losses"] == other["losses"]
        assert one["layout"] == layout
        assert one["files"] == other["files"], "checkpoints are saved afterwards"
        assert "extra" not in one["modules"]
    for name, weight in expected[0]["weights"].items():
        assert torch.equal(found[0]["weights"][name], weight), name


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["edit", "first round"])
def test_a_later_change_succeeds(ranks2: RankGroup, tmp_path: Path, fault: str) -> None:
    expected = ranks2.call(train, "dp2", "pp2", "", str(tmp_path / "plain"), True)[0]
    found = ranks2.call(train, "dp2", "pp2", fault, str(tmp_path / "failed"), True, timeout_seconds=20)[0]
    assert found["layout"] == "pp2"
    assert found["losses"] == expected["losses"]
