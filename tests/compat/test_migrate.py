"""python -m pydeq migrate: which imports it rewrites, what it reports, and that everything else stays as it is."""

import ast
import json
import sys

import pytest

from pydeq.cli import main

try:
    import libcst
except ModuleNotFoundError:
    libcst = None

needs_libcst = pytest.mark.skipif(libcst is None, reason="libcst is not installed")

REWRITTEN = [
    ("import torchdeq", "import pydeq.compat.torchdeq as torchdeq"),
    ("import torchdeq as td", "import pydeq.compat.torchdeq as td"),
    ("import torchdeq.norm", "import pydeq.compat.torchdeq as torchdeq"),
    ("import torchdeq.norm as n", "import pydeq.compat.torchdeq.norm as n"),
    ("import os, torchdeq, torchdeq.loss", "import os, pydeq.compat.torchdeq as torchdeq"),
    ("import torchdeq, os", "import pydeq.compat.torchdeq as torchdeq, os"),
    ("from torchdeq import get_deq", "from pydeq.compat.torchdeq import get_deq"),
    ("from torchdeq import norm", "from pydeq.compat.torchdeq import norm"),
    (
        "from torchdeq.loss import fp_correction as fp, jac_reg",
        "from pydeq.compat.torchdeq.loss import fp_correction as fp, jac_reg",
    ),
    ("from torchdeq.solver.stat import SolverStat", "from pydeq.compat.torchdeq.solver.stat import SolverStat"),
    (
        "from torchdeq.norm import (\n    apply_norm,  # why\n)",
        "from pydeq.compat.torchdeq.norm import (\n    apply_norm,  # why\n)",
    ),
    ("from lib.solvers import anderson, broyden", "from pydeq.compat.deq import anderson, broyden"),
    ("from DEQ.lib.jacobian import power_method", "from pydeq.compat.deq import power_method"),
    ("from ..lib.solvers import broyden as b", "from pydeq.compat.deq import broyden as b"),
    ("from lib import solvers", "from pydeq.compat import deq as solvers"),
    ("from lib import jacobian as j", "from pydeq.compat import deq as j"),
    ("import lib.solvers as s", "import pydeq.compat.deq as s"),
    (
        "try:\n    import torchdeq\nexcept ImportError:\n    pass",
        "try:\n    import pydeq.compat.torchdeq as torchdeq\nexcept ImportError:\n    pass",
    ),
    ("if 1:  # c\n\timport torchdeq ; x = 1 # d", "if 1:  # c\n\timport pydeq.compat.torchdeq as torchdeq ; x = 1 # d"),
]

REPORTED = [  # source, what it becomes, what is said
    (
        "from torchdeq import get_deq, other",
        "from pydeq.compat.torchdeq import get_deq\nfrom torchdeq import other",
        "other of from torchdeq import get_deq, other: pydeq.compat.torchdeq has no such name",
    ),
    (
        "from lib.solvers import (broyden, matvec)  # c",
        "from pydeq.compat.deq import broyden  # c\nfrom lib.solvers import matvec",
        "matvec of",
    ),
    ("from lib import layers, solvers", "from pydeq.compat import deq as solvers\nfrom lib import layers", None),
    ("import torchdeq.other", None, "pydeq.compat.torchdeq.other does not exist"),
    ("from torchdeq.other import f", None, "pydeq.compat.torchdeq.other does not exist"),
    ("from lib.solvers import matvec", None, "matvec of from lib.solvers import matvec"),
    ("import lib.solvers", None, "it binds lib"),
    ("from lib.solvers import *", "from pydeq.compat.deq import *", "only the names in __all__"),
    ('importlib.import_module("torchdeq.core")', None, 'the string "torchdeq.core"'),
    ('importlib.import_module("lib.solvers")', None, 'the string "lib.solvers"'),
    (
        "import torchdeq as t\nt.solver.nothing(3)\nt.get_deq().anything",
        "import pydeq.compat.torchdeq as t\nt.solver.nothing(3)\nt.get_deq().anything",
        "2: not understood: t.solver.nothing: pydeq.compat.torchdeq.solver has no nothing",
    ),
    (
        "from lib import solvers\nsolvers.matvec",
        "from pydeq.compat import deq as solvers\nsolvers.matvec",
        "solvers.matvec",
    ),
]

