"""What other tools' searches for a batch size find, and how they fail: `python -m tests.benchmarks.batch_size_finders`.

Each case runs in processes of its own, on CPU with gloo. Out of memory is injected: a network of two layers raises
`torch.OutOfMemoryError("CUDA out of memory.")` half-way through its forward pass when a rank has more samples than its
limit. Every cell but those of the last row is what happened, read from what the ranks wrote down, or says that the tool
has no such layout. Where no rank has done anything for a minute, the search is stopped with all its processes, and that
is the result. An autotuner that launches each trial anew is silent for longer and has a time-out of its own.

`--python PATH` names an interpreter that has the tools that are not in this environment.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks import batch_size_tools
from tests.benchmarks.batch_size_probe import JOB, READY, Job

ROOT = Path(__file__).parents[2]
ERROR_CHARACTERS = 75
"""Of an error's text in a cell."""
START_SECONDS = 240.0
"""For a tool's imports, on a machine that others use too."""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A column."""

    title: str
    function: str
    """In `batch_size_tools`."""
    package: str
    """That its version is read from."""
    installed_here: bool = False
    layouts: tuple[str, ...]
    """That it offers."""
    offline: bool = False
    """Starts processes of its own for each size, and is given `--offline-timeout`."""
    mid_training: str
    """From its documentation or source, not measured."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row."""

    title: str
    layout: str
    limits: tuple[int, ...]
    maximum: int
    compares_state: bool = False
    """Asks not for the size but whether the next step is that of a run without a search."""


TOOLS = (
    Tool(
        title="`AdaptiveBatchSize(memory=...)`",
        function="ours",
        package="lightning-hybrid",
        installed_here=True,
        layouts=("one", "ddp", "fsdp2", "pipeline"),
        mid_training="the global batch follows the noise scale; microbatches are halved when memory runs short",
    ),
    Tool(
        title="Lightning `BatchSizeFinder`, power (default)",
        function="lightning_power",
        package="lightning",
        installed_here=True,
        layouts=("one", "ddp", "fsdp2"),
        mid_training="search can be called at epoch starts; its trials then run zero batches (issue 21903)",
    ),
    Tool(
        title="Lightning `BatchSizeFinder`, binsearch",
        function="lightning_binsearch",
        package="lightning",
        installed_here=True,
        layouts=("one", "ddp", "fsdp2"),
        mid_training="as for power",
    ),
    Tool(
        title="accelerate `find_executable_batch_size`",
        function="accelerate",
        package="accelerate",
        layouts=("one", "ddp", "fsdp2"),
        mid_training="none: out of memory starts the function again from its beginning",
    ),
    Tool(
        title='Composer `device_train_microbatch_size="auto"`',
        function="composer",
        package="mosaicml",
        layouts=("one", "ddp", "fsdp2", "sharded"),
        mid_training="halves the microbatch at any step that runs out of memory; never grows; batch size stays",
    ),
    Tool(
        title="DeepSpeed autotuner, fast",
        function="deepspeed",
        package="deepspeed",
        layouts=("one", "ddp", "sharded", "pipeline"),
        offline=True,
        mid_training="none: offline, each trial is a new launch",
    ),
)

_ONE = Case(title="1. one process, limit 37", layout="one", limits=(37,), maximum=128)
_TWO = {"limits": (37, 300), "maximum": 512}
CASES = (
    _ONE,
    Case(title="2a. one process, limit 12, maximum 32", layout="one", limits=(12,), maximum=32),
    Case(title="2b. one process, limit 20, maximum 32", layout="one", limits=(20,), maximum=32),
    Case(title="3. two ranks, DDP, limits 37 and 300", layout="ddp", **_TWO),
    Case(title="4a. two ranks, FSDP2, limits 37 and 300", layout="fsdp2", **_TWO),
    Case(title="4b. two ranks, FSDP1 or ZeRO 3, limits 37 and 300", layout="sharded", **_TWO),
    Case(title="5. two stages of a pipeline, limits 37 and 300", layout="pipeline", **_TWO),
    Case(title="6. after the search of case 1", layout="one", limits=(37,), maximum=128, compares_state=True),
)
MISSING = {"fsdp2": "no FSDP2", "sharded": "not run, see FSDP2", "pipeline": "not offered"}
"""Where a tool does not offer the layout."""
NOTES = (
    "`never tried`: on some rank, no trial of the search that fit was as large as the size that it answers with.",
    "A microbatch of `AdaptiveBatchSize` divides the global batch, here of 32, 128 or 512 samples per replica.",
    "DeepSpeed chooses by throughput among sizes that fit, not the largest; the answer may change from run to run.",
    "Composer accepts `auto` on a GPU only; here its device is a subclass of both its CPU and its GPU device.",
    "accelerate ignores its FSDP plugin on a CPU, so `fully_shard` is called by hand inside the decorated function.",
    "Case 6: state before the first step of the training, and weights after it, beside a run without a search.",
)
"""Printed under the table."""


# ---- processes


