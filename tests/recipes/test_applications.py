"""The recipes of applications: each trains as it is, on local data, and its measure gets better."""

from __future__ import annotations

import ast
import csv
from pathlib import Path
from typing import Any

import pytest

from lightning_hybrid.data import stdlib_sources
from lightning_hybrid.data.styles import FORTUNES
from lightning_hybrid.data.translation import HANDBOOK
from tests.scripts import run_warm

pytestmark = pytest.mark.timeout(700)

TIMEOUT_SECONDS = 600  # of a busy machine; a run takes a minute or two on two free cores


def run(recipe: str, folder: Path, *arguments: str, command: str = "fit", devices: int = 2) -> dict[str, list[float]]:
    """Runs a recipe in a folder of its own; returns what it has logged, by name."""
    options = ("-m", "lightning_hybrid.cli", command, "--config", recipe, *arguments)
    folder.mkdir(parents=True, exist_ok=True)
    code, output = run_warm(*options, processes=devices, cwd=folder, timeout_seconds=TIMEOUT_SECONDS)
    assert code == 0, output[-5000:]
    (file,) = folder.rglob("metrics.csv")
    with file.open() as opened:
        rows = list(csv.DictReader(opened))
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if value:
                found.setdefault(name, []).append(float(value))
    return found


def bits(recipe: str, folder: Path, *arguments: str) -> tuple[float, float]:
    """Bits per token of the validation set, before and after training."""
    before = run(recipe, folder / "before", *arguments, command="validate")["val_bits_per_token"]
    after = run(recipe, folder / "after", *arguments)["val_bits_per_token"]
    return before[0], after[-1]


@pytest.mark.slow
def test_chat(tmp_path: Path) -> None:
    pytest.importorskip("chatterbot_corpus")
    before, after = bits("chat", tmp_path)
    assert before > 7.5
    assert after < 4.0


@pytest.mark.slow
def test_code_completion(tmp_path: Path) -> None:
    found = run("code_completion", tmp_path)
    assert found["pass@1"][0] == 0
    assert found["pass@1"][-1] > 0
    assert found["val_bits_per_token"][-1] < 4.0


def texts_of_styles(folder: Path) -> str:
    """Debian's fortunes; or, where they are not installed, docstrings of the standard library, by package."""
    if Path(FORTUNES).exists():
        return FORTUNES
    for file in stdlib_sources(["asyncio", "concurrent", "email", "http", "logging", "multiprocessing", "unittest"]):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="replace")))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = [text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node))]
        place = folder / file.parent.name / f"{file.stem}.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("\n%\n".join(texts))
    return str(folder)


@pytest.mark.slow
def test_content_generation(tmp_path: Path) -> None:
    texts = texts_of_styles(tmp_path / "texts")
    before, after = bits("content_generation", tmp_path, f"--data.path={texts}")
    assert before > 7.5
    assert after < 4.0


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["translation", "translation_decoder"])
def test_translation(tmp_path: Path, recipe: str) -> None:
    pytest.importorskip("sacrebleu")
    if not Path(HANDBOOK).exists():
        pytest.skip(f"needs {HANDBOOK}: apt-get install debian-handbook")
    found = run(recipe, tmp_path)
    assert found["chrf"][-1] > found["chrf"][0] + 3
    assert found["bleu"][-1] > found["bleu"][0]


@pytest.mark.slow
def test_tutoring(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    found = run("tutoring", tmp_path)
    assert found["accuracy"][0] < 0.05
    assert found["accuracy"][-1] > 0.1


def folder_of_a_model(folder: Path) -> str:
    """A folder of transformers with a small model of random weights and a tokenizer with a chat template."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    words = {word: i for i, word in enumerate(["</s>", "<|user|>", "<|assistant|>", *sorted(alphabet)])}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="</s>", additional_special_tokens=["<|user|>", "<|assistant|>"]
    )
    fast.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    fast.save_pretrained(folder)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model("qwen2", vocab_size=272, eos_token_id=0, **shape, **heads)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_finetuning_of_a_local_model(tmp_path: Path) -> None:
    pytest.importorskip("chatterbot_corpus")
    folder = folder_of_a_model(tmp_path / "model")
    arguments = (f"--model.path={folder}", f"--data.samples.tokenizer={folder}", "--model.optimizer.learning_rate=3e-3")
    before, after = bits("finetune_hf", tmp_path, "--trainer.accelerator=cpu", "--trainer.max_steps=60", *arguments)
    assert before > 7.5
    assert after < 4.5


@pytest.mark.slow
def test_layouts_have_the_losses_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("chatterbot_corpus")
    short = ("--trainer.max_steps=4", "--trainer.val_check_interval=4", "--trainer.log_every_n_steps=1")
    found = {}
    for layout, devices in (("dp1", 1), ("dp2", 2), ("tp2-pp2", 4)):
        options = (f"--trainer.strategy.layout={layout}", f"--trainer.devices={devices}", *short)
        found[layout] = run("chat", tmp_path / layout, *options, devices=devices)
    for name in ("train_loss", "val_bits_per_token"):
        for layout in ("dp2", "tp2-pp2"):
            assert found[layout][name] == pytest.approx(found["dp1"][name], rel=1e-5), (name, layout)
