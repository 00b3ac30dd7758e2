"""Code with gaps, and doctests in processes with limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_hybrid.data import IGNORED, ByteTokenizer, CodeData, SampleConfig
from lightning_hybrid.data.code import Code
from lightning_hybrid.data.doctests import documented_functions, passes, tokens_in

MODULE = '''
class Numbers:
    def double(self, value):
        """
        >>> Numbers().double(2)
        4
        """
        result = value * 2
        return result

def plain(value):
    """Has no doctest."""
    return value

def triple(value):
    """
    >>> from numbers_of_mine import triple
    >>> triple(2)
    6
    """
    return value * 3
'''
TOKENIZER = ByteTokenizer()
PREFIX, SUFFIX, MIDDLE = (TOKENIZER.special(f"<|fim_{name}|>") for name in ("prefix", "suffix", "middle"))


def data(folder: Path, **options: Any) -> CodeData:
    (folder / "numbers_of_mine.py").write_text(MODULE)
    (folder / "other.py").write_text(MODULE * 20)
    return CodeData(str(folder), held_out=["numbers_of_mine"], **options)


def filled(tokens: list[int], spm: bool) -> str:
    """The text of a sample with a gap."""
    assert tokens[0] == PREFIX
    assert tokens[-1] == TOKENIZER.end
    suffix, middle = tokens.index(SUFFIX), tokens.index(MIDDLE)
    assert suffix < middle
    parts = tokens[1:suffix], tokens[suffix + 1 : middle], tokens[middle + 1 : -1]
    assert not (spm and parts[0])
    before, after, rest = (TOKENIZER.decode(part) for part in parts)
    return before + rest + after


@pytest.mark.parametrize("spm", [False, True])
def test_parts_of_a_gap_are_the_text_in_another_order(tmp_path: Path, spm: bool) -> None:
    module = data(tmp_path, fim_rate=1.0, spm_rate=float(spm))
    texts = [f"x = {n} * né\n" for n in range(20)]
    samples = [module.sample(Code(tmp_path, text)) for text in texts]
    assert [filled(sample.input_ids, spm) for sample in samples] == texts
    assert all(sample.labels == sample.input_ids for sample in samples)
    assert len({sample.input_ids.index(MIDDLE) for sample in samples}) > 3
    prefixes = [sample.input_ids.index(SUFFIX) - 1 for sample in samples]
    assert spm or sum(length > 0 for length in prefixes) > len(samples) / 2, "PSM has the prefix first"
    assert samples == [module.sample(Code(tmp_path, text)) for text in texts]


def test_gaps_of_words_and_a_loss_on_the_middle(tmp_path: Path) -> None:
    module = data(tmp_path, fim_rate=1.0, spm_rate=0.5, word_rate=1.0, loss="middle")
    for n in range(20):
        sample = module.sample(Code(tmp_path, f"first = second + third * {n}"))
        trained = [label for label in sample.labels if label != IGNORED]
        assert TOKENIZER.decode(trained, special=True) in ("first<|end|>", "second<|end|>", "third<|end|>")
        assert sample.input_ids[-len(trained) :] == trained
    with pytest.raises(ValueError, match="`loss` must be all or middle. Got 'end'"):
        data(tmp_path, loss="end")


def test_rates(tmp_path: Path) -> None:
    module = data(tmp_path, fim_rate=0.5, samples=SampleConfig(max_length=64))
    samples = [module.sample(Code(tmp_path, f"some text {n}")).input_ids for n in range(200)]
    gaps = [tokens for tokens in samples if tokens[0] == PREFIX]
    assert 70 < len(gaps) < 130
    assert 20 < sum(tokens[1] == SUFFIX for tokens in gaps) < len(gaps) - 20
    with pytest.raises(ValueError, match="`fim_rate` must be at least 0 and at most 1. Got 2"):
        data(tmp_path, fim_rate=2)
    with pytest.raises(ValueError, match="has the special tokens .* Got '<PRE>'"):
        data(tmp_path, fim_tokens=("<PRE>", "<SUF>", "<MID>"))


def test_parts_of_files_and_what_is_held_out(tmp_path: Path) -> None:
    module = data(tmp_path, samples=SampleConfig(max_length=128))
    sets = module.divided()
    assert {item.file.stem for item in sets["training"]} == {"other"}
    assert {item.file.stem for item in sets["validation"]} == {"numbers_of_mine"}
    assert "".join(item.text for item in sets["training"]) == MODULE * 20
    assert all(len(module.sample(item).input_ids) <= 128 for item in sets["training"])


def test_functions_with_doctests_and_their_words() -> None:
    found = dict(documented_functions(MODULE))
    assert set(found) == {"Numbers.double", "triple"}
    words = [MODULE[start:end] for start, end in tokens_in(MODULE, *found["Numbers.double"])]
    assert words == ["result", "value", "return", "result"]
    assert documented_functions("def f(:") == []


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        (("value * 3", "value + value + value"), True),
        (("value * 3", "value * 2"), False),
        (("value * 3", "value *"), False),
        (("return value * 3", "import sys; sys.exit(0)"), False),
    ],
)
def test_doctests_of_changed_code(change: tuple[str, str], passed: bool) -> None:
    assert passes(MODULE.replace(*change), "numbers_of_mine", "triple") is passed


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "return len(' ' * (1 << 31)) and value * 3",
        "import os; os.write(os.open('file', os.O_CREAT | os.O_WRONLY), b'x'); return value * 3",
    ],
    ids=["endless", "asleep", "memory", "file"],
)
def test_limits_of_the_process(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    monkeypatch.setattr("lightning_hybrid.data.doctests.SECONDS", 2)
    assert not passes(MODULE.replace("return value * 3", body), "numbers_of_mine", "triple")


def test_tasks_are_gaps_that_the_original_word_solves(tmp_path: Path) -> None:
    module = data(tmp_path)
    tasks = module.tasks(5)
    assert len(tasks) == 2
    expected = [task.expected for task in tasks]
    assert module.score(tasks, expected) == {"pass@1": 1.0, "exact_match": 1.0}
    assert module.score(tasks, ["", expected[1]]) == {"pass@1": 0.5, "exact_match": 0.5}
    for task in tasks:
        tokens = task.prompt
        assert tokens[0] == PREFIX
        assert tokens[-1] == MIDDLE
        assert len(tokens) < module.config.max_length
        suffix = tokens.index(SUFFIX)
        context = TOKENIZER.decode(tokens[1:suffix]) + task.expected + TOKENIZER.decode(tokens[suffix + 1 : -1])
        assert context in MODULE