@dataclass(frozen=True)
class Outcome:
    """What the ranks wrote down."""

    ranks: list[list[dict[str, Any]]]
    stopped: bool
    """Before the search had ended by itself."""
    seconds: float
    time_limit_seconds: float

    def values(self, rank: int, event: str, value: str) -> list[Any]:
        """Of all such events of a rank."""
        return [line[value] for line in self.ranks[rank] if line["event"] == event]

    def search(self, rank: int) -> list[dict[str, Any]]:
        """Of a rank, what came before the answer."""
        lines = self.ranks[rank]
        return lines[: next((i for i, line in enumerate(lines) if line["event"] == "found"), len(lines))]

    def fit(self, rank: int) -> list[dict[str, Any]]:
        """Of a rank, what came after the answer."""
        return self.ranks[rank][len(self.search(rank)) :]


@dataclass(frozen=True)
class Bench:
    """How cases are run."""

    python: str
    timeout_seconds: float
    offline_timeout_seconds: float

    def interpreter(self, tool: Tool) -> str:
        """That has the tool."""
        return sys.executable if tool.installed_here else self.python

    @functools.cache  # noqa: B019 -- one bench lives as long as the program
    def run(self, tool: Tool, layout: str, limits: tuple[int, ...], maximum: int, size: int | None) -> Outcome:
        """Starts the processes, waits for them and stops what is left; with `size`, trains without a search."""
        with tempfile.TemporaryDirectory() as folder:
            job = Job(tool=tool.function, layout=layout, limits=limits, maximum=maximum, size=size, folder=folder)
            files = [Path(folder) / f"rank{rank}.jsonl" for rank in range(len(limits))]
            limit = self.offline_timeout_seconds if tool.offline else self.timeout_seconds
            processes, start = self._start(tool, job), time.monotonic()
            try:
                running = _wait(processes, files, limit, START_SECONDS if not tool.offline else limit)
            finally:
                for process in processes:
                    _stop(process)
            seconds = time.monotonic() - start
            lines = [file.read_text().splitlines() if file.exists() else [] for file in files]
        print(f"{tool.title}, {layout}, {limits}: {seconds:.0f} s", file=sys.stderr, flush=True)
        return Outcome([[json.loads(x) for x in rank] for rank in lines], running, seconds, limit)

    def _start(self, tool: Tool, job: Job) -> list[subprocess.Popen[bytes]]:
        shared = {
            **os.environ,
            JOB: json.dumps(asdict(job)),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        ranks = len(job.limits)
        each: list[dict[str, str]] = [{}]
        if ranks > 1 and not tool.offline:
            world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
            each = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        command = [self.interpreter(tool), batch_size_tools.__file__]
        null = subprocess.DEVNULL
        return [
            subprocess.Popen(command, env={**shared, **own}, stdout=null, stderr=null, start_new_session=True)
            for own in each
        ]

    def version(self, tool: Tool) -> str:
        """Of the tool's package, the torch that it asks for and the torch that it got."""
        code = (
            "from importlib.metadata import requires, version; import sys; name = sys.argv[1]; "
            "pins = [r for r in requires(name) or () if r.startswith('torch') and r[5:6] in '<>=! ' and ';' not in r]; "
            "print(name, version(name), f'(asks for {pins[0]})' if pins else '', 'with torch', version('torch'))"
        )
        command = [self.interpreter(tool), "-c", code, tool.package]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return " ".join(result.stdout.split()) or f"{tool.package}: not installed"


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], files: Sequence[Path], limit: float, start_limit: float
) -> bool:
    """Until all have ended, or no rank has written anything for too long; True in this second case."""
    size, news, start_ends = -1, 0.0, time.monotonic() + start_limit
    while any(process.poll() is None for process in processes):
        time.sleep(0.2)
        texts = [file.read_text() if file.exists() else "" for file in files]
        if sum(map(len, texts)) != size:
            size, news = sum(map(len, texts)), time.monotonic()
        started = all(READY in text for text in texts)
        if time.monotonic() > (news + limit if started else max(start_ends, news + limit)):
            return True
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all that it started, which are in its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# ---- cells


def cell(bench: Bench, tool: Tool, case: Case) -> str:
    """What happened, in a few words."""
    if case.layout not in tool.layouts:
        return MISSING[case.layout]
    searched = bench.run(tool, case.layout, case.limits, case.maximum, None)
    if case.compares_state:
        return _state_cell(bench, tool, case, searched)
    text = _size_cell(searched, case)
    return f"{text}; {searched.seconds / 60:.1f} min" if tool.offline and not searched.stopped else text


