"""`lightning_hybrid.verify` and `lightning-hybrid verify --config`: several layouts against one process."""

from __future__ import annotations

import multiprocessing
from contextlib import nullcontext

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_hybrid import compare_layouts, verify
from lightning_hybrid.cli import main
from tests.distributed.jobs import Classifier, Numbers
from tests.harness import fork_server

SMALL = ["--model.init_args.transformer.width=32", "--model.init_args.transformer.blocks=2"]


def test_layouts_are_compared_with_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """On processes that have imported the modules; the slow tests start new ones, as a user does."""
    warm = fork_server()
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: warm)
    monkeypatch.setattr(compare_layouts, "can_start_again", lambda: True)  # whatever has started pytest
    torch.manual_seed(7)
    module = Classifier()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    report = verify(module, DataLoader(Numbers(), batch_size=8), ["pp2"], steps=2, accelerator="cpu")
    assert report.passed
    assert report.layouts[0].problem is None
    assert "loss and gradients of 20 parameters against one process" in [what for what, _ in report.layouts[0].checks]
    assert "equal" in str(report)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.slow
def test_a_layout_that_is_refused_has_a_problem() -> None:
    report = verify(Classifier(), DataLoader(Numbers(), batch_size=8), ["dp2", "tp3"], accelerator="cpu", max_steps=1)
    equal, refused = report.layouts
    assert equal.problem is None
    assert "tp=3 cannot divide any weight of `Classifier`" in (refused.problem or "")
    assert not report.passed


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "status"), [("dp2", 0), ("tp7", 1)])
def test_the_exit_status_tells(layout: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) if status else nullcontext() as end:
        main(["verify", "--config", "quickstart", "--layout", layout, *SMALL])
    assert end is None or end.value.code == status
    assert layout in capsys.readouterr().out


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="`steps` must be at least 1. Got 0."):
        verify(Classifier(), None, ["dp2"], steps=0)
    with pytest.raises(ValueError, match="`layouts` must name at least one layout"):
        verify(Classifier(), None, [])


def test_further_ranks_of_a_script_compare_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")  # Lightning has started the script again
    report = verify(None, None, ["dp2"])  # type: ignore[arg-type]
    assert report.passed
    assert report.layouts == ()
