"""What a training step costs beside its arithmetic: reads of the device by the host, and small collectives."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_hybrid.callbacks import HybridMonitor
from tests.distributed.contract.jobs import make_trainer, start
from tests.distributed.contract.layouts import TWO, assert_equal
from tests.harness import RankGroup
from tests.pairwise import in_turn, quick

WIDTH, BATCH = 64, 64
SMALL = 1536
"""Collectives of more elements carry gradients, weights or activations."""
WARM_UP = 5
"""Steps in which ranks still agree on what they log; before the fifth one, replicas compare their state."""
STEPS = 3
"""Steps that are counted, before replicas compare their state again."""


class Costs(TorchDispatchMode):
    """Counts small collectives, and reads of tensors by the host; on the CPU every tensor counts as the device's."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._reading = False
        self._originals: dict[str, Any] = {}

    def __enter__(self) -> Any:
        for name in ("tolist", "numpy", "cpu"):  # on the CPU they do not pass through the dispatcher
            self._originals[name] = getattr(torch.Tensor, name)
            setattr(torch.Tensor, name, self._counted(self._originals[name]))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, original in self._originals.items():
            setattr(torch.Tensor, name, original)

    def _counted(self, original: Any) -> Any:
        def read(*args: Any, **kwargs: Any) -> Any:
            self.counts["reads"] += not self._reading  # a function mode calls the method once more
            self._reading = True
            try:
                return original(*args, **kwargs)
            finally:
                self._reading = False

        return read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero"):
            self.counts["reads"] += 1
        elif "c10d" in name.partition("::")[0] and not any(x in name for x in ("send", "recv", "wait")):
            tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.counts["collectives"] += max((t.numel() for t in tensors), default=0) <= SMALL
        return func(*args, **(kwargs or {}))


