"""Runs the doctests of a function in a process with limits."""

from __future__ import annotations

import ast
import io
import keyword
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator

SECONDS = 5
"""Time limit of the process, of wall-clock and of processor time."""
MEMORY_BYTES = 1 << 30
"""Limit of the address space."""

_RUNNER = f"""
import doctest, io, resource, sys, types
for limit, value in (
    (resource.RLIMIT_CPU, {SECONDS}),
    (resource.RLIMIT_AS, {MEMORY_BYTES}),
    (resource.RLIMIT_FSIZE, 0),
    (resource.RLIMIT_NOFILE, 32),
    (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(limit, (value, value))
name, function = sys.argv[1:]
module = types.ModuleType(name)
sys.modules[name] = module
module.__file__ = name + ".py"
exec(compile(sys.stdin.read(), name + ".py", "exec"), module.__dict__)
value = module
for part in function.split("."):
    value = vars(value)[part]
found = doctest.DocTestFinder(recurse=False).find(value, function, module, vars(module).copy())
runner = doctest.DocTestRunner(verbose=False)
for test in found:
    runner.run(test, out=lambda text: None)
sys.exit(0 if runner.tries and not runner.failures else 1)
"""


def documented_functions(source: str) -> list[tuple[str, tuple[int, int]]]:
    """Returns functions with doctests.

    Args:
        source: Code of a module.

    Returns:
        For each function its name, with those of its classes, and the first and last line of its body after the
        docstring, from 1.
    """
    try:
        return list(_functions(ast.parse(source), ""))
    except SyntaxError:
        return []


def _functions(node: ast.AST, outer: str) -> Iterator[tuple[str, tuple[int, int]]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{outer}{child.name}.")
        elif isinstance(child, ast.FunctionDef) and ">>>" in (ast.get_docstring(child) or "") and len(child.body) > 1:
            yield f"{outer}{child.name}", (child.body[1].lineno, child.body[-1].end_lineno or child.body[-1].lineno)


def tokens_in(source: str, first: int, last: int) -> list[tuple[int, int]]:
    """Returns the places of the names and keywords with two or more characters in lines of a module."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return [
        (starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1])
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.NAME
        and first <= token.start[0] <= last
        and (len(token.string) > 1 or keyword.iskeyword(token.string))
    ]


def passes(source: str, name: str, function: str) -> bool:
    """Returns True if the doctests of a function pass.

    Args:
        source: Code of its module.
        name: Name of the module. Doctests that import it get this code.
        function: Name of the function, with those of its classes.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", _RUNNER, name, function],
                input=source.encode(errors="replace"),
                cwd=folder,
                env={},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0
