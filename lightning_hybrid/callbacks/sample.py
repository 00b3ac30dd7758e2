"""`GenerateSample`: prints text from a trained language model when training ends."""

from typing import Protocol, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from torch import Tensor

from lightning_hybrid._lightning_private import Callback
from lightning_hybrid.callbacks.whole_copy import whole_copy


class Generative(Protocol):
    """Interface that :class:`GenerateSample` requires of a module."""

    def generate(
        self, prompt_BT: Tensor, max_new_tokens: int, temperature: float, generator: torch.Generator
    ) -> Tensor:
        """Returns prompts and continuations, of shape ``(B, T + max_new_tokens)``, as byte values."""
        ...


class GenerateSample(Callback):
    """Continues a prompt with the trained byte-level model and prints the text.

    In every layout, rank 0 collects the full weights into a new module, built from the saved hyperparameters on the
    CPU, and generates with it.

    Args:
        prompt: The text to continue.
        max_new_tokens: Bytes to add.
        temperature: Divides the logits: below 1 favors likely bytes, 0 always chooses the likeliest.
        seed: Seed of the sampling.
    """

    def __init__(
        self, prompt: str = "def ", max_new_tokens: int = 400, temperature: float = 0.7, seed: int = 0
    ) -> None:
        if not prompt:
            raise ValueError("`prompt` must have at least one character to continue. Got ''. Use '\\n' for no context.")
        self._prompt = prompt
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a module that can't generate, before it is trained."""
        if not callable(getattr(pl_module, "generate", None)):
            raise TypeError(
                f"`GenerateSample` needs a module with `generate(prompt, max_new_tokens, temperature, generator)`. "
                f"Got {type(pl_module).__name__}. Add the method or remove the callback."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generates and prints the sample on rank 0."""
        module = whole_copy(trainer, pl_module)
        if module is None:
            return
        prompt_BT = torch.tensor([list(self._prompt.encode())])
        generator = torch.Generator().manual_seed(self._seed)
        tokens_BT = cast(Generative, module).generate(prompt_BT, self._max_new_tokens, self._temperature, generator)
        text = bytes(tokens_BT[0].tolist()).decode("utf-8", errors="replace")
        Console().print(Panel(Syntax(text, "python", word_wrap=True), title="Sample", title_align="left"))