UNTOUCHED = [
    "import torch\nfrom torch import nn\n",
    "from .torchdeq import get_deq\n",
    "import torchdeqs, mytorchdeq\nfrom torchdeqx.norm import f\n",
    "from mylib.solvers import broyden\nfrom lib.layers import broyden\nfrom lib import layers\nfrom lib import *\n",
    "torchdeq = 3\ntorchdeq.nothing\n",
    'x = "torchdeqs"\n# import torchdeq\n',
    "",
]


def run(tmp_path, capsys, source, *arguments):
    path = tmp_path / "code.py"
    path.write_bytes(source.encode())
    status = main(["migrate", str(path), *arguments])
    return status, capsys.readouterr().out, path.read_bytes().decode()


@needs_libcst
@pytest.mark.parametrize(("before", "after"), REWRITTEN)
def test_imports_are_rewritten(tmp_path, capsys, before, after):
    source = f'"""Text."""\n\n{before}\n\nx = 1  # end\n'
    status, out, listed = run(tmp_path, capsys, source)
    assert status == 0
    assert listed == source  # without --write
    assert "1 imports to rewrite" in out
    assert "--write rewrites them" in out
    assert "0 places not understood" in out
    _, out, written = run(tmp_path, capsys, source, "--write")
    assert written == source.replace(before, after)
    ast.parse(written)
    again = run(tmp_path, capsys, written, "--write")
    assert "0 imports rewritten in 0 of them" in again[1]
    assert again[2] == written


@needs_libcst
@pytest.mark.parametrize(("before", "after", "text"), REPORTED)
def test_what_is_not_understood_is_said(tmp_path, capsys, before, after, text):
    status, out, written = run(tmp_path, capsys, before + "\n", "--write")
    assert status == 0
    assert written == (after or before) + "\n"
    if text is None:
        assert "not understood:" not in out
    else:
        assert text in out
        assert "1 places not understood" in out


@needs_libcst
@pytest.mark.parametrize("source", UNTOUCHED)
def test_all_else_is_left_alone(tmp_path, capsys, source):
    _, out, written = run(tmp_path, capsys, source, "--write")
    assert written == source
    assert out == "1 files: 0 imports rewritten in 0 of them, 0 places not understood\n"


@needs_libcst
def test_rewritten_imports_work(tmp_path, capsys):
    for before, _ in REWRITTEN:
        if not before.startswith(("if", "from ..")):
            namespace = {"__name__": "code"}
            exec(run(tmp_path, capsys, before + "\n", "--write")[2], namespace)


@needs_libcst
def test_line_ends_encodings_and_permissions_stay(tmp_path, capsys):
    path = tmp_path / "code.py"
    path.write_bytes("# -*- coding: latin-1 -*-\r\nimport torchdeq\r\nx = 'é'\r\n".encode("latin-1"))
    path.chmod(0o750)
    assert main(["migrate", str(path), "--write"]) == 0
    expected = "# -*- coding: latin-1 -*-\r\nimport pydeq.compat.torchdeq as torchdeq\r\nx = 'é'\r\n"
    assert path.read_bytes() == expected.encode("latin-1")
    assert path.stat().st_mode & 0o777 == 0o750
    assert [file.name for file in tmp_path.iterdir()] == ["code.py"]


