"""`AnswerScore`: scores answers of a language model to held-out tasks, before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_hybrid._lightning_private import Callback
from lightning_hybrid.callbacks.whole_copy import whole_copy


class Tasks(Protocol):
    """Interface of data modules for `AnswerScore`."""

    tokenizer: Any
    """Has `end`, a token, and `decode(tokens)`."""

    def tasks(self, count: int) -> Sequence[Any]:
        """Returns tasks, each with `prompt`, tokens, and `expected`, a text."""
        ...

    def score(self, tasks: Sequence[Any], answers: Sequence[str]) -> Mapping[str, float]:
        """Returns measures of the answers by name."""
        ...


class AnswerScore(Callback):
    """Answers tasks of the data module before and after training, logs and prints the measures.

    In every layout rank 0 collects the full weights into a new module on the CPU, and generates with it. This is for
    small models: other ranks wait.

    Args:
        tasks: Number of tasks.
        max_new_tokens: Longest answer, in tokens.
        examples: Number of answers that are printed.
        temperature: Divides the logits before sampling; 0 takes the likeliest token.
        seed: Seed of the sampling.
    """

    def __init__(
        self, tasks: int = 32, max_new_tokens: int = 64, examples: int = 2, temperature: float = 0.0, seed: int = 0
    ) -> None:
        for name, value in (("tasks", tasks), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1. Got {value}.")
        self._count, self._max_new_tokens, self._examples = tasks, max_new_tokens, examples
        self._temperature, self._seed = temperature, seed
        self._before: Mapping[str, float] = {}
        self._tasks: Sequence[Any] = ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a module that cannot answer, or a data module without tasks, before training."""
        data: Any = getattr(trainer, "datamodule", None)
        if not callable(getattr(pl_module, "answer", None)) or not callable(getattr(data, "tasks", None)):
            raise TypeError(
                "`AnswerScore` needs a module with `answer(prompt, max_new_tokens, end, temperature)` and a data "
                f"module with `tasks(count)`. Got {type(pl_module).__name__} and {type(data).__name__}. "
                "Remove the callback."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scores the initial weights."""
        self._before, _ = self._scored(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scores the trained weights; rank 0 prints both, and examples."""
        after, answers = self._scored(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        table = Table("answers", "before", "after", title=f"{len(self._tasks)} held-out tasks", title_justify="left")
        for name, value in after.items():
            table.add_row(name, f"{self._before.get(name, float('nan')):.3f}", f"{value:.3f}")
        data: Any = trainer.datamodule  # type: ignore[attr-defined] -- set by `fit`
        console = Console()
        if after:
            console.print(table)
        for task, answer in zip(self._tasks[: self._examples], answers, strict=False):
            prompt = data.tokenizer.decode(task.prompt, special=True)
            console.print(escape(f"prompt:   {prompt!r}\nanswer:   {answer!r}\nexpected: {task.expected!r}"))

    def _scored(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Mapping[str, float], list[str]]:
        module: Any = whole_copy(trainer, pl_module)
        if module is None:
            return {}, []
        data: Any = trainer.datamodule  # type: ignore[attr-defined] -- set by `fit`
        self._tasks = self._tasks or data.tasks(self._count)
        options = {"max_new_tokens": self._max_new_tokens, "end": data.tokenizer.end, "temperature": self._temperature}
        with isolate_rng():
            torch.manual_seed(self._seed)
            answers = [data.tokenizer.decode(module.answer(task.prompt, **options)) for task in self._tasks]
        measures = data.score(self._tasks, answers)
        for logger in trainer.loggers:
            logger.log_metrics(dict(measures), step=trainer.global_step)
        return measures, answers
