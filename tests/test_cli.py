import re
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


PROBLEM = "def problem():\n    import torch\n    return lambda z: 0.5 * z + 1.0, torch.zeros(2, 3)\n"


@pytest.mark.parametrize("command", [["info"], ["diagnose", "made:problem"]])
def test_a_reader_that_ends_early_ends_the_command(command, tmp_path):
    (tmp_path / "made.py").write_text(PROBLEM)
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "pydeq", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    )
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 1
    assert "Error" not in error
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [[], ["fly"]])
def test_bad_command_is_refused_with_the_choices(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "info" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"pydeq {pydeq.__version__}\n"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("wrong_shape", r".*layers_that_fail\.py, line 3: RuntimeError: mat1 and mat2 shapes cannot be multiplied .*"),
        ("other_shape", r"fn must return the shape of z0, .*"),
        ("few_arguments", r"fn was called with z and 0 of context: .*"),
        ("integers", r".*int64.*"),
        ("fails", r".*layers_that_fail\.py, line 8: KeyError: 'missing'"),
    ],
)
def test_a_layer_that_fails_is_told_in_one_line(target, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "layers_that_fail.py").write_text(
        "import torch\n"
        "linear = torch.nn.Linear(4, 4)\n"
        "wrong_shape = (lambda z: linear(z), torch.zeros(2, 5))\n"
        "other_shape = (lambda z: z[:, :1], torch.zeros(2, 5))\n"
        "few_arguments = (lambda z, x: z + x, torch.zeros(2, 5))\n"
        "integers = (torch.cos, torch.zeros(2, 5, dtype=torch.int64))\n"
        "def fails():\n"
        "    return {}['missing']\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "layers_that_fail", raising=False)
    assert main(["diagnose", f"layers_that_fail:{target}"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert re.fullmatch(f"pydeq diagnose: {message}\n", err), err


def test_diagnose(tmp_path, monkeypatch, capsys):
    (tmp_path / "layers_to_diagnose.py").write_text(
        "import torch\n"
        "import pydeq\n"
        "def slow():\n"
        "    return pydeq.DEQ(lambda z, x: 0.9 * z.roll(1, 1) + x, max_steps=2), torch.zeros(2, 5), torch.ones(2, 5)\n"
        "fine = (torch.cos, torch.zeros(3, 2))\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["diagnose", "layers_to_diagnose:slow", "--max-steps", "50"]) == 1
    out = capsys.readouterr().out
    assert "0 of 2 samples converge with the layer's settings" in out
    assert "What to change, in order:" in out
    assert main(["diagnose", "layers_to_diagnose:fine"]) == 0
    assert "Nothing has to change." in capsys.readouterr().out
    for target, message in (
        ("layers_to_diagnose", "expected MODULE:ATTRIBUTE"),
        ("layers_to_diagnose:none", "no attribute 'none'"),
        ("layers_to_diagnose:slwo", "no attribute 'slwo': did you mean 'slow'?"),
        ("layers_to_diagnose.py:slow", "got the file 'layers_to_diagnose.py': write layers_to_diagnose:slow"),
        ("no_such_module:x", "No module named"),
        ("layers_to_diagnose:number", "must be a tuple (deq or cell, z0, *context)"),
    ):
        assert main(["diagnose", target]) == 2
        assert message in capsys.readouterr().err


def test_models_are_imported_when_they_are_used():
    code = (
        "import sys, pydeq\n"
        "assert not any(name.startswith('pydeq.models') for name in sys.modules)\n"
        "print(pydeq.models.build('mdeq_cifar_tiny').__class__.__module__)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "pydeq.models.mdeq\n", result.stderr


@pytest.mark.parametrize(("name", "meant"), [("Andersen", "Anderson"), ("deq", "DEQ"), ("fixedpoint", "fixed_point")])
def test_a_misspelt_name_gets_the_nearest(name, meant):
    with pytest.raises(AttributeError, match=rf"^module 'pydeq' has no attribute '{name}': did you mean '{meant}'\?$"):
        getattr(pydeq, name)
    assert not hasattr(pydeq, "_no_such_name")
