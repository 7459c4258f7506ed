import subprocess
import sys

import pytest

import pydeq
from pydeq.cli import main


def test_info_says_what_runs(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert str(pydeq.kernels()) in out
    for name in ("Python", "platform", "threads"):
        assert f"\n{name}" in out


def test_module_runs_the_command_line():
    result = subprocess.run([sys.executable, "-m", "pydeq", "info"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("pydeq ")


@pytest.mark.parametrize("arguments", [[], ["fly"]])
def test_bad_command_is_refused_with_the_choices(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "info" in capsys.readouterr().err
