"""After a run the module is as the user wrote it, with whole weights, or says how to get them; training continues."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hybrid import CheckpointError, PartitionError
from lightning_hybrid.parallelize import whole
from tests.distributed.jobs import Block, Classifier, Numbers, quiet, trainer_for, weights
from tests.harness import RankGroup
from tests.pairwise import quick

LAYOUTS = ["dp2", "fsdp2", "tp2", "pp2"]
SMALL = patch.object(whole, "SHARE_OF_FREE_MEMORY", 0.0)
"""Too little memory to show weights whole."""


class Mixed(Classifier):
    """With tied weights, a recurrent module, attention, a frozen part and running statistics."""

    def _build(self) -> None:
        super()._build()
        self.norm = nn.BatchNorm1d(16)
        self.recurrent = nn.LSTM(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.first, self.last = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.last.weight = self.first.weight
        self.frozen = Block(16).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.norm(x))
        y = self.recurrent(x[:, None])[0]
        x = x + self.attention(y, y, y, need_weights=False)[0][:, 0]
        return super().forward(self.frozen(self.last(x)))


def train(layout: str | None, kind: type[Classifier] = Classifier, **options: Any) -> tuple[L.Trainer, Any, DataLoader]:
    quiet()
    L.seed_everything(7, verbose=False)
    module = kind(optimizer="adamw")
    trainer, replicas = trainer_for(layout, **options)
    data = DataLoader(Numbers(), batch_size=16 // replicas)
    trainer.fit(module, data)
    return trainer, module, data


def facts(module: Any) -> dict[str, Any]:
    """What the user sees of a trained module on this rank."""
    module.eval()
    x = torch.linspace(-1, 1, 32).view(2, 16)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    copied, trainer, module.trainer = copy.deepcopy(module), module._trainer, None
    pickled = pickle.loads(pickle.dumps(module))
    module.trainer = trainer
    with torch.no_grad():
        outputs = [m(x) for m in (module, copied, pickled)]
    return {
        "classes": [type(m).__name__ for m in module.modules()],
        "class of copy": type(copied).__name__,
        "state": torch.load(file),
        "trained": [p.requires_grad for p in module.parameters()],
        "norm": torch.stack([p.detach().norm() for p in module.parameters()]),
        "outputs": torch.stack(outputs),
        "submodule": {k: v.clone() for k, v in module.blocks[3].state_dict().items()},
        "kind": {type(p).__name__ for p in module.parameters()},
    }


def after_fit(layout: str | None, kind: type[Classifier]) -> dict[str, Any]:
    """Facts of a trained module, after changing a weight by hand, and after more training."""
    trainer, module, data = train(layout, kind)
    found: dict[str, Any] = {"fit": facts(module)}
    module.train()
    with torch.no_grad():
        module.head.bias += 1.0
    module.stem.weight.requires_grad_(False)
    trainer.validate(module, data, verbose=False)
    found["val"] = float(trainer.callback_metrics["val"])
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data)
    found["fit again"] = facts(module)
    return found


def check(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            check(found[key], value, f"{where}[{key}]")
    elif isinstance(expected, Tensor | float):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=where)
    else:
        assert found == expected, where


@pytest.mark.feature("the module after a run: called, copied, saved, changed, trained again")
@pytest.mark.parametrize("layout", quick(LAYOUTS, "fsdp2", "pp2"))
def test_the_module_is_whole_after_a_run(ranks2: RankGroup, layout: str) -> None:
    kind = Classifier if layout == "tp2" else Mixed
    expected = after_fit(None, kind)
    for found in ranks2.call(after_fit, layout, kind):
        check(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2-pp2", "tp2-pp2", "fsdp2-tp2", "fsdp2-pp2"])
def test_the_module_is_whole_after_a_run_of_a_product(ranks4: RankGroup, layout: str) -> None:
    expected = after_fit(None, Classifier)
    for found in ranks4.call(after_fit, layout, Classifier):
        check(found, expected)


USES: dict[str, Any] = {
    "call": lambda m: m(torch.zeros(1, 16)),
    "call of a submodule": lambda m: m.blocks[1](torch.zeros(1, 16)),
    "state_dict": lambda m: m.state_dict(),
    "state_dict of a submodule": lambda m: m.blocks.state_dict(),
    "load_state_dict of a submodule": lambda m: m.head.load_state_dict(nn.Linear(16, 4).state_dict()),
    "copy": copy.deepcopy,
    "copy of a submodule": lambda m: copy.deepcopy(m.blocks),
    "pickle": pickle.dumps,
    "pickle of a submodule": lambda m: pickle.dumps(m.blocks[0]),
}


def refusals(module: Any) -> dict[str, str]:
    found = {}
    for name, use in USES.items():
        try:
            use(module)
            found[name] = "none"
        except PartitionError as error:
            found[name] = str(error)
    return found


def without_memory(layout: str | None) -> dict[str, Any]:
    """Refusals, then facts in `strategy.whole`, refusals again, and facts after more training and changes."""
    with SMALL:
        trainer, module, data = train(layout)
        strategy: Any = trainer.strategy
        found: dict[str, Any] = {"refused": refusals(module)}
        with strategy.whole(module):
            found["whole"] = facts(module)
            with torch.no_grad():
                module.head.bias += 1.0
        found["refused again"] = refusals(module)
        found["full"] = strategy.full_state_dict()
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, data)
        with strategy.whole(module) as same:
            found["fit again"] = facts(same)
        return found


def same_in_one_process() -> dict[str, Any]:
    trainer, module, data = train(None)
    found: dict[str, Any] = {"whole": facts(module)}
    with torch.no_grad():
        module.head.bias += 1.0
    found["full"] = {k: v.clone() for k, v in module.state_dict().items()}
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data)
    found["fit again"] = facts(module)
    return found


@pytest.mark.parametrize("layout", quick(["fsdp2", "tp2", "pp2"], "pp2"))
def test_without_memory_for_whole_weights_uses_are_refused(ranks2: RankGroup, layout: str) -> None:
    expected, results = same_in_one_process(), ranks2.call(without_memory, layout)
    assert results[1].pop("full") == {}
    check(results[0].pop("full"), expected.pop("full"))
    for found in results:
        for when in ("refused", "refused again"):
            for use, message in found.pop(when).items():
                assert f"`layout='{layout}'`" in message, use
                for remedy in ("strategy.whole(module)", "full_state_dict()", "lightning-hybrid consolidate"):
                    assert remedy in message, use
        check(found, expected)


class Look(L.Callback):
    """Uses the whole module between two steps and at the end of epochs."""

    def __init__(self, enabled: bool) -> None:
        self.enabled, self.seen = enabled, []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.enabled and batch_idx == 1:
            with trainer.strategy.whole(pl_module), torch.no_grad():  # type: ignore[attr-defined]
                self.seen.append(pl_module(torch.ones(1, 16)))
                self.seen.append(copy.deepcopy(pl_module.blocks)[0](torch.ones(1, 16)))


def in_a_run(layout: str, enabled: bool) -> dict[str, Any]:
    look = Look(enabled)
    trainer, module, _ = train(layout, callbacks=[look], max_epochs=2)
    return {"weights": weights(trainer, module), "seen": torch.cat([s.flatten() for s in look.seen]) if enabled else 0}


@pytest.mark.parametrize("layout", quick(["fsdp2", "tp2", "pp2"], "pp2"))
def test_whole_within_a_run(ranks2: RankGroup, layout: str) -> None:
    without, results = ranks2.call(in_a_run, layout, False), ranks2.call(in_a_run, layout, True)
    check(results[0]["weights"], without[0]["weights"])
    torch.testing.assert_close(results[0]["seen"], results[1]["seen"])
    assert results[0]["seen"].numel() == 2 * (4 + 16)


def changed(layout: str, folder: str) -> dict[str, Any]:
    """Saves after a run, changes weights on rank 0 only, gets another head, is trained by another Trainer."""
    trainer, module, data = train(layout)
    trainer.save_checkpoint(f"{folder}/end.ckpt")
    state = {k: v.clone() for k, v in module.state_dict().items()}
    again, other, _ = train(layout, max_epochs=1)
    again.fit_loop.max_epochs = 1
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.0 + trainer.global_rank)
    trainer.validate(module, data, verbose=False)
    agreed = {k: v.clone() for k, v in module.state_dict().items()}
    module.head = nn.Linear(16, 4)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data)
    errors = []
    for read in (torch.load, lambda p: Classifier.load_from_checkpoint(p), lambda p: plain(module, data, p)):
        try:
            read(f"{folder}/end.ckpt")
        except CheckpointError as error:
            errors.append(str(error))
    return {"state": state, "agreed": agreed, "shape": tuple(module.state_dict()["head.weight"].shape), "read": errors}


def plain(module: Any, data: DataLoader, path: str) -> None:
    trainer, _ = trainer_for(None)
    trainer.fit(copy.deepcopy(module), data, ckpt_path=path)


@pytest.mark.parametrize("layout", quick(["fsdp2", "tp2", "pp2"], "pp2"))
def test_changes_and_files_after_a_run(ranks2: RankGroup, tmp_path: Path, layout: str) -> None:
    results = ranks2.call(changed, layout, str(tmp_path))
    for found in results:
        check(found["agreed"], results[0]["state"])
        assert found["shape"] == (4, 16)
        assert len(found["read"]) == 3
        assert all(f"lightning-hybrid consolidate {tmp_path}/end.ckpt OUT" in e for e in found["read"])
    assert "lightning-hybrid consolidate" in (tmp_path / "end.ckpt" / "README.txt").read_text()


class Llama(L.LightningModule):
    """A tiny language model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                pad_token_id=0,
            )
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def generated(layout: str | None, folder: str) -> dict[str, Any]:
    """Text that a trained model continues, by itself and as it was saved by `save_pretrained`."""
    quiet()
    L.seed_everything(7, verbose=False)
    module = Llama()
    trainer, replicas = trainer_for(layout)
    texts = torch.randint(1, 32, (16, 8), generator=torch.Generator().manual_seed(1))
    trainer.fit(module, DataLoader(texts, batch_size=8 // replicas))  # type: ignore[arg-type]
    path = f"{folder}/{layout}"
    if trainer.global_rank == 0:  # transformers writes on this rank only
        module.model.save_pretrained(path)
    trainer.strategy.barrier()
    saved = type(module.model).from_pretrained(path)
    prompt = texts[:2, :4]
    made = [m.eval().generate(prompt, max_new_tokens=6, do_sample=False) for m in (module.model, saved)]
    return {"texts": torch.stack(made).float()}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "pp2"])
def test_generation_and_pretrained_files(ranks2: RankGroup, tmp_path: Path, layout: str) -> None:
    expected = generated(None, str(tmp_path))
    for found in ranks2.call(generated, layout, str(tmp_path)):
        check(found, expected)
