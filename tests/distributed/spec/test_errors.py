"""Bad input gives one clear error before training, with the argument, the rule, the values and the fix; no hang."""

from __future__ import annotations

import re
import time
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.harness import RankError, RankGroup
from tests.zoo.case import Samples, token_ids
from tests.zoo.cases import CASES
from tests.zoo.hf import GROUPED, HFModule, tokens

BOUND_SECONDS = 30.0
"""An error must have come by then; it takes about a second, and gloo alone would wait for half an hour."""


class OneLayer(L.LightningModule):
    """A module with nothing in it to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TwoLayers(OneLayer):
    """Two blocks, for two stages at most."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 20)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.layer(self.first(batch[0])), batch[1])


class ReadsAValue(OneLayer):
    """Looks at a value in the middle of the step, which a stage that does not have the value cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(20, 20) for _ in range(4))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy, with a branch on an activation."""
        x = batch[0]
        for block in self.blocks:
            x = block(x).relu()
            if x.sum().item() < 0:
                x = -x
        return nn.functional.cross_entropy(self.layer(x), batch[1])


class Manual(OneLayer):
    """Optimizes by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.blocks = nn.Sequential(*(nn.Linear(20, 20) for _ in range(4)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """One step."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.layer(self.blocks(batch[0])), batch[1]))
        optimizer.step()


def _llama(**sizes: Any) -> L.LightningModule:
    return HFModule("LlamaForCausalLM", hf.LlamaConfig(**{**GROUPED, **sizes}))


def _module(kind: str) -> tuple[L.LightningModule, Any]:
    """The module and what makes its samples."""
    features = CASES["mlp"].sample
    modules = {
        "llama": (lambda: _llama(), tokens),
        "llama with 3 heads": (
            lambda: _llama(num_attention_heads=3, num_key_value_heads=3, hidden_size=48, head_dim=16),
            tokens,
        ),
        "one layer": (OneLayer, features),
        "two layers": (TwoLayers, features),
        "reads a value": (ReadsAValue, features),
        "manual": (Manual, features),
        "tied": (CASES["tied"].build, token_ids),
    }
    build, sample = modules[kind]
    return build(), sample


def _fit(kind: str, batch_size: int, **options: Any) -> None:
    from lightning_hybrid import HybridStrategy

    module, sample = _module(kind)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=HybridStrategy(**options),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Samples(sample, batch_size), batch_size=batch_size))


@pytest.mark.parametrize(
    ("kind", "options", "error", "patterns"),
    [
        pytest.param(
            "llama",
            {"layout": "dp2-pp2"},
            "ValueError",
            [r"`layout`", r"dp2-pp2", r"2 devices", r"'pp2'"],
            id="layout needs more devices than there are",
        ),
        pytest.param(
            "llama",
            {"layout": "dp2-qp2"},
            "ValueError",
            [r"`layout`", r"dp, fsdp, ep, tp, pp", r"qp"],
            id="unknown axis",
        ),
        pytest.param(
            "llama",
            {"layout": "pp2", "schedule": "1f1b!"},
            "ValueError",
            [r"`schedule`", r"1f1b!", r"GPipe", r"DualPipeV"],
            id="unknown schedule",
        ),
        pytest.param(
            "llama", {"layout": "pp2", "microbatches": 0}, "ValueError", [r"`microbatches`", r"0"], id="no microbatches"
        ),
        pytest.param(
            "two layers",
            {"layout": "pp2", "schedule": "Interleaved1F1B"},
            "PartitionError",
            [r"4 pipeline stages", r"2 modules", r"1F1B"],
            id="more stages than blocks",
        ),
        pytest.param("one layer", {"layout": "pp2"}, "PartitionError", [r"pp2", r"`dp`|dp2"], id="nothing to cut"),
        pytest.param(
            "llama with 3 heads",
            {"layout": "tp2"},
            "PartitionError",
            [r"self_attn", r"\b3\b", r"dp2|fsdp2|pp2"],
            id="heads not divisible",
        ),
        pytest.param(
            "llama",
            {"layout": "pp2", "microbatches": 32},
            "PartitionError",
            [r"`microbatches", r"\b32\b", r"\b16\b"],
            id="more microbatches than samples",
        ),
        pytest.param(
            "reads a value",
            {"layout": "pp2"},
            "PartitionError",
            [r"test_errors\.py", r"`dp`|dp2"],
            id="a value is read in the step",
        ),
        pytest.param(
            "manual", {"layout": "pp2"}, "PartitionError", [r"manual", r"dp2|fsdp2"], id="manual optimization"
        ),
        pytest.param(
            "tied",
            {"layout": "tp2", "tensor_plan": {"*.no_such_layer": "colwise"}},
            "ValueError",
            [r"`tensor_plan`", r"no_such_layer"],
            id="tensor plan matches nothing",
        ),
        pytest.param(
            "tied",
            {"layout": "tp2", "tensor_plan": {"blocks.*.proj": "diagonal"}},
            "ValueError",
            [r"`tensor_plan`", r"diagonal", r"colwise", r"rowwise"],
            id="tensor plan with an unknown style",
        ),
    ],
)
def test_bad_input(kind: str, options: dict[str, Any], error: str, patterns: list[str], ranks2: RankGroup) -> None:
    start = time.monotonic()
    with pytest.raises(RankError) as raised:
        ranks2.call(_fit, kind, 16, timeout_seconds=BOUND_SECONDS, **options)
    assert raised.value.kind == error, raised.value
    for pattern in patterns:
        assert re.search(pattern, raised.value.failure.message), (pattern, raised.value.failure.message)
    assert time.monotonic() - start < BOUND_SECONDS
