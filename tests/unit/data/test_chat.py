"""Conversations as samples: forms, templates, loss masks, what is held out, global batches."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hybrid.data import IGNORED, ByteTokenizer, ChatData, PretrainedTokenizer, Sample, SampleConfig
from lightning_hybrid.data.chat import chat_sample, conversation
from lightning_hybrid.data.tokenizers import make_tokenizer
from tests.unit.data.test_data import Replica

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def trained(sample: Sample, tokenizer: Any) -> list[str]:
    """The runs of tokens that have a loss, as text."""
    runs: list[list[int]] = [[]]
    for token, label in zip(sample.input_ids, sample.labels, strict=True):
        if label == IGNORED:
            runs.append([])
        else:
            assert label == token
            runs[-1].append(token)
    return [tokenizer.decode(run, special=True) for run in runs if run]


def pretrained(folder: Path, template: str | None = TEMPLATE) -> PretrainedTokenizer:
    """A tokenizer of transformers whose tokens are characters."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    characters = [chr(code) for code in range(32, 127)]
    words = {word: i for i, word in enumerate(["<unk>", "</s>", *characters])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    model.decoder = tokenizers.decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return PretrainedTokenizer(str(folder))


def test_both_forms_are_the_same_conversation() -> None:
    roles = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": roles[message["role"]], "value": message["content"]} for message in TALK]
    assert conversation({"messages": TALK}, 1) == TALK
    assert conversation({"conversations": turns}, 1) == TALK
    assert conversation({"system": "Be brief.", "conversations": turns[1:]}, 1) == TALK


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"row 7: a conversation has `messages`, .* Got text\."),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "row 7: `from` must be one of human, .* Got 'robot'"),
        ({"messages": [{"role": "user", "content": [1]}]}, "row 7: role and content of a message must be text"),
    ],
)
def test_other_rows_are_refused(row: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conversation(row, 7)


@pytest.mark.parametrize("kind", ["bytes", "pretrained"])
@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (["assistant"], ["Hello{end}", "Ciao{end}"]),
        (["user"], ["{user}Hi{end}", "{user}Bye{end}"]),
        (["user", "assistant"], ["{user}Hi{end}", "Hello{end}{user}Bye{end}", "Ciao{end}"]),
    ],
)
def test_only_the_chosen_roles_have_a_loss(tmp_path: Path, kind: str, roles: list[str], expected: list[str]) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else pretrained(tmp_path)
    user, end = ("<|user|>", "<|end|>") if kind == "bytes" else ("[user]", "</s>")
    sample = chat_sample(tokenizer, TALK, roles, 1000)
    assert trained(sample, tokenizer) == [text.format(user=user, end=end) for text in expected]
    assert tokenizer.chat(TALK)[: len(sample.input_ids)] == sample.input_ids


def test_a_long_conversation_ends_after_an_answer() -> None:
    tokenizer = ByteTokenizer()
    whole = chat_sample(tokenizer, TALK, ["assistant"], 1000)
    shorter = chat_sample(tokenizer, TALK, ["assistant"], len(whole.input_ids) - 1)
    assert shorter.input_ids == tokenizer.chat(TALK[:3])


def test_a_template_that_changes_earlier_messages_is_refused(tmp_path: Path) -> None:
    tokenizer = pretrained(tmp_path, "{{ messages[-1].content }}{{ messages[0].content }}")
    with pytest.raises(ValueError, match="the chat template must only add tokens when a message is added"):
        chat_sample(tokenizer, TALK, ["assistant"], 1000)


def test_tokenizers_without_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no chat template. Set `chat_template` of the tokenizer"):
        pretrained(tmp_path, None).chat(TALK)
    with pytest.raises(ValueError, match="has no token '<fim>'"):
        pretrained(tmp_path).special("<fim>")
    with pytest.raises(FileNotFoundError, match=r"`tokenizer`: there is no folder \./nothing"):
        make_tokenizer("./nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`tokenizer`: transformers cannot load '.*empty'"):
        make_tokenizer(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="must be one of system, user, assistant, tool. Got 'robot'"):
        ByteTokenizer().chat([{"role": "robot", "content": ""}])


def test_bytes_are_decoded_with_and_without_special_tokens() -> None:
    tokenizer = ByteTokenizer()
    tokens = [tokenizer.special("<|user|>"), *tokenizer.encode("né"), tokenizer.end, 271]
    assert tokenizer.decode(tokens) == "né"
    assert tokenizer.decode(tokens, special=True) == "<|user|>né<|end|><|271|>"
    assert max(tokens) < tokenizer.vocabulary


def rows(folder: Path, count: int) -> str:
    """A file of conversations of various lengths."""
    file = folder / f"{count}.jsonl"
    talks = [
        [{"role": "user", "content": f"Question {n}"}, {"role": "assistant", "content": "x" * (3 + n % 17)}]
        for n in range(count)
    ]
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return str(file)


