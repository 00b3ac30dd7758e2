"""The values of `HybridMonitor`, from made-up measurements of four ranks."""

from __future__ import annotations

import pytest
import torch

from lightning_hybrid import Layout
from lightning_hybrid._torch_private import has_compiled_parts
from lightning_hybrid.callbacks import HybridMonitor, peak_flops
from lightning_hybrid.callbacks.monitor import count_integers
from lightning_hybrid.callbacks.monitor_values import RankMeasurements, expert_values, values_of
from lightning_hybrid.spec.expert_plan import ExpertPlan
from lightning_hybrid.spec.model import ModelSpec
from lightning_hybrid.spec.plan import Plan


def plan_of(layout: str, **more: object) -> Plan:
    model = ModelSpec(units={}, blocks=(), parameters={}, calls=("a", "b"), costs=(1.0, 3.0), places=(1,))
    return Plan(layout=Layout.parse(layout), model=model, **more)  # type: ignore[arg-type]


def measured(**changes: float) -> RankMeasurements:
    times = {"split_seconds": 2.0, "split_steps": 4.0, "computation": 1.0, "communication": 0.5, "bubble": 0.25}
    counts = {"seconds": 2.0, "steps": 4.0, "samples": 8.0, "tokens": 80.0, "flops": 6e12, "recomputed_flops": 0.0}
    more = {"step_samples": 2.0, "step_tokens": 20.0, "data_wait": 0.0, "peak_bytes": 2**20, "gradient_norm": 3.0}
    return RankMeasurements(**{**times, **counts, **more, **changes})


def test_ranks_of_one_replica_count_the_same_samples_once() -> None:
    plan = plan_of("dp2-pp2", cuts=(1,))
    rows = [[*measured().row(), 1.0, 0.0]] * 2 + [[*measured(peak_bytes=2**21).row(), 0.0, 3.0]] * 2
    values = values_of(rows, plan, 1e13)
    assert values["throughput/samples_per_second"] == 8.0  # two replicas with 8 samples in two seconds
    assert values["throughput/tokens_per_second_per_device"] == 20.0
    assert values["batch/global_samples"] == 4.0
    assert values["throughput/tflops_per_device"] == 3.0
    assert values["throughput/mfu"] == pytest.approx(0.3)
    assert "throughput/hardware_tflops_per_device" not in values
    assert [values[f"memory/peak_mib_rank{r}"] for r in range(4)] == [1, 1, 2, 2]
    assert values["memory/peak_mib"] == 2
    assert values["time/step"] == 0.5
    assert values["time/other"] == pytest.approx(0.0625)
    assert [values["stages/share_1"], values["stages/share_1_predicted"]] == [0.75, 0.75]
    assert [values["bubble/measured"], values["bubble/predicted"]] == [0.125, plan.bubble]


def test_what_is_not_known_is_left_out() -> None:
    values = values_of([RankMeasurements(peak_bytes=1.0).row()], plan_of("dp1"), None)
    assert set(values) == {
        "memory/peak_mib",
        "batch/global_samples",
        *(f"layout/{axis}" for axis in ("pp", "dp", "fsdp", "ep", "tp")),
    }
    unknown = measured(tokens=float("nan"), step_tokens=float("nan"), flops=float("nan"))
    assert not [
        k for k in values_of([unknown.row()], plan_of("dp1"), 1e12) if "tokens" in k or "flops" in k or "mfu" in k
    ]


def test_imbalance_of_experts() -> None:
    experts = ExpertPlan(experts=4, tokens=("args", 0), index=("args", 1), weights=("args", 2), attributes=())
    plan = plan_of("ep2", expert_plans={"a": experts, "b": experts, "unused": experts})
    values = expert_values({"a": [1, 1, 1, 1], "b": [4, 0, 2, 2], "unused": [0, 0, 0, 0]}, plan)
    assert values["experts/max_over_mean"] == 1.5
    assert values["experts/max_over_mean_worst"] == 2.0
    assert values["experts/max_over_mean_of_ranks"] == 1.0
    assert expert_values({}, plan_of("dp1")) == {}


def test_tokens_are_matrices_of_integers() -> None:
    ids = torch.zeros(3, 5, dtype=torch.long)
    assert count_integers({"labels": torch.zeros(3, dtype=torch.long), "input_ids": ids}) == 15
    assert count_integers((torch.zeros(3, 5), torch.zeros(3, dtype=torch.long))) is None


def test_peaks_are_those_without_sparsity(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    names = {"NVIDIA H200": 989.5e12, "NVIDIA H100 NVL": 835.5e12, "NVIDIA A100-SXM4-80GB": 312e12, "Other": None}
    for name, expected in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_, name=name: name)
        assert peak_flops.peak_flops(device, torch.bfloat16) == expected
    assert peak_flops.peak_flops(torch.device("cpu"), torch.bfloat16) is None


@pytest.mark.parametrize("options", [{"tokens": "all"}, {"peak_tflops": 0.0}])
def test_arguments_are_checked(options: dict) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be .* Got"):
        HybridMonitor(**options)


def test_compiled_parts_of_a_module_are_found() -> None:
    layer = torch.nn.Linear(2, 2)
    assert not has_compiled_parts(torch.nn.Sequential(layer))
    assert has_compiled_parts(torch.nn.Sequential(torch.compile(layer, backend="eager")))  # type: ignore[arg-type]
