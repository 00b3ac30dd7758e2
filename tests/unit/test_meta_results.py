"""Shapes of results are computed once for equal calls of an operator."""

from __future__ import annotations

import pytest
import torch

from lightning_hybrid._torch_private import DispatchMode, run_on_meta

aten = torch.ops.aten


class Counted(DispatchMode):
    """Counts the operators that run, apart from those that only make tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


CALLS = [
    (aten.addmm.default, lambda: (meta(7), meta(3, 5), meta(5, 7))),
    (aten.cat.default, lambda: ([meta(2, 3), meta(4, 3)],)),
    (aten.native_layer_norm.default, lambda: (meta(4, 11), [11], meta(11), meta(11), 1e-5)),
    (aten._log_softmax.default, lambda: (meta(4, 9).t(), 1, False)),
    (aten.div.Tensor, lambda: (meta(13, dtype=torch.int64), meta(13, dtype=torch.int64))),
]


@pytest.mark.parametrize(("func", "make"), CALLS)
def test_equal_calls_have_equal_results_and_run_once(func, make) -> None:
    expected = func(*make())
    first = run_on_meta(func, make(), {})
    with Counted() as counted:
        second = run_on_meta(func, make(), {})
    assert func.overloadpacket.__name__ not in counted.names
    results = [r if isinstance(r, tuple) else (r,) for r in (expected, first, second)]
    for made in results[1:]:
        assert [(t.shape, t.stride(), t.dtype) for t in made] == [(t.shape, t.stride(), t.dtype) for t in results[0]]
    assert all(a is not b for a, b in zip(results[1], results[2], strict=True))


def test_other_calls_are_told_apart() -> None:
    for dim, size in ((0, (3,)), (1, (2,)), (True, (2,)), (-2, (3,))):
        assert run_on_meta(aten.sum.dim_IntList, (meta(2, 3), [dim]), {}).shape == size
    assert run_on_meta(aten.sum.dim_IntList, (meta(2, 3), [0], True), {}).shape == (1, 3)
    assert run_on_meta(aten.sum.dim_IntList, (meta(2, 3), [0]), {"dtype": torch.float64}).dtype == torch.float64
    ints = (meta(13, dtype=torch.int64), meta(13, dtype=torch.int64))
    assert run_on_meta(aten.div.Tensor, ints, {}).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert run_on_meta(aten.div.Tensor, ints, {}).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_views_and_writes_are_those_of_the_arguments() -> None:
    value = meta(4, 6)
    for _ in range(2):
        assert run_on_meta(aten.add_.Tensor, (value, value), {}) is value
        assert run_on_meta(aten.view.default, (value, [6, 4]), {})._base is value
        assert run_on_meta(aten.detach.default, (value,), {}).untyped_storage()._cdata == value.untyped_storage()._cdata