def held_out(path: str) -> set[str]:
    return {item[0]["content"] for item in ChatData(path).divided()["validation"]}


def test_a_conversation_stays_held_out_when_others_are_added(tmp_path: Path) -> None:
    few, many = held_out(rows(tmp_path, 100)), held_out(rows(tmp_path, 200))
    assert few == {name for name in many if int(name.split()[1]) < 100}
    assert 5 < len(many) < 40


def global_batches(path: str, replicas: int, config: SampleConfig) -> list[list[bytes]]:
    """The samples of each global batch of an epoch, as sorted bytes."""
    parts = []
    for replica in range(replicas):
        data = ChatData(path, samples=config)
        data.trainer = Replica(replicas, replica)
        data.setup("fit")
        loader: Any = data.train_dataloader()
        keys = loader.batch_sampler
        dealt = list(keys) if config.max_tokens is None else list(keys)[replica::replicas]
        if config.max_tokens is None:
            order = list(loader.sampler)[replica::replicas]
            dealt = [order[i : i + loader.batch_size] for i in range(0, len(order), loader.batch_size)]
            dealt = [part for part in dealt if len(part) == loader.batch_size]
        parts.append([[data._training[i]["input_ids"].numpy().tobytes() for i in part] for part in dealt])  # type: ignore[index] -- set in `setup`
    return [sorted(sum(batch, [])) for batch in zip(*parts, strict=True)]


@pytest.mark.parametrize("config", [SampleConfig(batch_size=8), SampleConfig(max_length=64, max_tokens=512)])
def test_global_batches_do_not_depend_on_the_number_of_replicas(tmp_path: Path, config: SampleConfig) -> None:
    path = rows(tmp_path, 100)
    alone = global_batches(path, 1, config)
    assert len(alone) > 2
    assert global_batches(path, 2, config) == alone
    assert global_batches(path, 4, config) == alone


def test_batches_are_padded_and_within_the_budget(tmp_path: Path) -> None:
    data = ChatData(rows(tmp_path, 100), samples=SampleConfig(max_length=64, max_tokens=512))
    data.setup("fit")
    for batch in [*data.train_dataloader(), *data.val_dataloader()]:
        ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
        assert ids.numel() <= 512
        assert ids.shape == labels.shape == mask.shape
        assert torch.equal(ids == ByteTokenizer.pad, mask == 0)
        assert bool((labels[mask == 0] == IGNORED).all())
        assert bool((labels != IGNORED).any(dim=1).all())
    sizes = {len(batch["input_ids"]) for batch in data.train_dataloader()}
    assert len(sizes) > 1, "more samples where they are short"


def test_options_out_of_range(tmp_path: Path) -> None:
    path = rows(tmp_path, 50)
    for values, message in (
        ({"max_length": 0}, "`max_length` must be at least 1. Got 0"),
        ({"validation_share": 1.0}, "`validation_share` must be above 0 and below 1"),
        ({"max_tokens": 100}, "`max_tokens` must be at least `multiple_of` times `max_length`, 1024. Got 100"),
    ):
        with pytest.raises(ValueError, match=message):
            SampleConfig(**values)  # type: ignore[arg-type] -- of several types
    data = ChatData(path, samples=SampleConfig(max_length=10))
    with pytest.raises(ValueError, match="The training set has no samples of at most `max_length` = 10 tokens"):
        data.setup("fit")
    data = ChatData(path, samples=SampleConfig(batch_size=1000))
    data.setup("fit")
    with pytest.raises(ValueError, match=r"`batch_size` is 1000, but there are \d+ samples"):
        data.train_dataloader()
    data = ChatData(path, samples=SampleConfig(max_length=64, max_tokens=512))
    data.trainer = Replica(3, 0)
    data.setup("fit")
    with pytest.raises(ValueError, match="`multiple_of` is that of the global batch and must be a multiple of the 3"):
        data.train_dataloader()


def test_the_corpus_and_what_is_not_there() -> None:
    pytest.importorskip("chatterbot_corpus")
    items: Sequence[Any] = ChatData("chatterbot-corpus/english").items()
    assert len(items) > 500
    assert {message["role"] for message in items[0]} == {"user", "assistant"}
    with pytest.raises(ValueError, match="one of the languages .* spanish.* Got chatterbot-corpus/klingon"):
        ChatData("chatterbot-corpus/klingon")
    with pytest.raises(FileNotFoundError, match="`path`: there is no file or folder nothing.jsonl"):
        ChatData("nothing.jsonl")


def test_the_missing_corpus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_hybrid.data.chat.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package chatterbot-corpus\. Install it with `pip install"):
        ChatData("chatterbot-corpus/english")
