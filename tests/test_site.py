"""The hooks of the site rewrite links that leave docs/. ``make docs`` builds the site itself."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("index.md", "[cells](docs/cells.md)", "[cells](cells.md)"),
        ("index.md", "![plot](docs/overhead.png)", "![plot](overhead.png)"),
        ("index.md", "[`pydeq.nn`](pydeq/nn)", "`pydeq.nn` (`pydeq/nn`)"),
        ("index.md", "[CITATION.cff](CITATION.cff)", "`CITATION.cff`"),
        ("contributing.md", "[a](docs/solvers.md#hard-maps)", "[a](solvers.md#hard-maps)"),
        ("penalty.md", "[a](experiments/paper.md#modes)", "[a](experiments/paper.md#modes)"),
        ("experiments/paper.md", "[a](../penalty.md)", "[a](../penalty.md)"),
        (
            "experiments/paper.md",
            "[numbers](../../benchmarks/results/cpu.json)",
            "numbers (`benchmarks/results/cpu.json`)",
        ),
        (
            "benchmarks.md",
            "[benchmarks/README.md](../benchmarks/README.md)",
            "[benchmarks/README.md](benchmarks/suites.md)",
        ),
        ("benchmarks/suites.md", "[a](../docs/benchmarks.md)", "[a](../benchmarks.md)"),
        ("solvers.md", "[rules](../CONTRIBUTING.md#add-a-solver)", "[rules](contributing.md#add-a-solver)"),
        (
            "solvers.md",
            "[a](https://arxiv.org) [b](#hard-maps) [c](gone.md)",
            "[a](https://arxiv.org) [b](#hard-maps) [c](gone.md)",
        ),
        ("solvers.md", "`layers[0](z)` and f[i](z)", "`layers[0](z)` and f[i](z)"),
    ],
)
def test_links(hooks, page, text, expected):
    assert hooks.rewrite_links(text, page) == expected


@pytest.mark.parametrize(
    ("html", "linked"),
    [
        ("<code>pydeq.DEQ</code>", "pydeq.DEQ"),
        ("<code>pydeq.Anderson(memory=5)</code>", "pydeq.Anderson"),
        ('<a href="nn.html"><code>pydeq.nn</code></a>', None),
        ("<code>import pydeq.nn</code>", None),
        ("<code>pydeq</code>", None),
    ],
)
def test_names_of_the_api(hooks, html, linked):
    name = f'<autoref identifier="{linked}" optional>{html}</autoref>'
    assert hooks.on_page_content(html) == (name if linked else html)
