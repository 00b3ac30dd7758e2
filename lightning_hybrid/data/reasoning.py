"""`ReasoningData`: questions of the package reasoning-gym, whose answers its verifiers check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_hybrid.data.files import needs
from lightning_hybrid.data.sample_data import SampleConfig, SampleData
from lightning_hybrid.data.samples import Sample, Task, completion

Question = Mapping[str, Any]


class ReasoningData(SampleData[Question]):
    """Generated questions with answers, for supervised training.

    A sample is a message of the user with the question, and the answer, which has the loss.

    Args:
        subjects: Names of generators of reasoning-gym, such as `chain_sum`, each with its options.
        count: Questions of each subject. Repeated questions are left out.
        samples: How samples are tokenized, divided and batched. The seed is that of the questions, too.

    Raises:
        ValueError: If reasoning-gym is missing, or does not know a subject or option.
    """

    def __init__(
        self,
        subjects: dict[str, dict[str, Any]],
        count: int = 5000,
        samples: SampleConfig = SampleConfig(),  # noqa: B008 -- frozen
    ) -> None:
        super().__init__(samples)
        if not subjects:
            raise ValueError("`subjects` must have at least one generator of reasoning-gym, such as `chain_sum: {}`.")
        try:
            from reasoning_gym.factory import DATASETS, create_dataset
        except ImportError:
            raise ValueError(f"`subjects` need the package reasoning-gym. {needs('reasoning-gym')}") from None
        self._generators: dict[str, Any] = {}
        for name, options in subjects.items():
            if name not in DATASETS:
                raise ValueError(f"`subjects` must be among {', '.join(sorted(DATASETS))}. Got {name!r}.")
            try:
                self._generators[name] = create_dataset(name, size=count, seed=samples.seed, **options)
            except (TypeError, AssertionError) as error:
                raise ValueError(f"`subjects`: reasoning-gym refuses the options of {name}: {error}.") from None

    def items(self) -> list[Question]:
        """Returns the questions of all subjects, each once."""
        found: dict[str, Question] = {}
        for name, generator in self._generators.items():
            for entry in generator:
                found.setdefault(entry["question"], {**entry, "subject": name})
        return list(found.values())

    def key(self, item: Question) -> str:
        """Returns the question."""
        return item["question"]

    def sample(self, item: Question) -> Sample:
        """Returns question and answer."""
        return completion(self._prompt(item), [*self.tokenizer.encode(str(item["answer"])), self.tokenizer.end])

    def task(self, item: Question) -> Task:
        """Returns the question, with the entry that its verifier needs."""
        return Task(self._prompt(item), str(item["answer"]), item)

    def score(self, tasks: Sequence[Task], answers: Sequence[str]) -> dict[str, float]:
        """Returns the share of right answers over all tasks and for each subject, and the mean score of the verifiers.

        An answer is right if its verifier gives the full score, 1. Many verifiers give a part of it to answers that
        only contain the right one, or to any answer.
        """
        scores: dict[str, list[float]] = {}
        for task, answer in zip(tasks, answers, strict=True):
            subject = task.item["subject"]
            score = float(self._generators[subject].score_answer(answer, task.item))
            scores.setdefault(subject, []).append(score)
        every = [score for values in scores.values() for score in values]
        by_subject = {f"accuracy_{name}": _right(values) for name, values in sorted(scores.items())}
        measures = {"accuracy": _right(every), "score": sum(every) / len(every)}
        return measures | (by_subject if len(by_subject) > 1 else {})

    def _prompt(self, item: Question) -> list[int]:
        return self.tokenizer.chat([{"role": "user", "content": item["question"]}], answer=True)


def _right(scores: Sequence[float]) -> float:
    return sum(score == 1 for score in scores) / len(scores)
