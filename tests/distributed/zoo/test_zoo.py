"""Every architecture of the zoo under every layout: exact, or refused as the table says; never wrong, crashed or hung.

By default each case runs on two ranks under one axis, in turn; a few cases run under every axis, and the other
schedules and the products of axes run for cases that differ in what they ask of the mechanism. Everything else is
marked slow: `pytest -m slow tests/distributed`, or the same with a table as its result: `python -m tests.zoo.report`.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests import pairwise
from tests.harness import RankGroup
from tests.zoo.cases import CASES
from tests.zoo.expected import expected_refusal
from tests.zoo.reference import NEGLIGIBLE, compare, run_ddp, update_sizes
from tests.zoo.run import SCHEDULES, Combination, References, evaluate

ONE_AXIS = [Combination("dp2"), Combination("fsdp2"), Combination("tp2"), Combination("pp2", "1F1B")]
OTHER_SCHEDULES = [Combination("pp2", schedule) for schedule in SCHEDULES if schedule != "1F1B"]
TWO_AXES = [Combination("dp2-pp2"), Combination("tp2-pp2"), Combination("fsdp2-tp2")]
THREE_AXES = Combination("dp2-tp2-pp2")

EXPERTS = [Combination(layout) for layout in ("ep2", "ep2-pp2", "ep2-tp2", "ep4", "fsdp2-ep2", "dp2-ep2")]

WITH_EXPERTS = ("scheme", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
"""Fused experts: ours and unmodified ones of transformers."""
WITH_EXPERTS_SLOW = ("expert_groups", "olmoe", "qwen2_moe", "granitemoe", "deepseek_v2")
WITHOUT_CUTS = [Combination("dp2"), Combination("fsdp2")]
OTHER_TRANSFORMERS = {
    "mistral", "qwen2", "qwen3", "gemma", "gpt_neox", "gptj", "opt", "bloom", "phi", "phi3", "falcon", "falcon_new",
    "mpt", "stablelm", "olmo2", "cohere", "granite", "roberta", "distilbert", "electra",
}  # fmt: skip
"""Decoders and encoders that differ from those of other cases in what `tp` and `pp` cut, not for `dp` and `fsdp`."""
CUT_ALIKE = {"qwen2", "qwen3", "stablelm", "olmo2", "granite", "gptj", "phi", "mistral", "falcon_new", "roberta"}
"""Of these, units that are cut as those of another case: `llama`, `gpt_neox`, `phi3`, `falcon` and `bert`."""
SHARDED_ALIKE = {
    "mamba", "bert", "albert", "vit", "whisper", "gpt2_lazy", "encoder_norm_first", "unet", "metrics", "deepseek_v3",
}  # fmt: skip
"""Cases whose weights are no other to `dp` and `fsdp` than those of another case."""
OFTEN = {
    ("GPipe", "gpt2"),
    *(("Interleaved1F1B", name) for name in ("llama", "mixtral", "tied")),
    *(("ZBVZeroBubble", name) for name in ("encoder", "losses")),
    *(("DualPipeV", name) for name in ("bert", "t5", "tied")),
    ("dp2-pp2", "tied"),
    ("tp2-pp2", "llama"),
    ("ep2", "gpt_oss"),
    ("ep2-pp2", "mixtral"),
    ("ep2-tp2", "qwen3_moe"),
}
"""Schedules and products that run always, with cases that differ in what each of them changes."""
VALIDATED = {"llama", "gpt2", "bart", "vit", "mlp", "tied", "metrics"}
"""Cases that also validate, before and after the training."""


EVERY_AXIS = {"llama", "resnet", "tied", "scheme"}
"""Cases that run under every axis always: together they have what any other case asks of `dp` and `fsdp`."""
SHOWN_ELSEWHERE = {
    *(("dp2", name) for name in ("t5", "tied")),
    *(("fsdp2", name) for name in ("gpt2", "mlp", "scheme")),
    *(("tp2", name) for name in ("mixtral", "bert", "whisper", "encoder", "resnet", "scheme")),
    *(("pp2", name) for name in ("llama", "phi3", "deepseek_v3", "bart")),
}
"""But for these: the same layout also validates, or steps in `tests/distributed/tensor`, in tests that run always,
or such a test has the kind of architecture: encoder and decoder in `t5`, tied heads in `tied`, and the mixture of
experts with its own optimizer in `test_scheme.py`."""


def _grid() -> Iterator[Any]:
    for combination in [*ONE_AXIS, *OTHER_SCHEDULES, *TWO_AXES]:
        for number, (name, case) in enumerate(CASES.items()):
            slow = (
                case.slow
                or (name not in EVERY_AXIS and combination in ONE_AXIS and combination != ONE_AXIS[number % 4])
                or (combination in ONE_AXIS and (combination.layout, name) in SHOWN_ELSEWHERE)
                or (combination in WITHOUT_CUTS and name in OTHER_TRANSFORMERS | SHARDED_ALIKE)
                or (combination.layout in ("tp2", "pp2") and name in CUT_ALIKE)
                or (combination in OTHER_SCHEDULES and (combination.schedule, name) not in OFTEN)
                or (combination in TWO_AXES and (combination.layout, name) not in OFTEN)
            )
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(name, combination, id=f"{combination}-{name}", marks=marks)
    for combination in EXPERTS:
        for name in (*WITH_EXPERTS, *WITH_EXPERTS_SLOW):
            marks = [] if (combination.layout, name) in OFTEN else [pytest.mark.slow]
            yield pytest.param(name, combination, id=f"{combination}-{name}", marks=marks)
    yield pytest.param("llama", THREE_AXES, id=f"{THREE_AXES}-llama", marks=pytest.mark.slow)


def _validated() -> Iterator[Any]:
    for i, name in enumerate(sorted(VALIDATED)):
        for j, combination in enumerate([*ONE_AXIS, Combination("pp2", "ZBVZeroBubble")]):
            marks = [] if (i + j) % 5 == 0 and name not in ("bart", "vit") else [pytest.mark.slow]
            yield pytest.param(name, combination, id=f"{name}-{combination}", marks=marks)


@pytest.fixture(scope="module")
def references() -> References:
    """Single-process runs, made once a case."""
    return References()


@pytest.fixture
def ranks(combination: Combination, request: pytest.FixtureRequest) -> RankGroup:
    """As many ranks as the layout needs."""
    return request.getfixturevalue(f"ranks{combination.devices}")


@pytest.mark.parametrize(("name", "combination"), list(_grid()))
def test_exact_or_refused(name: str, combination: Combination, ranks: RankGroup, references: References) -> None:
    outcome = evaluate(CASES[name], combination, ranks, references)
    pattern = expected_refusal(name, combination)
    if pattern is not None:
        assert outcome.status == "refused", outcome.detail
        assert re.search(pattern, outcome.detail), outcome.detail
    else:
        assert outcome.status == ("exact" if CASES[name].exact else "trained"), outcome.detail


@pytest.mark.parametrize(("name", "combination"), list(_validated()))
def test_validation_is_exact(name: str, combination: Combination, ranks: RankGroup, references: References) -> None:
    outcome = evaluate(CASES[name], combination, ranks, references, validate=True)
    assert outcome.status == "exact", outcome.detail


@pytest.mark.parametrize("name", ["llama", "mlp"])
def test_comparison_is_fair(name: str, ranks2: RankGroup, references: References) -> None:
    """Lightning's own DDPStrategy passes the comparison of weights and losses."""
    comparison = compare(references.get(CASES[name]), ranks2.call(run_ddp, name, 2), check_metrics=False)
    assert not comparison.problems


@pytest.mark.parametrize("name", ["bert", "mamba", "deepseek_v3", pairwise.slow("whisper")])
def test_comparison_sees_a_small_error(name: str, references: References) -> None:
    """Five percent of the update of any one tensor is noticed, unless the update is zero but for rounding."""
    single = references.get(CASES[name])
    sizes = update_sizes(single)
    medium = statistics.median(sizes.values())
    seen = 0
    for parameter in [parameter for parameter, size in sizes.items() if size > NEGLIGIBLE * medium]:
        update = single.final[parameter] - single.initial[parameter]
        wrong = replace(single, final={**single.final, parameter: single.final[parameter] + 0.05 * update})
        comparison = compare(single, [wrong])
        assert comparison.worst == parameter
        assert comparison.problems
        seen += 1
    assert seen > 0.7 * len(sizes)
