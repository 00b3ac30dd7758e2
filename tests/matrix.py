"""Runs a short selection of the tests with several versions of Python and torch: `python -m tests.matrix --help`.

Each combination gets a virtual environment of its own, which is kept for the next call. A Python that is not there is
listed as such. torch from PyPI brings its CUDA libraries: about 5 GB per version on disk.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("python3.10", "python3.11", "python3.12", "python3.13", "python3.14")
TORCHES = ("2.11", "2.12", "2.13", "2.14")
SELECTION = (
    "tests/unit/test_public.py",
    "tests/unit/test_registration.py",
    "tests/unit/spec",
    "tests/unit/ghosts",
    "tests/distributed/zoo",
    "tests/distributed/launch/test_notebook.py",
)
"""Imports, the dry run, every axis on models of the zoo, and processes that are forked."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if all combinations that could be run have passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, metavar="PROGRAM", help="interpreters")
    parser.add_argument("--torches", nargs="+", default=TORCHES, metavar="VERSION", help="versions of torch")
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix", help="of the virtual environments")
    parser.add_argument("--tests", nargs="+", default=SELECTION, metavar="PATH", help="tests to run")
    options = parser.parse_args(arguments)
    rows, failed = ["| Python | torch | result |", "|---|---|---|"], False
    for python in options.pythons:
        version = _version(python)
        for torch in options.torches:
            result = "no such Python here" if version is None else _run(python, torch, options.folder, options.tests)
            failed |= version is not None and ("passed" not in result or "failed" in result)
            rows.append(f"| {version or python} | {torch} | {result} |")
            sys.stdout.write(f"{rows[-1]}\n")
            sys.stdout.flush()
    sys.stdout.write("\n" + "\n".join(rows) + "\n")
    return int(failed)


def _version(python: str) -> str | None:
    """Returns the version of an interpreter, or None if it is not there."""
    if shutil.which(python) is None:
        return None
    command = [python, "-c", "import platform; print(platform.python_version())"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _run(python: str, torch: str, folder: Path, tests: Sequence[str]) -> str:
    """Installs and tests one combination; returns the summary of pytest, or the error of pip."""
    place = folder / f"{Path(python).name}-torch{torch}"
    program = place / "bin/python"
    log = place.with_suffix(place.suffix + ".log")
    folder.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        if not (place / "installed").exists():
            subprocess.run([python, "-m", "venv", "--clear", str(place)], check=True)
            constraints = place / "constraints.txt"
            lines = (ROOT / "constraints.txt").read_text().splitlines()
            constraints.write_text("\n".join([*(line for line in lines if not line.startswith("torch==")), ""]))
            pip = [str(program), "-m", "pip", "install", "--constraint", str(constraints)]
            for wanted in ([f"torch=={torch}.*"], ["--editable", f"{ROOT}[dev]"]):
                if subprocess.run([*pip, *wanted], stdout=output, stderr=subprocess.STDOUT).returncode:
                    return f"pip failed, see {log}"
            (place / "installed").touch()
        # other versions warn of other things; the package itself warns of a torch with which it was not tested
        warned = ["-o", "filterwarnings=default", "--disable-warnings"]
        command = [str(program), "-m", "pytest", "-q", "-m", "not slow", *warned, *tests]
        subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    found = re.findall(r"^=*\s*(\d+ (?:passed|failed).*? in [\d.]+s)", log.read_text(), re.MULTILINE)
    return found[-1] if found else f"pytest failed, see {log}"


if __name__ == "__main__":
    sys.exit(main())
