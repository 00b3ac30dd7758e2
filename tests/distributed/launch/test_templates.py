"""The templates of docs/launch.md, each run on this machine with what its launcher would set."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import yaml

from lightning_hybrid import data, models
from lightning_hybrid.checkpoint.consolidate import consolidate
from tests.documents import ROOT, commands, write_files
from tests.harness import free_port
from tests.scripts import script_environment

PAGE = ROOT / "docs/launch.md"
RAY = os.environ.get("RAY_PYTHON", sys.executable)
"""A Python with Ray and this package's requirements: Ray is no requirement of the tests."""
SECONDS = 240
pytestmark = pytest.mark.timeout(2 * SECONDS)

CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "model": {
        "class_path": "lightning_hybrid.models.CausalLM",
        "init_args": {"transformer": {"width": 32, "blocks": 2, "heads": 2}},
    },
    "data": {
        "class_path": "lightning_hybrid.data.StdlibText",
        "init_args": {"batch_size": 4, "context_length": 32, "evaluation_windows": 4},
    },
    "trainer": {
        "strategy": "hybrid-pp2",
        "accelerator": "cpu",
        "max_steps": 4,
        "logger": False,
        "enable_progress_bar": False,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": "saved", "every_n_train_steps": 2, "filename": "{step}"},
            },
            {
                "class_path": "lightning.pytorch.callbacks.OnExceptionCheckpoint",
                "init_args": {"dirpath": "saved", "filename": "stopped"},
            },
        ],
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the templates, a configuration and an environment that has the programs of this one."""
    write_files(PAGE, tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    activate = tmp_path / ".venv/bin/activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
    return tmp_path


def _start(command: Sequence[str], folder: Path, **environment: str) -> subprocess.Popen:
    path = f"{folder}/programs:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        command,
        cwd=folder,
        env=script_environment() | {"PATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _output(process: subprocess.Popen) -> str:
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(process.communicate()[0]) from None
    return output


def _steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "saved").iterdir())


# ---- torchrun


@pytest.mark.slow
def test_torchrun_on_two_nodes(folder: Path) -> None:
    (command,) = (c for c in commands(PAGE) if c.startswith("torchrun"))
    command = command.replace("node1:29500", f"localhost:{free_port()}").replace("recipes/quickstart.yaml", "run.yaml")
    words = [*shlex.split(command), "--trainer.strategy=hybrid-dp2-pp2"]
    nodes = [_start(words, folder), _start(words, folder)]
    for output, node in [(_output(node), node) for node in nodes]:
        assert node.returncode == 0, output
    assert _steps(folder) == ["step=4.ckpt"]


@pytest.mark.slow
def test_wrong_arguments_are_reported_by_one_rank(folder: Path) -> None:
    wrong = ("--standalone", "--nproc-per-node=2", "--no-python", "lightning-hybrid", "fit", "--confg=run.yaml")
    process = _start(["torchrun", *wrong], folder)
    output = _output(process)
    assert process.returncode
    assert output.count("error: ") == 1, output
    assert "unknown option `--confg`" in output


# ---- SLURM


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((rank = 0; rank < SLURM_NTASKS_PER_NODE; rank++)); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 "$@" &
    echo $! >> pids
done
while ! wait -n; do exit 1; done
wait
"""
SLURM = {
    "SLURM_NNODES": "1",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_JOB_NAME": "hybrid",
    "SLURM_NODELIST": "127.0.0.1",
}


def _sbatch(folder: Path) -> subprocess.Popen:
    srun = folder / "programs/srun"
    srun.parent.mkdir(exist_ok=True)
    srun.write_text(SRUN)
    srun.chmod(0o755)
    return _start(["bash", "train.sbatch"], folder, **SLURM, SLURM_JOB_ID=str(10000 + free_port() % 9999))


def test_the_batch_script_is_bash(folder: Path) -> None:
    subprocess.run(["bash", "-n", "train.sbatch"], cwd=folder, check=True)
    options = re.findall(r"^#SBATCH --([\w-]+)", (folder / "train.sbatch").read_text(), re.MULTILINE)
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "signal"} <= set(options)


@pytest.mark.slow
def test_sbatch(folder: Path) -> None:
    process = _sbatch(folder)
    output = _output(process)
    assert process.returncode == 0, output
    assert _steps(folder) == ["step=4.ckpt"]


