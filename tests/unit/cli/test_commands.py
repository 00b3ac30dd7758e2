"""The list of commands, what they import, and how errors are shown."""

from __future__ import annotations

import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from lightning_hybrid import Layout, PartitionError
from lightning_hybrid.cli import commands, main
from lightning_hybrid.cli.tracebacks import refusal, show
from lightning_hybrid.launch.tracebacks import folded
from tests.scripts import script_environment

ROOT = Path(__file__).parents[3]


def test_help_has_a_line_for_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    for command in commands.COMMANDS:
        assert f"  {command.name} " in text
        assert command.help in text
    assert {c.name for c in commands.COMMANDS} >= {"fit", "verify", "check", "consolidate", "recipes", "doctor"}
    main([])
    assert capsys.readouterr().out == text


def test_a_command_is_one_entry(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    new = commands.Command("again", "list recipes, again", "recipes:run")
    monkeypatch.setattr(commands, "COMMANDS", (*commands.COMMANDS, new))
    main(["--help"])
    assert "  again        list recipes, again\n" in capsys.readouterr().out
    main(["again", "ls"])
    assert "quickstart" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out.startswith("lightning-hybrid 0.")


def _imported(*args: str) -> set[str]:
    """Returns the modules that a command imports."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lightning_hybrid.cli", *args],
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    return {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}


QUICK = ("--help", "--version", "recipes ls", "doctor --help", "check --help", "consolidate --help", "verify --help")


@pytest.mark.parametrize("args", [args.split() for args in QUICK], ids=" ".join)
def test_commands_without_a_model_import_neither_torch_nor_lightning(args: list[str]) -> None:
    imported = _imported(*args)
    assert "lightning_hybrid.cli.commands" in imported
    assert not imported & {"torch", "lightning", "lightning.pytorch", "jsonargparse", "lightning_hybrid.strategy"}


@pytest.mark.slow
def test_the_doctor_imports_torch_alone() -> None:
    imported = _imported("doctor")
    assert "torch" in imported
    assert not imported & {"lightning", "lightning.pytorch", "jsonargparse", "lightning_hybrid.strategy"}


def test_options_may_precede_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--config", str(ROOT / "recipes/quickstart.yaml"), "fit", "--print_config"])
    assert "max_steps: 500" in capsys.readouterr().out


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_one_rank_of_a_machine_reports_wrong_arguments(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for rank, text in ((0, "error: unknown command"), (1, "")):
        monkeypatch.setenv(variable, str(rank))
        with pytest.raises(SystemExit, match="2"):
            main(["fitt"])
        shown = capsys.readouterr().err
        assert shown.startswith(text) if text else not shown


# ---- errors that end a run


def _refused() -> NoReturn:
    raise PartitionError("`layout`: model.py:12 must not do this.\n  Use `dp`.")


def _raised(function) -> Exception:
    try:
        function()
    except Exception as error:  # noqa: BLE001
        return error
    raise AssertionError


def test_a_refused_run_ends_with_its_message_alone(capsys: pytest.CaptureFixture[str]) -> None:
    error = _raised(_refused)
    show(type(error), error, error.__traceback__)
    assert capsys.readouterr().err == "error: `layout`: model.py:12 must not do this. Use `dp`.\n"


def test_the_line_of_the_user_is_added() -> None:
    def users() -> NoReturn:
        raise MisconfigurationException("You cannot do this.")

    line = users.__code__.co_firstlineno + 1
    assert refusal(_raised(users)) == f"You cannot do this ({__file__}:{line})."


def test_only_what_lightning_and_this_package_raise_refuses_a_run() -> None:
    assert refusal(_raised(lambda: [][1])) is None
    assert refusal(_raised(lambda: Layout.parse("dp0"))) is None  # called by code of the user, which this file is
    error = _raised(lambda: Layout.parse("dp0"))
    error = error.with_traceback(error.__traceback__.tb_next.tb_next)  # type: ignore[union-attr]
    assert "at least 1" in str(refusal(error))


def test_frames_of_lightning_are_folded() -> None:
    class Broken:
        def setup(self, *_: object) -> NoReturn:
            raise ZeroDivisionError("of the user")

    def fit() -> None:
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
        trainer.fit(Broken())  # type: ignore[arg-type]

    error = _raised(fit)
    text = "".join(folded(traceback.TracebackException.from_exception(error)))
    plain = "".join(traceback.format_exception(error))
    assert "frames of Lightning and torch\n" in text
    assert text.splitlines()[-1] == plain.splitlines()[-1]
    assert len(text) < len(plain)
    assert "trainer.fit(Broken())" in text
