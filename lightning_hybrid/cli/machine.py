"""What this machine has: interfaces of the network, limits of a process, memory, variables of a launcher."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Mapping

_VARIABLES = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
    *("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "KUBERNETES_SERVICE_HOST", "RAY_ADDRESS", "PL_GLOBAL_SEED"),
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG"),
)
"""Variables of launchers and of communication that change a run."""
_SIOCGIFADDR = 0x8915
"""Request of Linux for the IPv4 address of an interface (`man 7 netdevice`)."""
_FEWEST_FILES = 1024
"""The default of Linux; each rank has connections to others, and each worker of a data loader has pipes."""
_SMALLEST_SHARED_MEMORY_BYTES = 64 * 2**20
"""The default of Docker, which batches of data loader workers exceed."""


def interfaces() -> dict[str, str | None]:
    """Returns the interfaces of the network with their IPv4 addresses; None: without one, or unknown."""
    return {name: _address(name) for _, name in socket.if_nameindex()}


def _address(interface: str) -> str | None:
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as request:
            packed = fcntl.ioctl(request.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(packed[20:24])
    except (ImportError, OSError):
        return None


def launcher_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns the variables of launchers and of communication that are set."""
    return {name: environment[name] for name in _VARIABLES if name in environment}


def launcher_problems(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Returns what is wrong with variables of launchers, each with a remedy."""
    problems = []
    if "LOCAL_RANK" in environment and "MASTER_PORT" not in environment:
        problems.append(
            "LOCAL_RANK is set without MASTER_PORT: Lightning starts no processes, and waits for others that choose "
            "another port. Unset LOCAL_RANK, or start the run with torchrun or srun."
        )
    known = interfaces()
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = environment.get(name, "").lstrip("=").split(",")[0]
        if wanted and not wanted.startswith("^") and not any(interface.startswith(wanted) for interface in known):
            problems.append(f"{name} is {wanted}, which is no interface here. Set it to one of {', '.join(known)}.")
    return problems


def limits() -> tuple[dict[str, str], list[str]]:
    """Returns the limits of a process as text, and those that are too small, each with a remedy."""
    shown, problems = {}, []
    with contextlib.suppress(ImportError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        shown["open files"] = f"{soft} (at most {hard})"
        if 0 <= soft < _FEWEST_FILES:
            problems.append(
                f"a process may open {soft} files, which ranks and workers of data loaders exceed. Run "
                f"`ulimit -n {_FEWEST_FILES * 16}` before the run."
            )
    if os.path.isdir("/dev/shm"):
        space = os.statvfs("/dev/shm")
        total = space.f_frsize * space.f_blocks
        shown["shared memory"] = f"{total / 2**30:.2f} GiB, {space.f_frsize * space.f_bavail / 2**30:.2f} GiB free"
        if total <= _SMALLEST_SHARED_MEMORY_BYTES:
            problems.append(
                f"/dev/shm has {total / 2**20:.0f} MiB, which workers of data loaders exceed. Start the container with "
                "`--shm-size=8g`, or set `num_workers=0`."
            )
    return shown, problems


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Returns the memory of this machine, or None if it is unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