class Module(L.LightningModule):
    """Logs as many values as it is asked to.

    Args:
        values: Values logged in every step.
        options: Arguments of `self.log`.
        extras: Whether a step returns more than the loss.
        changing: Whether another value is logged in every second step.
    """

    def __init__(
        self, values: int = 0, options: dict[str, Any] | None = None, extras: bool = False, changing: bool = False
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))
        self._values, self._options, self._extras, self._changing = values, options or {}, extras, changing

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        x = batch
        for block in self.blocks:
            x = block(x)
        loss = (x - batch).square().mean()
        value = x.max() if self._options.get("reduce_fx") == "max" else loss  # as one process has them
        for i in range(self._values + (self._changing and batch_idx % 2)):
            self.log(f"value {i}", value * i, **self._options)
        more = {"output": x.detach(), "index": batch_idx, "half": batch_idx / 2, "note": "same"}
        return {"loss": loss, **more} if self._extras else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class InHook(Module):
    """Logs some values together in a hook after each step."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log_dict({f"in hook {i}": outputs["loss"].detach() * i for i in range(5)})


def loader(batches: int, replicas: int) -> DataLoader:
    data: Any = torch.randn(batches * BATCH, WIDTH)
    return DataLoader(data, batch_size=BATCH // replicas)


class Counting(L.Callback):
    """Counts the steps between the warm-up and the last one."""

    def __init__(self) -> None:
        self.costs = Costs()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM_UP:
            self.costs.__enter__()
        if batch_idx == WARM_UP + STEPS:
            self.costs.__exit__(None, None, None)


def costs(
    layout: str | None,
    module: dict[str, Any],
    trainer_options: dict[str, Any],
    kind: type[Module] = Module,
    monitored: bool = False,
) -> dict[str, float]:
    """Reads and small collectives of a step that no logger sees, on average."""
    start()
    counting = Counting()
    options = {"max_steps": WARM_UP + STEPS + 1, "log_every_n_steps": 1000, **trainer_options}
    callbacks = [HybridMonitor(), counting] if monitored else [counting]
    trainer, replicas = make_trainer(layout, callbacks=callbacks, **options)
    trainer.fit(kind(**module), loader(16, replicas))
    return {kind: counting.costs.counts[kind] / STEPS for kind in ("reads", "collectives")}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no logs": ({}, {}),
    "two values": ({"values": 2}, {}),
    "five values, on epochs too": ({"values": 5, "options": {"on_step": True, "on_epoch": True}}, {}),
    "in the progress bar": ({"values": 2, "options": {"prog_bar": True}}, {}),
    "the largest": ({"values": 2, "options": {"reduce_fx": "max"}}, {}),
    "rank zero only": ({"values": 2, "options": {"rank_zero_only": True}}, {}),
    "changing keys": ({"values": 2, "changing": True}, {}),
    "a dictionary": ({"values": 2, "extras": True}, {}),
    "clipped gradients": ({"values": 2}, {"gradient_clip_val": 0.1}),
    "accumulated batches": ({"values": 2}, {"max_steps": WARM_UP + STEPS, "accumulate_grad_batches": 2}),
}


@pytest.mark.parametrize(("layout", "case"), quick(itertools.product(TWO, CASES), *in_turn(TWO, CASES)))
def test_a_step_has_one_read_and_one_small_collective(ranks2: RankGroup, layout: str, case: str) -> None:
    of_one_process = costs(None, *CASES[case])  # Lightning reads what is in the progress bar
    limit = 2 if layout == "pp2" else 1
    for found in ranks2.call(costs, layout, *CASES[case]):
        assert found["reads"] <= of_one_process["reads"] + limit
        assert 1 <= found["collectives"] <= limit  # none would mean that the test counts nothing


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2"], "fsdp2"))
def test_values_logged_together_in_a_hook_cost_one_read_and_one_collective(ranks2: RankGroup, layout: str) -> None:
    of_one_process = costs(None, {}, {}, InHook)
    for found in ranks2.call(costs, layout, {}, {}, InHook):
        assert found["reads"] <= of_one_process["reads"] + 2
        assert found["collectives"] <= 2


@pytest.mark.parametrize("layout", quick([*TWO], "dp2", "pp2"))
def test_the_monitor_costs_nothing_in_steps_that_are_not_logged(ranks2: RankGroup, layout: str) -> None:
    expected = ranks2.call(costs, layout, *CASES["two values"])
    assert ranks2.call(costs, layout, *CASES["two values"], monitored=True) == expected
    logged = ranks2.call(costs, layout, CASES["two values"][0], {"log_every_n_steps": 1}, monitored=True)
    assert logged[0]["reads"] == expected[0]["reads"] + 1


class ReadingAtEnd(L.Callback):
    """Reads what is logged at the end of every batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def _read(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self.seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    on_train_batch_end = _read


class Reading(ReadingAtEnd):
    """Reads after the check of the gradients, too."""

    on_before_optimizer_step = ReadingAtEnd._read


class ReadingEarly(Reading):
    """Reads wherever user code runs after a step."""

    on_before_zero_grad = on_before_backward = on_after_backward = ReadingAtEnd._read


class SkipsUpdates(Module):
    """Has a step without an update by calling the closure itself."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        if batch_idx % 2:
            closure()
        else:
            optimizer.step(closure=closure)


class Manual(Module):
    """Optimizes by itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


READERS: dict[str, tuple[type[Module], type[ReadingAtEnd], dict[str, Any]]] = {
    "before the optimizer's step": (Module, Reading, {}),
    "before the check": (Module, ReadingEarly, {}),
    "accumulated batches": (Module, ReadingEarly, {"accumulate_grad_batches": 2}),
    "steps without an update": (SkipsUpdates, Reading, {}),
    "manual optimization": (Manual, ReadingAtEnd, {}),
}


def readings(layout: str | None, case: str) -> list[dict[str, float]]:
    """What is read of the logs of a run in which keys change."""
    start()
    module, callback, options = READERS[case]
    reading = callback()
    trainer, replicas = make_trainer(layout, callbacks=[reading], max_epochs=1, **options)
    trainer.fit(module(values=2, changing=True), loader(5, replicas))
    return reading.seen


@pytest.mark.parametrize(
    ("case", "layout"),
    quick(
        [(case, layout) for case in READERS for layout in TWO if case != "manual optimization" or layout != "pp2"],
        *in_turn(READERS, TWO),
    ),
)
def test_hooks_read_the_logs_of_their_step(ranks2: RankGroup, layout: str, case: str) -> None:
    expected = readings(None, case)
    for found in ranks2.call(readings, layout, case):
        assert_equal(found, expected)


def extras(layout: str | None) -> tuple[int, list[Any]]:
    """What `on_train_batch_end` is given beside the loss, and how often it was sent as an object."""
    start()
    outputs: list[Any] = []
    keep = LambdaCallback(on_train_batch_end=lambda _, __, out, *___: outputs.append(out))
    trainer, replicas = make_trainer(layout, max_epochs=1, callbacks=[keep])
    trainer.fit(Module(extras=True), loader(4, replicas))
    sent = 0 if layout is None else trainer.strategy.engine.runner.stage_outputs.objects_sent  # type: ignore[attr-defined]
    return sent, [{k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in out.items()} for out in outputs]


def test_extras_are_sent_as_objects_once(ranks2: RankGroup) -> None:
    _, expected = extras(None)
    for sent, found in ranks2.call(extras, "pp2"):
        assert sent == 1
        assert_equal(found, expected)
