"""Scores of answers before and after training."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

from lightning_hybrid.callbacks import AnswerScore
from lightning_hybrid.data import SampleConfig, TranslationData
from lightning_hybrid.models import OptimizerConfig, SupervisedLM, TransformerConfig


def pairs(folder: Path) -> str:
    """Words of three equal letters, whose translation is the letter twice."""
    file = folder / "pairs.jsonl"
    rows = [{"source": letter * 3 + str(n), "target": letter * 2} for letter in "abcd" for n in range(12)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(file)


def test_answers_get_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sacrebleu")
    seed_everything(0, verbose=False)
    data = TranslationData(path=pairs(tmp_path), samples=SampleConfig(batch_size=8, max_length=16))
    shape = TransformerConfig(vocabulary=272, width=32, blocks=1, heads=1, context_length=16)
    module = SupervisedLM(shape, OptimizerConfig(learning_rate=1e-2, warmup_steps=5))
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=40,
        logger=CSVLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        log_every_n_steps=10,
        callbacks=[AnswerScore(tasks=4, max_new_tokens=4, examples=1)],
    )
    trainer.fit(module, datamodule=data)
    with Path(tmp_path / "lightning_logs/version_0/metrics.csv").open() as file:
        scores = [(int(row["step"]), float(row["chrf"])) for row in csv.DictReader(file) if row["chrf"]]
    assert [step for step, _ in scores] == [0, 40]
    assert scores[0][1] < 20
    assert scores[1][1] > 90
    output = capsys.readouterr().out
    assert "chrf" in output
    assert f"{scores[1][1]:.3f}" in output
    assert "expected: '" in output


def test_what_cannot_answer_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(callbacks=[AnswerScore()], logger=False, max_steps=1, default_root_dir=tmp_path)
    with pytest.raises(TypeError, match=r"`AnswerScore` needs a module with `answer.* Got BoringModel and NoneType"):
        trainer.fit(BoringModel())
    with pytest.raises(ValueError, match="`tasks` must be at least 1. Got 0"):
        AnswerScore(tasks=0)
