"""What is refused before planning."""

from __future__ import annotations

from typing import Any, cast

import pytest
from lightning.pytorch.plugins.precision import (
    DoublePrecision,
    FSDPPrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
    TransformerEnginePrecision,
)

from lightning_hybrid.parallelize.plan import check_precision
from lightning_hybrid.spec.errors import PartitionError


class OfAUser(Precision):
    """A plugin that only follows what Lightning does."""


def test_precisions_that_keep_the_module_as_it_is_are_taken():
    for plugin in (
        Precision(),
        OfAUser(),
        DoublePrecision(),
        HalfPrecision("bf16-true"),
        MixedPrecision("16-mixed", "cpu"),
        MixedPrecision("bf16-mixed", "cpu"),
    ):
        check_precision(plugin)


@pytest.mark.parametrize("kind", [TransformerEnginePrecision, FSDPPrecision])
def test_precisions_that_replace_layers_are_refused(kind):
    plugin: Any = object.__new__(kind)  # its libraries are not installed
    plugin.precision = "transformer-engine"
    with pytest.raises(PartitionError, match=r"`precision='transformer-engine'` .*replaces layers.*'bf16-mixed'"):
        check_precision(cast(Precision, plugin))
