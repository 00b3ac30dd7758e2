"""Styled texts, translations and questions as samples, and the scores of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer, seed_everything

from lightning_hybrid.data import (
    IGNORED,
    ByteTokenizer,
    ReasoningData,
    SampleConfig,
    StyledText,
    TranslationData,
    styles,
    translation,
)
from lightning_hybrid.data.styles import Styled
from lightning_hybrid.data.translation import Pair
from lightning_hybrid.models import OptimizerConfig, SupervisedLM, TransformerConfig

TOKENIZER = ByteTokenizer()


def test_styles_are_folders_files_or_fields(tmp_path: Path) -> None:
    (tmp_path / "poems").mkdir()
    (tmp_path / "poems/first.txt").write_text("Roses\n%\nViolets\n%\n\n%\nRoses")
    (tmp_path / "laws").write_text("Thou shalt")
    expected = [Styled("laws", "Thou shalt"), Styled("poems", "Roses"), Styled("poems", "Violets")]
    assert sorted(StyledText(str(tmp_path)).items(), key=str) == expected
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"style": item.style, "text": item.text}) + "\n" for item in expected))
    assert StyledText(str(rows)).items() == expected
    assert StyledText(str(rows), styles=["laws"]).items() == expected[:1]
    with pytest.raises(ValueError, match="`styles` must be among laws, poems. Got prose"):
        StyledText(str(rows), styles=["prose"]).items()


def test_a_styled_text_has_its_loss_after_the_style(tmp_path: Path) -> None:
    data, item = StyledText(str(tmp_path)), Styled("laws", "Thou\nshalt")
    sample, task = data.sample(item), data.task(item)
    assert TOKENIZER.decode(sample.input_ids, special=True) == "[laws]\nThou\nshalt<|end|>"
    assert sample.labels == [IGNORED] * 7 + sample.input_ids[7:]
    assert TOKENIZER.decode(task.prompt) == "[laws]\nThou"
    assert task.expected == "shalt"
    assert data.score([task], ["shalt"]) == {}


@pytest.mark.slow
def test_the_style_decides_the_text(tmp_path: Path) -> None:
    """After training on two styles, the continuation of the same first letters is that of the style in the prompt."""
    texts = {"loud": "AB" + "CD" * 4, "quiet": "AB" + "cd" * 4}
    rows = [{"style": style, "text": f"{text}{n}"} for style, text in texts.items() for n in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    seed_everything(0, verbose=False)
    data = StyledText(str(file), samples=SampleConfig(batch_size=8, max_length=32))
    shape = TransformerConfig(vocabulary=272, width=32, blocks=1, heads=1, context_length=32)
    module = SupervisedLM(shape, OptimizerConfig(learning_rate=1e-2, warmup_steps=5))
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=60, limit_val_batches=0, enable_model_summary=False, **quiet
    )
    trainer.fit(module, datamodule=data)
    for style, text in texts.items():
        prompt = data.tokenizer.encode(f"[{style}]\nAB")
        answer = module.answer(prompt, max_new_tokens=8, end=data.tokenizer.end, temperature=0.0)
        assert data.tokenizer.decode(answer) == text[2:]


PAGE = "<html><body><h1>{0}</h1><div class='para'>\n {1} <em>{2}</em>\n</div><ul><li>{3}</li></ul></body></html>"


def pages(folder: Path) -> Path:
    texts = {"en": ("Title", "A", "house", "Prev"), "fr": ("Titre", "Une", "maison", "Prev")}
    for language, words in texts.items():
        (folder / language).mkdir()
        (folder / language / "page.html").write_text(PAGE.format(*words))
        (folder / language / "other.html").write_text("<p>x</p>" * len(words[1]))  # not the same elements
    return folder


def test_paragraphs_of_pages_are_aligned(tmp_path: Path) -> None:
    folder = pages(tmp_path)
    assert TranslationData("en", "fr", str(folder)).items() == [Pair("Title", "Titre"), Pair("A house", "Une maison")]
    with pytest.raises(ValueError, match=r"must be folders of .*: en, fr\. Got en and de"):
        TranslationData("en", "de", str(folder)).items()


@pytest.mark.parametrize("row", [{"source": "a", "target": "b"}, {"translation": {"en": "a", "fr": "b"}}])
def test_rows_of_translations(tmp_path: Path, row: dict[str, Any]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    assert TranslationData("en", "fr", str(file)).items() == [Pair("a", "b")]
    file.write_text(json.dumps({"text": "a"}))
    with pytest.raises(ValueError, match="row 1: a pair has the texts `source` and `target`, .* Got text"):
        TranslationData("en", "fr", str(file)).items()


def test_samples_of_both_kinds_of_models(tmp_path: Path) -> None:
    pair, end = Pair("a", "bc"), TOKENIZER.end
    encoded = TranslationData("en", "fr", str(pages(tmp_path)), encoder_decoder=True).sample(pair)
    assert (encoded.input_ids, encoded.labels) == ([97, end], [98, 99, end])
    decoded = TranslationData("en", "fr", str(tmp_path)).sample(pair)
    assert TOKENIZER.decode(decoded.input_ids, special=True) == "<|user|>a<|end|><|assistant|>bc<|end|>"
    assert decoded.labels == [IGNORED] * 4 + [98, 99, end]


def test_scores_of_translations(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    data = TranslationData("en", "fr", str(pages(tmp_path)))
    text = "the house is on the hill"
    tasks = [data.task(Pair("x", text))]
    assert data.score(tasks, [text]) == pytest.approx({"bleu": 100.0, "chrf": 100.0})
    worse = data.score(tasks, ["the house was on a hill"])
    assert 0 < worse["bleu"] < worse["chrf"] < 100


@pytest.mark.parametrize(
    ("module", "name", "kind", "package"),
    [(styles, "FORTUNES", StyledText, "fortunes"), (translation, "HANDBOOK", TranslationData, "debian-handbook")],
)
def test_missing_texts_of_debian_are_named(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, kind: Any, package: str
) -> None:
    monkeypatch.setattr(module, name, "/nothing/there")
    with pytest.raises(FileNotFoundError, match=f"`path` is /nothing/there, .* `apt-get install {package}`"):
        kind(path="/nothing/there")


def test_questions_are_held_out_and_checked_by_their_verifier() -> None:
    pytest.importorskip("reasoning_gym")
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    data = ReasoningData({"chain_sum": options, "gcd": {}}, count=60, samples=SampleConfig(validation_share=0.3))
    sets = data.divided()
    questions = [item["question"] for item in data.items()]
    assert len(questions) == len(set(questions))
    assert not {item["question"] for item in sets["training"]} & {item["question"] for item in sets["validation"]}
    item = next(item for item in sets["validation"] if item["subject"] == "chain_sum")
    sample = data.sample(item)
    assert TOKENIZER.decode([token for token in sample.labels if token >= 0]) == item["answer"]
    tasks = data.tasks(20)
    expected = [task.expected for task in tasks]
    right = {"accuracy": 1.0, "score": 1.0, "accuracy_chain_sum": 1.0, "accuracy_gcd": 1.0}
    assert data.score(tasks, expected) == right
    assert data.score(tasks, ["?"] * len(tasks))["accuracy"] == 0
    mixed = data.score(tasks[:2], [expected[0], f"{expected[1]} or so"])
    assert mixed["accuracy"] == 0.5, "an answer that only contains the right one"
    assert 0.5 < mixed["score"] < 1


def test_right_answers_need_not_be_the_reference() -> None:
    """The verifier computes an expression; it does not compare texts."""
    pytest.importorskip("reasoning_gym")
    data = ReasoningData({"countdown": {}}, count=20, samples=SampleConfig(max_length=2000, validation_share=0.5))
    tasks = data.tasks(4)
    others = [f"({task.expected})" for task in tasks]
    assert all(other != task.expected for other, task in zip(others, tasks, strict=True))
    assert data.score(tasks, others) == {"accuracy": 1.0, "score": 1.0}
    assert data.score(tasks, [f"{other} + 1" for other in others])["accuracy"] == 0


def test_questions_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match="`subjects` must be among .*chain_sum.* Got 'chain_sums'"):
        ReasoningData({"chain_sums": {}})
    with pytest.raises(ValueError, match="reasoning-gym refuses the options of chain_sum: .*terms"):
        ReasoningData({"chain_sum": {"terms": 2}})
    with pytest.raises(ValueError, match="`subjects` must have at least one generator"):
        ReasoningData({})
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym.factory", None)
    with pytest.raises(
        ValueError, match=r"need the package reasoning-gym\. Install it with `pip install reasoning-gym`"
    ):
        ReasoningData({"chain_sum": {}})
