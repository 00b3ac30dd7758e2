"""The script of the matrix lists what it could not test."""

import pytest

from tests.matrix import main


def test_a_python_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--pythons", "python9.99", "--torches", "2.13", "2.14"]) == 0
    table = capsys.readouterr().out.split("\n\n")[1]
    assert table.splitlines()[2:] == [
        "| python9.99 | 2.13 | no such Python here |",
        "| python9.99 | 2.14 | no such Python here |",
    ]
