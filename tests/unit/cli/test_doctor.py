"""`doctor`: what it prints, and when its status is 1."""

from __future__ import annotations

import os
from importlib import metadata
from types import SimpleNamespace

import pytest

from lightning_hybrid.cli import doctor, installed, machine, main


@pytest.fixture
def _as_in_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.launcher_variables():
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("_as_in_a_shell")
def test_the_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "12345")
    monkeypatch.setattr(machine, "limits", lambda: ({"open files": "20000"}, []))
    main(["doctor"])
    text = capsys.readouterr().out
    for expected in ("python ", "torch ", "cores", "lo ", "127.0.0.1 (this machine only)", "gloo", "works", "12345"):
        assert expected in text
    assert text.endswith("no problems\n")


@pytest.mark.usefixtures("_as_in_a_shell")
def test_problems_have_a_remedy_and_set_the_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit, match="1"):
        main(["doctor"])
    assert "Unset LOCAL_RANK, or start the run with torchrun or srun." in capsys.readouterr().out.splitlines()[-1]


def test_interfaces_that_do_not_exist() -> None:
    assert machine.launcher_problems({"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "^docker"}) == []
    (problem,) = machine.launcher_problems({"GLOO_SOCKET_IFNAME": "nothere0"})
    assert problem.startswith("GLOO_SOCKET_IFNAME is nothere0, which is no interface here. Set it to one of lo")


def test_limits_that_are_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    monkeypatch.setattr(os.path, "isdir", lambda _: True)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_frsize=4096, f_blocks=16384, f_bavail=16384))
    shown, (files, shared) = machine.limits()
    assert shown == {"open files": "256 (at most 4096)", "shared memory": "0.06 GiB, 0.06 GiB free"}
    assert "ulimit -n 16384" in files
    assert "--shm-size=8g" in shared


def test_requirements_that_are_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed.missing()[""] == []
    requires = ["torch>=99", "nosuchpackage>=1", "numpy", 'nosuchextra; extra == "fp8"']
    monkeypatch.setattr(metadata, "requires", lambda _: requires)
    found = installed.missing()
    assert found[""] == [f"torch>=99 (here: {installed.version('torch')})", "nosuchpackage>=1 (here: none)"]
    assert found["fp8"] == ["nosuchextra (here: none)"]
    report = doctor.Report()
    doctor._versions(report)
    assert report.problems[1].endswith("Install it: `pip install nosuchpackage>=1`.")