@pytest.mark.slow
def test_a_job_is_stopped_and_resumed(folder: Path) -> None:
    endless = CONFIG | {"trainer": CONFIG["trainer"] | {"max_steps": 100000}}
    (folder / "run.yaml").write_text(yaml.safe_dump(endless))
    process = _sbatch(folder)
    deadline = time.monotonic() + SECONDS
    while not (folder / "saved").exists() or not _steps(folder):
        assert time.monotonic() < deadline
        assert process.poll() is None, _output(process)
        time.sleep(0.1)
    for pid in (folder / "pids").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    output = _output(process)
    assert "stopped.ckpt" in _steps(folder), output
    consolidate(folder / "saved/stopped.ckpt", folder / "stopped.ckpt")
    reached = torch.load(folder / "stopped.ckpt", weights_only=True)["global_step"]
    longer = CONFIG | {"trainer": CONFIG["trainer"] | {"max_steps": reached + 2}}
    (folder / "run.yaml").write_text(yaml.safe_dump(longer))
    process = _sbatch(folder)
    output = _output(process)
    assert process.returncode == 0, output
    assert "stopped.ckpt" in output


# ---- Kubernetes


def test_the_pytorchjob_is_consistent(folder: Path) -> None:
    replicas = yaml.safe_load((folder / "pytorchjob.yaml").read_text())["spec"]["pytorchReplicaSpecs"]
    options = dict(word[2:].split("=") for word in _command(replicas) if "=" in word)
    assert int(options["nnodes"]) == sum(role["replicas"] for role in replicas.values())
    assert options["nnodes"] == options["trainer.num_nodes"]
    assert options["nproc-per-node"] == options["trainer.devices"]
    (container,) = replicas["Worker"]["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(options["nproc-per-node"])
    names = {volume["name"] for volume in replicas["Worker"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names


def _command(replicas: Mapping[str, Any]) -> list[str]:
    (container,) = replicas["Master"]["template"]["spec"]["containers"]
    return container["command"]


@pytest.mark.slow
def test_the_command_of_a_pod(folder: Path) -> None:
    """As one node with two ranks; Kubernetes puts variables in place of `$(NAME)`."""
    replicas = yaml.safe_load((folder / "pytorchjob.yaml").read_text())["spec"]["pytorchReplicaSpecs"]
    operator = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    changes = {"nnodes": "1", "nproc-per-node": "2", "num_nodes": "1", "devices": "2", "config": "run.yaml"}
    words = []
    for word in _command(replicas):
        word = re.sub(r"\$\((\w+)\)", lambda name: operator[name[1]], word)
        name, _, _ = word.partition("=")
        change = changes.get(name.removeprefix("--").removeprefix("trainer."))
        words.append(word if change is None else f"{name}={change}")
    process = _start(words, folder, **operator)
    output = _output(process)
    assert process.returncode == 0, output
    assert _steps(folder) == ["step=4.ckpt"]


# ---- Docker


def test_the_dockerfile_copies_what_the_package_needs(tmp_path: Path) -> None:
    """Its files alone make the wheel, and .dockerignore lets them through."""
    copied = re.findall(r"^COPY (.+) (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    allowed = re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    names = [name for sources, _ in copied for name in sources.split()]
    assert sorted(names) == sorted(allowed)
    for sources, target in copied:
        for name in sources.split():
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, tmp_path / target)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True, timeout=100)
    assert list((tmp_path / "dist").glob("*.whl"))


# ---- Ray Train


@pytest.mark.slow
def test_two_ray_workers_equal_one_process(folder: Path) -> None:
    if subprocess.run([RAY, "-c", "import ray.train.torch"], capture_output=True).returncode:
        pytest.skip("Ray is not installed; RAY_PYTHON names a Python that has it, and what this package requires")
    script = folder / "train_ray.py"
    script.write_text(script.read_text().replace("/tmp/ray-hybrid", str(folder / "out")))
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "PATH": os.environ["PATH"]}
    process = _start([RAY, script.name], folder, **environment)
    output = _output(process)
    assert process.returncode == 0, output
    (saved,) = (folder / "out").rglob("*.ckpt")
    consolidate(saved, folder / "ray.ckpt")

    L.seed_everything(0)
    model = models.CausalLM(models.TransformerConfig(blocks=2, width=32, heads=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=4, **options)
    trainer.fit(model, data.StdlibText(batch_size=4, context_length=32))
    weights = torch.load(folder / "ray.ckpt", weights_only=True)["state_dict"]
    assert list(weights) == list(before)
    trained = model.state_dict()
    assert any(not torch.equal(before[name], weight) for name, weight in trained.items())
    for name, weight in trained.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-6)
