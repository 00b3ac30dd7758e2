"""Errors of a script: lines of the user, and a line for the frames between."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from lightning_hybrid import Layout, PartitionError
from lightning_hybrid.launch.tracebacks import show_folded
from lightning_hybrid.patching import patched
from lightning_hybrid.spec import layout


def _shown(run: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> list[str]:
    try:
        run()
    except Exception as error:  # noqa: BLE001
        show_folded(type(error), error, error.__traceback__)
    return [line for line in capsys.readouterr().err.splitlines() if "^^^" not in line]


def test_frames_between_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def step() -> None:
        torch.nn.Sequential(torch.nn.Linear(2, 2))(torch.zeros(1, 3))

    lines = _shown(step, capsys)
    assert any("test_tracebacks.py" in line and "in step" in line for line in lines)
    assert sum("frames of Lightning and torch" in line for line in lines) == 1
    assert "in forward" in lines[-3]  # the innermost frame
    assert lines[-1].startswith("RuntimeError: mat1 and mat2")
    assert len(lines) == 9


def test_a_refusal_has_no_line_of_this_package(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _shown(lambda: Layout.parse("dp0"), capsys)
    assert not any("raise ValueError" in line for line in lines)
    assert "at least 1" in lines[-1]


def test_an_error_of_this_package_is_in_full(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with patched(layout, _AXIS_PATTERN=None):
        lines = _shown(lambda: Layout.parse("dp2"), capsys)
    assert not any("frames of Lightning and torch" in line for line in lines)
    assert sum("lightning_hybrid/spec/layout.py" in line for line in lines) >= 1


def test_an_error_of_the_users_code_within_this_package_is_folded(capsys: pytest.CaptureFixture[str]) -> None:
    def users() -> None:
        raise KeyError

    def through() -> None:
        with patched(layout, Layout=None):
            users()

    assert _shown(through, capsys)[-1] == "KeyError"


def test_a_cause_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        try:
            raise ZeroDivisionError("first")
        except ZeroDivisionError as error:
            raise PartitionError("second") from error

    lines = _shown(run, capsys)
    assert lines.index("ZeroDivisionError: first") < lines.index("The error above is the cause of this one:")
    assert lines[-1].endswith("PartitionError: second")
