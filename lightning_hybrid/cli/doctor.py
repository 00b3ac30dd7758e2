"""`doctor`: what a run finds on this machine, and what it lacks."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from datetime import timedelta

from lightning_hybrid.cli import machine
from lightning_hybrid.cli.errors import ArgumentParser
from lightning_hybrid.cli.installed import NAME, missing, version

_PACKAGES = (NAME, "torch", "lightning", "torchmetrics", "wandb", "jsonargparse")
_GROUP_SECONDS = 20
"""The longest wait for a process group of this process alone."""


class Report:
    """Sections of lines, and problems."""

    def __init__(self) -> None:
        self.sections: dict[str, dict[str, str]] = {}
        self.problems: list[str] = []

    def __str__(self) -> str:
        lines = []
        for title, entries in self.sections.items():
            width = max(map(len, entries), default=0) + 2
            lines += [title, *(f"  {name:{width}}{text}" for name, text in entries.items()), ""]
        lines += ["problems", *(f"  - {problem}" for problem in self.problems)] if self.problems else ["no problems"]
        return "\n".join(lines) + "\n"


def run(name: str, args: list[str]) -> int:
    """Prints the report; returns 1 if there is a problem."""
    ArgumentParser(
        prog=f"{NAME} {name}",
        description="Prints versions, devices, network and limits of this machine, and what a run lacks here. "
        "The exit status is 1 if there is a problem.",
    ).parse_args(args)
    report = Report()
    _versions(report)
    _devices(report)
    _network(report)
    report.sections["refused here"] = _refused() or {"nothing": ""}
    report.sections["limits"], problems = machine.limits()
    report.problems += problems
    report.sections["variables of launchers"] = machine.launcher_variables() or {"none": ""}
    report.problems += machine.launcher_problems()
    sys.stdout.write(str(report))
    return 1 if report.problems else 0


def _versions(report: Report) -> None:
    versions = {package: version(package) or "not installed" for package in _PACKAGES}
    report.sections["versions"] = {"python": f"{platform.python_version()} on {platform.platform()}"} | versions
    unmet = missing()
    for requirement in unmet.pop(""):
        report.problems.append(
            f"{NAME} needs {requirement}. Install it: `pip install {requirement.partition(' ')[0]}`."
        )
    unmet.pop("dev", None)
    report.sections["extras"] = {
        extra: f"needs {', '.join(needs)}: `pip install '{NAME}[{extra}]'`" if needs else "installed"
        for extra, needs in unmet.items()
    }


def _devices(report: Report) -> None:
    import torch
    import torch.distributed as dist
    from torch.cuda.nccl import version as nccl_version

    memory = machine.memory_bytes()
    of_memory = "" if memory is None else f", {memory / 2**30:.1f} GiB memory"
    section = report.sections["devices"] = {"cpu": f"{machine.cores()} cores{of_memory}"}
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        section[f"cuda:{i}"] = (
            f"{device.name}, {device.total_memory / 2**30:.1f} GiB memory, compute capability {device.major}."
            f"{device.minor}"
        )
    if not torch.cuda.is_available():
        section["cuda"] = (
            f"none; torch is built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU'}"
        )
        if os.path.exists("/dev/nvidia0"):
            report.problems.append(
                "there is an NVIDIA device that torch cannot use. Install a build of torch for the CUDA version of the "
                "driver (`nvidia-smi` shows it), see https://pytorch.org/get-started."
            )
    if not dist.is_available():
        report.problems.append("torch is built without `torch.distributed`. Install another build of torch.")
        return
    nccl = dist.is_nccl_available()
    section["nccl"] = ".".join(map(str, nccl_version())) if nccl else "none; needed for CUDA devices only"
    if torch.cuda.is_available() and not nccl:
        report.problems.append(
            "torch is built without NCCL. Install another build of torch, or use "
            '`HybridStrategy(process_group_backend="gloo")`, which is slower.'
        )
    section["gloo"] = _try_gloo(report) if dist.is_gloo_available() else "none"
    if not dist.is_gloo_available():
        report.problems.append("torch is built without gloo, which runs on CPUs need. Install another build of torch.")


def _refused() -> dict[str, str]:
    """Returns options of a run that need other hardware or software, with what they need."""
    import torch

    refused = {}
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    if capability < (9, 0):
        refused["Float8Precision"] = "needs a GPU of compute capability 9.0 or higher, such as an H100"
    elif version("torchao") is None:
        refused["Float8Precision"] = f"needs torchao: `pip install '{NAME}[fp8]'`"
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        refused["compile=True"] = "needs a C++ compiler, such as g++"
    return refused


def _try_gloo(report: Report) -> str:
    """Makes a process group of this process alone."""
    import torch.distributed as dist

    if dist.is_initialized():
        return "in use"
    try:
        timeout = timedelta(seconds=_GROUP_SECONDS)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)  # type: ignore[attr-defined]
        dist.destroy_process_group()
    except RuntimeError as error:
        why = re.sub(r"^\[.*?\] *", "", str(error).splitlines()[0]).rstrip(". ")  # without the place in C++
        report.problems.append(
            f"gloo cannot connect here: {why}. Set GLOO_SOCKET_IFNAME to an interface: `lo` for runs on this machine "
            "only."
        )
        return "fails"
    return "works"


def _network(report: Report) -> None:
    section = report.sections["network"] = {}
    for name, address in machine.interfaces().items():
        if address is not None:
            local = address.startswith("127.")
            section[name] = f"{address} ({'this machine only' if local else 'for gloo and NCCL between machines'})"
    if not section:
        report.problems.append("there is no interface with an IPv4 address, not even `lo`. Ranks cannot connect.")