def _size_cell(outcome: Outcome, case: Case) -> str:
    ranks = range(len(case.limits))
    sizes = [size for rank in ranks for size in outcome.values(rank, "found", "size")]
    if len(sizes) < len(ranks) and not outcome.stopped:
        return _errors(outcome, case).removeprefix("; ") or "ends without an answer"
    if len(sizes) < len(ranks):
        last = [(outcome.values(rank, "try", "size") or ["none"])[-1] for rank in ranks]
        text = f"hangs: no answer within {outcome.time_limit_seconds:.0f} s"
        return f"{text} (last tried: {' and '.join(map(str, last))}){_errors(outcome, case)}"
    text = str(sizes[0])
    if len(set(sizes)) > 1:
        text = f"{' and '.join(map(str, sizes))}, silently"
    tried = [{line["size"] for line in outcome.search(rank) if line["event"] == "try"} for rank in ranks]
    if all(size & (size - 1) == 0 for rank in tried for size in rank) and sizes[0] < min(case.limits):
        text += " (powers of two)"
    fitted = [
        max((x["size"] for x in outcome.search(r) if x["event"] == "try" and x["fits"]), default=0) for r in ranks
    ]
    untried = any(sizes[rank] > fitted[rank] for rank in ranks)
    text += ", never tried" if untried else ""
    if all(any(line["event"] == "done" for line in outcome.fit(rank)) for rank in ranks):
        return f"{text}, fit runs"
    return f"{text}; fit hangs" if outcome.stopped else f"{text}{_errors(outcome, case, after=True)}"


def _errors(outcome: Outcome, case: Case, *, after: bool = False) -> str:
    """Each different error once, with its first words. The errors of a search's trials are not its own."""
    found = []
    for rank in range(len(case.limits)):
        lines = outcome.fit(rank) if after else outcome.ranks[rank]
        texts = [f"{line['kind']}: {line['text']}" for line in lines[-1:] if line["event"] == "error"]
        found += [text for text in texts if text not in found]
    words = [" ".join(text.split()).replace("|", "/") for text in found]
    short = [w if len(w) <= ERROR_CHARACTERS else f"{w[:ERROR_CHARACTERS].rsplit(' ', 1)[0]} ..." for w in words]
    return "".join(f"; {'fit ' if after else ''}raises {text}" for text in short)


def _state_cell(bench: Bench, tool: Tool, case: Case, searched: Outcome) -> str:
    sizes = searched.values(0, "found", "size")
    if not sizes:
        return "no answer to compare"
    plain = bench.run(tool, case.layout, case.limits, case.maximum, sizes[0])
    states = [_state(searched.fit(0)) or _state(searched.ranks[0]), _state(plain.ranks[0])]
    if not states[0] or states[0].keys() != states[1].keys():
        return "a run does not reach its first step"
    same = [name for name in states[0] if states[0][name] == states[1][name]]
    other = [name for name in states[0] if name not in same]
    return "; ".join(f"{word}: {', '.join(names)}" for word, names in (("same", same), ("differ", other)) if names)


def _state(lines: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Before the first step of the training and, by `next step`, after it."""
    return {k: v for line in lines if line["event"] == "state" for k, v in line.items() if k != "event"}


# ---- table


def table(tools: Sequence[Tool], cells: Sequence[Sequence[str]]) -> str:
    """A row for each case and one from documentation.

    Args:
        tools: Columns.
        cells: By tool, then by case.
    """
    rows = [["case", *(tool.title for tool in tools)], ["---"] * (len(tools) + 1)]
    rows += [[case.title, *(column[i] for column in cells)] for i, case in enumerate(CASES)]
    rows.append(["adapts during training (documented, not measured)", *(tool.mid_training for tool in tools)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def report(bench: Bench, tools: Sequence[Tool], cells: Sequence[Sequence[str]]) -> str:
    """The table with what it was measured by."""
    versions = dict.fromkeys(bench.version(tool) for tool in tools)
    command = f"python -m tests.benchmarks.batch_size_finders {shlex.join(sys.argv[1:])}".strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return "\n\n".join(
        (
            table(tools, cells),
            "\n".join(f"- {note}" for note in NOTES),
            "Versions: " + "; ".join(versions) + f". Python {platform.python_version()}.",
            f"Command: `{command}`",
            f"Hardware: {cores} CPU cores, {platform.machine()}, no accelerator; gloo, one thread a rank.",
        )
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all cases and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [tool.function for tool in TOOLS]
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the other tools")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the tools")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for which all ranks may be silent")
    parser.add_argument("--offline-timeout", type=float, default=600.0, help="for tools that launch each trial")
    parser.add_argument("--jobs", type=int, default=1, help="searches at the same time")
    parser.add_argument("--output", type=Path, help="file for the table")
    options = parser.parse_args(arguments)
    bench = Bench(options.python, options.timeout, options.offline_timeout)
    tools = [tool for tool in TOOLS if tool.function in options.only]

    with ThreadPoolExecutor(options.jobs) as pool:
        offered = [(tool, case) for tool in tools for case in CASES if case.layout in tool.layouts]
        keys = dict.fromkeys((tool, case.layout, case.limits, case.maximum, None) for tool, case in offered)
        list(pool.map(lambda key: bench.run(*key), keys))
    cells = [[cell(bench, tool, case) for case in CASES] for tool in tools]
    text = report(bench, tools, cells)
    print(text)
    if options.output:
        options.output.write_text(f"{text}\n")


if __name__ == "__main__":
    main()
