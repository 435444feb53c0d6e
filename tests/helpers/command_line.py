"""The command line, called in this process."""

import pytest

from phitune.cli import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What `phitune evaluate` says of arguments that it has to refuse."""
    capsys.readouterr()
    code = main(["evaluate", *map(str, arguments)])
    said = capsys.readouterr()
    assert code == 2, said.out + said.err
    assert said.out == ""
    return said.err
