"""Throughput and sample, on one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader, TensorDataset

from lightning_hybrid.callbacks import GenerateSample, TokenThroughput, throughput
from lightning_hybrid.models import CausalLM, TransformerConfig


def byte_batches(batches: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    tokens_NT = torch.randint(256, (4 * batches, 9), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(tokens_NT[:, :-1], tokens_NT[:, 1:]), batch_size=4)


def fit(
    directory: Path, module: LightningModule, loader: DataLoader[Any], *callbacks: Callback, **options: Any
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=directory,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, loader, loader if options.get("val_check_interval") else None)
    return trainer


def small_model() -> CausalLM:
    return CausalLM(TransformerConfig(width=16, blocks=1, heads=1, context_length=8))


class Clock:
    """Stands in for time: every training batch takes one second, every validation a hundred."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


class Passing(Callback):
    """Lets the clock go on."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_train_batch_start(self, *_: Any) -> None:
        self._clock.seconds += 1

    def on_validation_epoch_start(self, *_: Any) -> None:
        self._clock.seconds += 100


@pytest.mark.parametrize(
    "options", [{"max_steps": 5}, {"max_steps": 5, "val_check_interval": 2, "num_sanity_val_steps": 1}]
)
def test_throughput_is_that_of_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    trainer = fit(tmp_path, small_model(), byte_batches(6), Passing(clock), TokenThroughput(2), **options)
    # A batch is 4 windows of 8 bytes and takes a second.
    assert trainer.callback_metrics["tokens_per_second"] == pytest.approx(32)
    assert "tokens_per_second" in trainer.progress_bar_metrics


def test_throughput_counts_every_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(Trainer, "distributed_sampler_kwargs", {"num_replicas": 3, "rank": 0})
    trainer = fit(tmp_path, small_model(), byte_batches(6), Passing(clock), TokenThroughput(2), max_steps=5)
    assert trainer.callback_metrics["tokens_per_second"] == pytest.approx(96)


def test_throughput_is_not_known_before_a_window_is_full(tmp_path: Path) -> None:
    trainer = fit(tmp_path, small_model(), byte_batches(6), TokenThroughput(10), max_steps=5)
    assert "tokens_per_second" not in trainer.callback_metrics


def test_throughput_of_a_batch_without_tensors_is_refused() -> None:
    with pytest.raises(TypeError, match="counts the elements of the first tensor of a batch. Got a batch of type dict"):
        throughput._tokens({"text": "abc"})


def test_throughput_window_must_hold_a_batch() -> None:
    with pytest.raises(ValueError, match=r"`every_n_batches` must be at least 1\. Got 0"):
        TokenThroughput(0)


def test_the_old_name_of_the_throughput_callback_works_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="`TokenThroughput`"):
        from lightning_hybrid.callbacks import ThroughputMonitor
    assert ThroughputMonitor is TokenThroughput
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    with pytest.warns(DeprecationWarning, match="`TokenThroughput`"):
        given = parser.parse_object({"callback": {"class_path": "lightning_hybrid.callbacks.ThroughputMonitor"}})
    with pytest.warns(DeprecationWarning, match="`TokenThroughput`"):
        assert isinstance(parser.instantiate(given).callback, TokenThroughput)


def test_sample_is_what_the_trained_module_generates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model()
    fit(tmp_path, model, byte_batches(2), GenerateSample("import ", 8, temperature=0), max_steps=2)
    model.eval()
    tokens_BT = model.generate(torch.tensor([list(b"import ")]), 8, temperature=0)
    expected = bytes(tokens_BT[0].tolist()).decode("utf-8", errors="replace")
    printed = capsys.readouterr().out
    assert "Sample" in printed
    assert "import " in printed
    assert all(line.strip() in printed for line in expected.splitlines() if line.isprintable())


def test_sample_leaves_the_random_state_alone(tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [GenerateSample(max_new_tokens=2)]):
        torch.manual_seed(0)
        fit(tmp_path, small_model(), byte_batches(1), *callbacks, max_steps=1)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_sample_of_a_module_that_can_not_generate_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"`GenerateSample` needs a module with `generate.*Got BoringModel"):
        fit(tmp_path, BoringModel(), byte_batches(1), GenerateSample(), max_steps=1)


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`prompt` must have at least one character"):
        GenerateSample(prompt="")
