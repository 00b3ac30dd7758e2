"""Counts the lines of a session that tell a user nothing: each line has a purpose, and is written once."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.scripts import WarmProcess, run_warm

SCRIPT = Path(__file__).with_name("session_script.py")
TIMEOUT_SECONDS = 120.0
NOISE = 3
"""Lines without a purpose that a session may have."""
PURPOSES = {
    "plan, verification and results": r"[┏┃┡│└┌├]|(dp|fsdp|tp|pp)2\b",
    "size of the model": r"(Trainable|Non-trainable|Total) (estimated )?(model )?params|Modules in|Total FLOPs",
    "progress": r"(Epoch \d+|Validation|Validation DataLoader 0|Testing|Predicting).* \d+/\d+ ",
    "end of a loop": r"`Trainer\.\w+` stopped: `max_\w+=\d+` reached\.",
    "stopping criterion": r"\[rank: 0\] Metric val_loss improved",
    "seed": r"Seed set to 0",
    "checkpoint": r"Restor(ing|ed all) states|Loaded model weights|.*dirpath has changed|.*warnings\.warn\($",
    "start": r"Waiting for rank 1: ",
    "interrupt": r"Detected KeyboardInterrupt",
    "error": r"\[rank\d\]: ",
}


def noise(output: str) -> list[str]:
    """Returns the lines without a purpose, and those that more than one rank has written."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    useless = [line for line in lines if not any(re.match(p, line) for p in PURPOSES.values())]
    once = Counter(line for line in lines if re.match("Seed|Restor|Metric|Detected|.*dirpath", line))
    trainers = 2
    return useless + [line for line, count in once.items() if count >= trainers]


def _run(folder: Path, *command: str) -> tuple[int, list[str], str]:
    """Runs a command on two ranks; returns its exit code, the noise and the output."""
    code, output = run_warm(*command, processes=2, cwd=folder, timeout_seconds=TIMEOUT_SECONDS)
    (folder / "output").unlink()
    return code, noise(output), output


@pytest.mark.parametrize("layout", ["dp2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("fsdp2", "tp2", "pp2"))])
def test_a_session_has_no_noise(layout: str, tmp_path: Path) -> None:
    code, found, output = _run(tmp_path, str(SCRIPT), "session", layout)
    assert code == 0, output
    assert len(found) <= NOISE, found
    for expected in ("Seed set to 0", "Testing", "Predicting", "Metric val_loss improved", "Restored all states"):
        assert expected in output
    # a bar of tqdm writes a line for the epoch, instead of one per refresh
    assert re.findall(r"^Epoch 2: (\d+)/(\d+) \[.*loss=", output, re.MULTILINE) in ([("4", "4")], [("8", "8")])
    assert "\r" not in output.rpartition("Restored all states")[2]


@pytest.mark.parametrize(
    ("name", "layout", "last", "lines"),
    [
        pytest.param("OneLayer", "pp2", "PartitionError: `layout='pp2'`", 5, id="refused"),
        pytest.param("Fails", "fsdp2", "KeyError: 'of the user'", 8, marks=pytest.mark.slow, id="fails"),
        pytest.param("FailsOnOneRank", "dp2", "KeyError: 'of the user'", 8, marks=pytest.mark.slow, id="one rank"),
    ],
)
def test_an_error_ends_with_its_message_and_lines_of_the_user(
    name: str, layout: str, last: str, lines: int, tmp_path: Path
) -> None:
    code, found, output = _run(tmp_path, str(SCRIPT), name, layout)
    shown = [line for line in output.splitlines() if line.startswith("[rank")]
    del shown[1 : next(i for i, line in enumerate(shown) if SCRIPT.name in line)]  # of `run_warm`
    assert code == 1
    assert len(found) <= NOISE, found
    assert any(last in line for line in output.splitlines()[-2:]), output  # another rank may end its bar
    assert len([line for line in shown if "^^^" not in line]) <= lines, output
    assert any("frames of Lightning and torch" in line for line in shown)
    assert f"in {'on_train_batch_start' if 'One' in name else 'training_step'}" in output or name == "OneLayer"


@pytest.mark.slow
def test_an_interrupt_is_written_once(tmp_path: Path) -> None:
    output = tmp_path / "output"
    process = WarmProcess((str(SCRIPT), "Slow", "dp2"), 2, output, tmp_path)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (output.exists() and "verified" in output.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    text = output.read_text()
    assert len(noise(text)) <= NOISE, noise(text)
    assert text.count("Detected KeyboardInterrupt") == 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_the_command_line_has_no_noise(layout: str, tmp_path: Path) -> None:
    (tmp_path / "users_net.py").write_text(SCRIPT.read_text())
    config = {
        "seed_everything": 0,
        "model": "users_net.Net",
        "data": "users_net.Points",
        "trainer": {"strategy": f"hybrid-{layout}", "accelerator": "cpu", "devices": 2, "max_epochs": 2},
    }
    config["trainer"]["log_every_n_steps"] = 2
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = ("-m", "lightning_hybrid.cli")
    code, found, output = _run(tmp_path, *command, "fit", "--config", "run.yaml")
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    for name in ("validate", "test", "predict"):
        again = _run(tmp_path, *command, name, "--config", "run.yaml", "--ckpt_path", str(checkpoint))
        code, found, output = code + again[0], found + again[1], output + again[2]
    assert code == 0, output
    assert len(found) <= NOISE, found
