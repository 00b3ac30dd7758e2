"""Wrong arguments of `HybridStrategy` and of phases: refused where they are given, with the rule and the value."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from lightning_hybrid import HybridStrategy
from lightning_hybrid.callbacks import Phase, PhaseSchedule

WRONG: dict[str, tuple[list[Any], str]] = {
    "layout": ([3, ["dp2"], {"dp": 2}], "must be text such as 'dp2-tp2-pp2', a `Layout`, or the path of a plan"),
    "microbatches": ([0, 2.5, True, "4", None], "must be 'auto' or a whole number of at least 1"),
    "timeout": ([30, "1h", timedelta(seconds=-5), timedelta()], "must be None or a `datetime.timedelta` above 0"),
    "checkpoints": (["x", None, {"trust_pickle": True}], "must be options such as `CheckpointOptions"),
    "tensor_plan": (
        ["colwise", ["a"], {"a": "colwize"}],
        "must (be a mapping|give each module one of colwise, rowwise)",
    ),
    "compile": (["yes", None, 1], "must be True or False"),
    "gradient_sync": ([3, None, "exacct"], "must be one of exact, bf16"),
    "verify": ([None, True, "sometimes", "every 0 steps"], "must be 'start', 'strict', 'off' or 'every N steps'"),
    "process_group_backend": ([3, "mpy", "cpu:gloo,cuda:nothing"], "must be a backend of this build of torch: gloo"),
    "on_nonfinite": ([None, "ignore"], "must be 'raise' or 'skip'"),
    "schedule": ([None, "1f1b"], "must be one of GPipe, 1F1B"),
    "recompute": ([True, "none"], "must be None, 'selective' or 'full'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_at_once(name: str) -> None:
    values, rule = WRONG[name]
    for value in values:
        with pytest.raises(ValueError, match=f"^`{name}` {rule}.* Got "):
            HybridStrategy(**{name: value})


@pytest.mark.parametrize("backend", [None, "gloo", "cpu:gloo"])
def test_backends_that_exist(backend: str | None) -> None:
    HybridStrategy(process_group_backend=backend)


def test_wrong_phases() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"layout": "dd2"}, "unknown axis 'dd'"),
        ({"schedule": "1F2B"}, "`schedule` must be one of"),
        ({"microbatches": 0}, "`microbatches` must be"),
        ({"gradient_sync": "exacct"}, "`gradient_sync` must be one of"),
    ]
    for settings, message in wrong:
        with pytest.raises(ValueError, match=message):
            Phase(**settings)
    with pytest.raises(ValueError, match="`phases` must be a list of `Phase`. Got 'dp2'."):
        PhaseSchedule("dp2")  # type: ignore[arg-type]
