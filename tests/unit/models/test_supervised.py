"""Language models on samples with labels: the loss, its weight, and answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_hybrid.data import IGNORED
from lightning_hybrid.models import ExpertsConfig, PredictionConfig, PretrainedLM, SupervisedLM, TransformerConfig

SMALL: dict[str, Any] = {"vocabulary": 32, "width": 32, "blocks": 2, "heads": 2, "context_length": 16}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "eos_token_id": 1,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
T5 = {
    "model_type": "t5",
    "vocab_size": 32,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}


def batch() -> dict[str, Tensor]:
    """Two samples of 7 and 5 tokens, of which 3 and 2 have labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 32, (2, 7), generator=generator)
    labels = ids.clone()
    labels[0, :4], labels[1, :3], labels[1, 5:] = IGNORED, IGNORED, IGNORED
    mask = torch.ones_like(ids)
    mask[1, 5:], ids[1, 5:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "transformer":
        return SupervisedLM(TransformerConfig(**SMALL))
    pytest.importorskip("transformers")
    return PretrainedLM(config=LLAMA if kind == "llama" else T5)


@pytest.mark.parametrize("kind", ["transformer", "llama", "t5"])
def test_the_loss_is_the_mean_over_labeled_tokens(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    module, logged = model(kind), {}
    monkeypatch.setattr(module, "log", lambda name, value, **options: logged.update({name: (value, options)}))
    step = module.training_step(batch(), 0)
    if kind == "transformer":
        logits, labels = module(batch()["input_ids"])[:, :-1], batch()["labels"][:, 1:]
        kept = labels != IGNORED
        expected = F.cross_entropy(logits[kept], labels[kept])
    else:
        expected = module.model(**batch()).loss  # the loss of transformers itself
    torch.testing.assert_close(step["loss"], expected)
    assert int(step["weight"]) == 5
    module.validation_step(batch(), 0)
    bits, options = logged["val_bits_per_token"]
    torch.testing.assert_close(bits, expected / math.log(2))
    assert options["batch_size"] == 5


@torch.no_grad()
def test_bits_of_each_sample() -> None:
    module = model("transformer")
    bits = module.predict_step(batch(), 0)
    loss, _ = module._labeled_loss(batch())
    assert float((bits * torch.tensor([3.0, 2.0])).sum() / 5) == pytest.approx(float(loss) / math.log(2))


@pytest.mark.parametrize("kind", ["transformer", "llama"])
def test_the_answer_is_the_likeliest_continuation(kind: str) -> None:
    module, prompt = model(kind).eval(), [5, 6, 7]
    tokens = list(prompt)
    for _ in range(6):
        ids = torch.tensor([tokens])
        logits = module(ids) if kind == "transformer" else module.model(input_ids=ids).logits
        tokens.append(int(logits[0, -1].argmax()))
    assert module.answer(prompt, 6, end=-1 if kind == "transformer" else 1) == tokens[3:]
    assert module.answer(prompt, 6, end=tokens[5]) == tokens[3 : tokens.index(tokens[5], 3)]


@pytest.mark.parametrize("kind", ["transformer", "llama"])
def test_answers_are_sampled_by_the_seed(kind: str) -> None:
    module = model(kind).eval()

    def sampled(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return module.answer([5, 6, 7], 6, end=1, temperature=1.0)

    assert sampled(0) == sampled(0)
    assert len({tuple(sampled(seed)) for seed in range(5)}) > 2


def test_the_answer_ends_with_the_context() -> None:
    assert len(model("transformer").answer([3] * 14, 50, end=-1)) == 2


def test_losses_that_are_no_token_means_are_refused() -> None:
    with pytest.raises(ValueError, match="`prediction` cannot be combined with labels of samples. Leave it out"):
        SupervisedLM(TransformerConfig(**SMALL, prediction=PredictionConfig()))
    experts = ExpertsConfig(experts=4, chosen=2, hidden=16)
    with pytest.raises(ValueError, match="`balance_loss` is a mean over samples, .* Set it to 0"):
        SupervisedLM(TransformerConfig(**SMALL, experts=experts))


def test_a_local_folder(tmp_path: Path) -> None:
    first = model("llama")
    first.model.save_pretrained(tmp_path)
    again = PretrainedLM(path=str(tmp_path))
    assert again.model.training
    for name, weight in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`path` or `config` must be given, and not both"):
        PretrainedLM()
    with pytest.raises(FileNotFoundError, match=r"`path`: there is no folder \./nothing"):
        PretrainedLM(path="./nothing")
    with pytest.raises(ValueError, match=f"`path`: transformers cannot load '{tmp_path}': "):
        PretrainedLM(path=str(tmp_path))
    with pytest.raises(ValueError, match="`config` must have `model_type`"):
        PretrainedLM(config={"hidden_size": 8})
