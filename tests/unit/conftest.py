"""What several tests of commands have in common."""

from __future__ import annotations

import pytest

from ckptx.cli import main as cli


@pytest.fixture
def run(capsys):
    """Return a function that runs a command in this process."""

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run
