"""A plan: its words, its text, and what is refused."""

import warnings

import pytest

from lightning_hybrid import HybridStrategy


@pytest.mark.parametrize(
    ("old", "new"), [("column", "colwise"), ("row", "rowwise"), ("column_gather", "colwise_gather")]
)
def test_renamed_words_of_tensor_plan_still_work(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"`tensor_plan`: '{old}' is now '{new}'") as found:
        strategy = HybridStrategy(layout="tp2", tensor_plan={"*.a": old, "*.b": "replicate", "*.c": old})
    assert strategy.request.tensor_plan == {"*.a": new, "*.b": "replicate", "*.c": new}
    assert [w.filename for w in found] == [__file__]


def test_present_words_of_tensor_plan_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HybridStrategy(layout="tp2", tensor_plan={"*.a": "colwise", "*.b": "rowwise", "*.c": "colwise_gather"})
