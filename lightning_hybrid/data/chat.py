"""`ChatData`: conversations with a loss on the messages of chosen roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from lightning_hybrid.data.files import existing, needs, read_rows
from lightning_hybrid.data.sample_data import SampleConfig, SampleData
from lightning_hybrid.data.samples import IGNORED, Sample
from lightning_hybrid.data.tokenizers import Message, Tokenizer

CORPUS = "chatterbot-corpus"
"""Package on PyPI with short conversations in 28 languages."""
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Values of `from` in conversations of ShareGPT, and the roles that they are."""
Conversation = Sequence[Message]


class ChatData(SampleData[Conversation]):
    """Conversations for supervised fine-tuning.

    A row is a conversation in one of two forms::

        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]}
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]}

    The tokenizer's chat template makes the text. A conversation longer than `samples.max_length` ends earlier, after a
    message of a role with loss. Conversations with the same first message of the user are in the same set.

    Args:
        path: File or folder of rows (see `read_rows`), or `chatterbot-corpus/english` for a language of this package.
        roles: Roles of messages with a loss.
        samples: How samples are tokenized, divided and batched.
    """

    def __init__(
        self,
        path: str,
        roles: Sequence[str] = ("assistant",),
        samples: SampleConfig = SampleConfig(),  # noqa: B008 -- frozen
    ) -> None:
        super().__init__(samples)
        self._path = path if path.partition("/")[0] == CORPUS else str(existing(path))
        self._roles = tuple(roles)
        if self._path is path:
            _corpus_folder(path)

    def items(self) -> list[Conversation]:
        """Returns the conversations."""
        if self._path.partition("/")[0] == CORPUS:
            return _read_corpus(_corpus_folder(self._path))
        return [conversation(row, number) for number, row in enumerate(read_rows(self._path), 1)]

    def key(self, item: Conversation) -> str:
        """Returns the first message of the user."""
        return next((message["content"] for message in item if message["role"] == "user"), "")

    def sample(self, item: Conversation) -> Sample:
        """Returns the conversation, with labels for the messages of the chosen roles."""
        return chat_sample(self.tokenizer, item, self._roles, self.config.max_length)


def conversation(row: Mapping[str, Any], number: int) -> Conversation:
    """Returns the messages of a row.

    Args:
        row: In one of the forms of `ChatData`.
        number: Of the row, from 1, for errors.

    Raises:
        ValueError: If the row has neither form.
    """
    if isinstance(row.get("messages"), Sequence):
        pairs = [(message.get("role"), message.get("content")) for message in row["messages"]]
    elif isinstance(row.get("conversations"), Sequence):
        pairs = [(turn.get("from"), turn.get("value")) for turn in row["conversations"]]
        unknown = [role for role, _ in pairs if role not in _SHAREGPT_ROLES]
        if unknown:
            raise ValueError(f"row {number}: `from` must be one of {', '.join(_SHAREGPT_ROLES)}. Got {unknown[0]!r}.")
        pairs = [(_SHAREGPT_ROLES[str(role)], value) for role, value in pairs]
        if isinstance(row.get("system"), str) and row["system"]:
            pairs.insert(0, ("system", row["system"]))
    else:
        raise ValueError(
            f"row {number}: a conversation has `messages`, a list of objects with `role` and `content`, or "
            f"`conversations`, a list of objects with `from` and `value`. Got {', '.join(map(str, row)) or 'nothing'}."
        )
    for role, content in pairs:
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"row {number}: role and content of a message must be text. Got {role!r}, {content!r}.")
    return [{"role": str(role), "content": str(content)} for role, content in pairs]


def chat_sample(tokenizer: Tokenizer, messages: Conversation, roles: Sequence[str], max_length: int) -> Sample:
    """Returns a conversation as tokens, with labels for messages of some roles.

    The tokens of a message are those that it adds to the conversation before it. What a template writes before an
    answer of the assistant, such as its role, has no loss.

    Args:
        tokenizer: Its chat template makes the text.
        messages: The conversation.
        roles: Roles of messages with a loss.
        max_length: The conversation ends before the first message with loss that exceeds it.

    Raises:
        ValueError: If the template changes earlier messages when a later one is added.
    """
    tokens: list[int] = []
    labels: list[int] = []
    for count, message in enumerate(messages, 1):
        if message["role"] not in roles:
            continue
        before = tokenizer.chat(messages[: count - 1], answer=message["role"] == "assistant") if count > 1 else []
        after = tokenizer.chat(messages[:count])
        if before[: len(tokens)] != tokens or after[: len(before)] != before:
            raise ValueError(
                "the chat template must only add tokens when a message is added. That of `tokenizer` changes earlier "
                f"ones at message {count} of {tokenizer.decode(after)[:60]!r}. Give a tokenizer with another template."
            )
        if len(after) > max_length and tokens:
            break
        labels += [IGNORED] * (len(before) - len(tokens)) + after[len(before) :]
        tokens = after
    return Sample(tokens, labels)


def _corpus_folder(path: str) -> Path:
    spec = find_spec("chatterbot_corpus")
    if spec is None or spec.origin is None:
        raise ValueError(f"`path` is {path}, which needs the package {CORPUS}. {needs(CORPUS)}")
    languages = Path(spec.origin).parent / "data"
    folder = languages / (path.partition("/")[2] or "english")
    if not folder.is_dir():
        known = ", ".join(sorted(part.name for part in languages.iterdir() if part.is_dir()))
        raise ValueError(f"`path` must be {CORPUS}/ and one of the languages {known}. Got {path}.")
    return folder


def _read_corpus(folder: Path) -> list[Conversation]:
    """Returns the entries of a language: a statement, and each of the responses to it, without repetitions."""
    pairs: dict[tuple[str, str], None] = {}
    for file in sorted(folder.glob("*.yml")):
        for statement, *responses in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            pairs.update({(str(statement).strip(), str(response).strip()): None for response in responses})
    return [
        [{"role": "user", "content": statement}, {"role": "assistant", "content": response}]
        for statement, response in pairs
    ]
