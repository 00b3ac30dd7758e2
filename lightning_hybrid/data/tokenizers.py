"""Tokenizers of the data modules: bytes with some special tokens, or one of the transformers library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lightning_hybrid.models.hub import load_pretrained

Message = Mapping[str, str]
"""`role` and `content` of a message in a conversation."""

SPECIAL_TOKENS = (
    *("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"),
    *("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
)
"""Tokens after the 256 bytes: padding, the end of a text or message, roles of messages, parts of code with a gap."""
ROLES = ("system", "user", "assistant", "tool")
"""Roles of messages that the byte tokenizer knows."""


class Tokenizer(Protocol):
    """Interface of tokenizers for data modules."""

    pad: int
    """Token that fills batches."""
    end: int
    """Token at the end of a message or text."""

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, without special tokens."""
        ...

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        """Returns the text of tokens; `special`: with the names of special tokens."""
        ...

    def special(self, name: str) -> int:
        """Returns a special token."""
        ...

    def chat(self, messages: Sequence[Message], answer: bool = False) -> list[int]:
        """Returns the tokens of a conversation; `answer`: with what precedes the next message of the assistant."""
        ...


class ByteTokenizer:
    """Bytes of UTF-8, and the tokens of `SPECIAL_TOKENS`.

    A conversation is `<|role|>content<|end|>` for each message.
    """

    vocabulary = 272
    """Number of tokens: 265, rounded up to a multiple of 16 so that devices can divide it."""
    pad = 256
    end = 257

    def encode(self, text: str) -> list[int]:
        """Returns the bytes of a text."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        """Returns the text of tokens; `special`: with the names of special tokens."""
        parts = [
            _name(token).encode() if special and token >= 256 else bytes([token][: token < 256]) for token in tokens
        ]
        return b"".join(parts).decode(errors="replace")

    def special(self, name: str) -> int:
        """Returns a special token."""
        if name not in SPECIAL_TOKENS:
            raise ValueError(f"the byte tokenizer has the special tokens {', '.join(SPECIAL_TOKENS)}. Got {name!r}.")
        return 256 + SPECIAL_TOKENS.index(name)

    def chat(self, messages: Sequence[Message], answer: bool = False) -> list[int]:
        """Returns the tokens of a conversation; `answer`: with what precedes the next message of the assistant."""
        tokens = []
        for message in messages:
            if message["role"] not in ROLES:
                raise ValueError(f"`role` of a message must be one of {', '.join(ROLES)}. Got {message['role']!r}.")
            tokens += [self.special(f"<|{message['role']}|>"), *self.encode(message["content"]), self.end]
        return [*tokens, self.special("<|assistant|>")] if answer else tokens


def _name(token: int) -> str:
    number = token - 256
    return SPECIAL_TOKENS[number] if number < len(SPECIAL_TOKENS) else f"<|{token}|>"


class PretrainedTokenizer:
    """A tokenizer of the transformers library, with its own chat template.

    Args:
        name: A local folder, or a name on the Hugging Face hub, which transformers downloads unless it has it.
    """

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise ValueError(
                f"`tokenizer` {name!r} needs transformers. Install it with `pip install 'lightning-hybrid[hf]'`."
            ) from None
        self.name = name
        self._tokenizer: Any = load_pretrained(AutoTokenizer.from_pretrained, name, "tokenizer")
        if self._tokenizer.eos_token_id is None:
            raise ValueError(f"`tokenizer` must have an end of text (`eos_token`). That of {name!r} has none.")
        self.end: int = self._tokenizer.eos_token_id
        padding = self._tokenizer.pad_token_id
        self.pad: int = self.end if padding is None else padding

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        """Returns the text of tokens; `special`: with the names of special tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=not special)

    def special(self, name: str) -> int:
        """Returns a special token."""
        token = self._tokenizer.get_vocab().get(name)
        if token is None:
            raise ValueError(
                f"`tokenizer` {self.name!r} has no token {name!r}. Its special tokens: "
                f"{', '.join(self._tokenizer.all_special_tokens)}."
            )
        return token

    def chat(self, messages: Sequence[Message], answer: bool = False) -> list[int]:
        """Returns the tokens of a conversation; `answer`: with what precedes the next message of the assistant."""
        if self._tokenizer.chat_template is None:
            raise ValueError(
                f"`tokenizer` {self.name!r} has no chat template. Set `chat_template` of the tokenizer, save it with "
                "`save_pretrained(FOLDER)`, and give the folder; or leave `tokenizer` out, for bytes."
            )
        return self._tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=True, add_generation_prompt=answer, return_dict=False
        )


def make_tokenizer(name: str | None) -> Tokenizer:
    """Returns the byte tokenizer for None, or the tokenizer of the transformers library of this name or folder."""
    return ByteTokenizer() if name is None else PretrainedTokenizer(name)