@needs_libcst
def test_folders_and_files_that_are_not_python(tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.py").write_text("import torchdeq\n")
    (tmp_path / "b.py").write_text("def (\n")
    (tmp_path / "c.txt").write_text("import torchdeq\n")
    assert main(["migrate", str(tmp_path), str(tmp_path / "missing.py"), "--write"]) == 1
    out, err = capsys.readouterr()
    assert "3 files: 1 imports rewritten in 1 of them" in out
    assert "b.py: cannot be parsed" in err
    assert "missing.py" in err
    assert (tmp_path / "sub" / "a.py").read_text() == "import pydeq.compat.torchdeq as torchdeq\n"
    assert (tmp_path / "c.txt").read_text() == "import torchdeq\n"


SOLVERS = """
def broyden(f, x0, threshold, eps=1e-3, stop_mode="rel", ls=False, name="unknown"):
    def inner(y):
        eps = 3
        return f(y)
    return {"result": x0, "lowest": 0.0, "nstep": 0, "prot_break": False, "abs_trace": [], "rel_trace": [],
            "eps": eps, "threshold": threshold}

def anderson(f, x0, m=6, lam=1e-4, threshold=50, eps=1e-3, stop_mode='rel', beta=1.0, **kwargs):
    x0 = x0 + 0
    out = {"result": x0, "lowest": 0.0, "nstep": 0, "prot_break": False, "abs_trace": [], "rel_trace": [],
           "eps": eps, "threshold": threshold}
    return out
"""
JACOBIAN = """
def jac_loss_estimate(f0, z0, vecs=2, create_graph=True):
    vecs = vecs
    return 0

def power_method(f0, z0, n_iters=200):
    return 0
"""
CHANGES = [  # in SOLVERS, to what; what is left, what is said
    (None, None, [], ""),
    ("def inner", "lam = 0\n    def inner", [], ""),
    ('threshold": threshold}\n\n', 'threshold": threshold, "all": []}\n\n', ["broyden"], "keys with all"),
    ('rel_trace": [],\n           "eps', 'trace": [],\n           "eps', ["anderson"], "trace and without rel_trace"),
    ("m=6, lam=1e-4, threshold=50", "threshold=50, m=6, lam=1e-4", ["anderson"], "parameters in another order"),
    ("m=6, lam=1e-4", "indexing=None, m=6, lam=1e-4", ["anderson"], "parameters with indexing=None"),
    ('eps=1e-3, stop_mode="rel"', 'eps=1e-8, stop_mode="rel"', ["broyden"], "with eps=1e-08 and without eps=0.001"),
    ("    x0 = x0 + 0", "    eps=1e-9", ["anderson"], "it replaces the eps that it is given"),
]  # fmt: skip


@needs_libcst
@pytest.mark.parametrize(("before", "after", "left", "text"), CHANGES)
@pytest.mark.parametrize("given", ["folder", "file"])
def test_solvers_that_were_changed_are_left_alone(tmp_path, capsys, before, after, left, text, given):
    """Those of lib/solvers.py in the importing file's folder or above it, among the files or not."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "vision" / "models").mkdir(parents=True)
    solvers = SOLVERS if before is None else SOLVERS.replace(before, after)
    assert before is None or solvers != SOLVERS
    (tmp_path / "lib" / "solvers.py").write_text(solvers)
    (tmp_path / "lib" / "jacobian.py").write_text(JACOBIAN)
    path = tmp_path / "vision" / "models" / "core.py"
    lines = ["from lib.solvers import anderson, broyden", "from lib.jacobian import jac_loss_estimate"]
    path.write_text("\n".join(lines) + "\n")
    assert main(["migrate", str(tmp_path if given == "folder" else path), "--write"]) == 0
    out = capsys.readouterr().out
    moved = [name for name in ("anderson", "broyden") if name not in left]
    expected = [
        f"from pydeq.compat.deq import {', '.join(moved)}",
        *(f"from lib.solvers import {name}" for name in left),
    ]
    assert path.read_text().splitlines() == [*expected, "from pydeq.compat.deq import jac_loss_estimate"]
    assert (tmp_path / "lib" / "solvers.py").read_text() == solvers
    assert out.count("is not the original's") == len(left)
    assert text in out
    assert ("left alone" in out) == bool(left)
    assert "solvers.py:1: left alone: defines broyden" in out or not left or given == "file"


@needs_libcst
def test_relative_imports_inside_of_lib(tmp_path, capsys):
    lib = tmp_path / "core" / "lib"
    lib.mkdir(parents=True)
    (lib / "solvers.py").write_text(SOLVERS)
    (lib / "jacobian.py").write_text(JACOBIAN.replace("n_iters=200", "n_iters=100"))
    source = "from .solvers import anderson\nfrom .jacobian import power_method\nfrom . import solvers, jacobian\n"
    (lib / "grad.py").write_text(source)
    (tmp_path / "core" / "grad.py").write_text("from .solvers import anderson\n")
    assert main(["migrate", str(tmp_path), "--write"]) == 0
    assert (lib / "grad.py").read_text() == (
        "from pydeq.compat.deq import anderson\nfrom .jacobian import power_method\n"
        "from pydeq.compat import deq as solvers\nfrom . import jacobian\n"
    )
    assert (tmp_path / "core" / "grad.py").read_text() == "from .solvers import anderson\n"
    assert "2 left alone" in capsys.readouterr().out


@needs_libcst
def test_a_library_of_another_kind_is_none_of_ours(tmp_path, capsys):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "solvers.py").write_text("def initialize_optimizer():\n    pass\n")
    source = "from lib.solvers import initialize_optimizer\nimport lib.solvers as s\nfrom lib import solvers\n"
    (tmp_path / "train.py").write_text(source)
    assert main(["migrate", str(tmp_path), "--write"]) == 0
    assert (tmp_path / "train.py").read_text() == source
    assert capsys.readouterr().out == "2 files: 0 imports rewritten in 0 of them, 0 places not understood\n"


@needs_libcst
def test_copies_elsewhere_are_reported(tmp_path, capsys):
    """A torchdeq that lies among the files, and solvers that are defined in a file of another name."""
    package = tmp_path / "torchdeq"
    package.mkdir()
    (package / "__init__.py").write_text("from torchdeq.core import get_deq\n")
    (package / "core.py").write_text("def get_deq():\n    pass\n")
    (tmp_path / "utils.py").write_text(SOLVERS)
    (tmp_path / "train.py").write_text("from torchdeq import get_deq\nimport torchdeq.loss as loss\n")
    assert main(["migrate", str(tmp_path), "--write"]) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "train.py").read_text() == "from torchdeq import get_deq\nimport torchdeq.loss as loss\n"
    assert (package / "__init__.py").read_text() == "from torchdeq.core import get_deq\n"
    assert f"{package / '__init__.py'}:1: left alone: a copy of torchdeq" in out
    assert f"{tmp_path / 'utils.py'}:1: left alone: defines broyden and anderson itself (with the original's" in out
    assert f"{tmp_path / 'train.py'}:1: left alone: from torchdeq import get_deq: {package} may be what" in out
    assert "0 imports rewritten in 0 of them, 0 places not understood, 4 left alone" in out


def test_without_libcst_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "pydeq.compat.rewriting", raising=False)
    for name in ("libcst", "libcst.helpers", "libcst.metadata"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["migrate", str(tmp_path)]) == 2
    assert "pip install libcst" in capsys.readouterr().err


@needs_libcst
def test_notebooks_are_reported(tmp_path, capsys):
    cells = [
        {"cell_type": "markdown", "source": ["import torchdeq\n"]},
        {"cell_type": "code", "source": ["%matplotlib inline\n", "!pip install torchdeq\n", "import torch\n"]},
        {"cell_type": "code", "source": "from torchdeq import get_deq, nothing"},
        {"cell_type": "code", "source": ["%%time\n", "for torchdeq\n"]},
    ]
    path = tmp_path / "run.ipynb"
    path.write_text(json.dumps({"cells": cells, "nbformat": 4}))
    before = path.read_bytes()
    assert main(["migrate", str(tmp_path), "--write"]) == 0
    out = capsys.readouterr().out
    assert path.read_bytes() == before
    assert f"{path}:3: not understood: from torchdeq import get_deq, nothing, in a notebook" in out
    assert f"{path}:3: not understood: nothing of" in out
    assert f"{path}:4: not understood: a cell that cannot be parsed names torchdeq" in out
    assert "1 files: 0 imports rewritten in 0 of them, 3 places not understood" in out
    path.write_text("[]")
    assert main(["migrate", str(path)]) == 1
    assert "is no notebook" in capsys.readouterr().err
