"""Requests that are refused before anything is planned."""

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_hybrid.execute.planning import check_precision
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.layout import Layout


def test_a_loss_scale_is_refused_under_a_pipeline_only():
    scaling: Any = SimpleNamespace(scaler=object(), precision="16-mixed")
    with pytest.raises(
        PartitionError, match="`pp=2`, which cannot scale the loss as `precision='16-mixed'`.*bf16-mixed"
    ):
        check_precision(Layout(pp=2), scaling)
    check_precision(Layout(dp=2), scaling)
    plain: Any = SimpleNamespace(scaler=None, precision="bf16-mixed")
    check_precision(Layout(pp=2), plain)
