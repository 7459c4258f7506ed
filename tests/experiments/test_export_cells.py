"""The program that exports trained cells: its recipes, and what it puts into a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.problems import cells
from experiments import export_cells
from experiments.command_line import main, parser
from experiments.export_cells import RECIPES
from experiments.training.command import _values
from experiments.training.configuration import load_training_config


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_command_trains_what_the_recipe_says(name):
    recipe = RECIPES[name]
    arguments = parser().parse_args(recipe.command.split()[3:])
    assert load_training_config(arguments.config, _values(arguments)).mapping() == recipe.load().mapping()


def test_files_are_those_of_the_recipes():
    assert cells.names() == sorted(RECIPES)
    for name, recipe in RECIPES.items():
        with safe_open(cells.WEIGHTS / f"{name}.safetensors", "pt") as file:
            about = json.loads(file.metadata()["about"])
        assert (about["command"], about["title"], about["data"]) == (
            recipe.command, recipe.title, recipe.load().data.name
        )  # fmt: skip


def _row(name: str) -> str:
    """The row of a file in the table of benchmarks/README.md."""
    stored = cells.load(name)
    facts = stored.facts
    learned = [f"{facts['accuracy']:.1%}", f"{facts['chance']:.1%}"] if "accuracy" in facts else [
        f"{facts['perplexity']:.2f}", f"{facts['chance']:.0f}"
    ]  # fmt: skip
    radii = (f"{facts[key]:.2f}" for key in ("spectral_radius", "spectral_radius_mean"))
    return f"| {' | '.join([f'`{name}`', stored.title, *learned, *radii])} |"


def test_the_table_shows_the_facts_of_the_files():
    text = Path(cells.__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    assert "\n".join(map(_row, cells.names())) in text


def test_a_neighbourhood_has_the_nearest_nodes_and_their_edges():
    #  0 - 1 - 2 - 3 - 4 - 5,  3 - 6: the search begins at 3
    pairs = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (3, 6)]
    edges = torch.tensor(pairs + [(end, begin) for begin, end in pairs]).T
    nodes, inside = export_cells.neighbourhood(edges, 7, 5)
    assert {2, 3, 4, 6} < set(nodes.tolist())
    assert len(nodes) == 5
    found = {tuple(pair) for pair in nodes[inside].T.tolist()}
    expected = {pair for pair in map(tuple, edges.T.tolist()) if set(pair) <= set(nodes.tolist())}
    assert found == expected
    assert {(2, 3), (3, 4), (3, 6)} <= found


def test_an_uneven_batch_has_the_samples_that_need_most(monkeypatch):
    class Scaled:
        """z = a z + 1 in two dimensions, a sample's slope a in the injection."""

        def __init__(self, slopes):
            self.slopes = slopes

        def start(self):
            return torch.zeros(len(self.slopes), 2)

        def __call__(self, z):
            return self.slopes[:, None] * z.sin() + 1.0

    monkeypatch.setattr(
        export_cells, "stored_cell", lambda name, about, tensors, rows: Scaled(tensors["injection"][rows])
    )
    slopes = torch.full((64,), 0.1)
    slopes[:20] = 0.0
    slopes[[5, 17, 40, 63]] = 0.95
    rows = export_cells.uneven_rows("any", {}, {"injection": slopes}, 64).tolist()
    assert len(set(rows)) == 32
    assert {5, 17, 40, 63} <= set(rows)
    assert sum(row < 20 for row in rows) == 20


def test_an_unknown_cell_is_named(capsys):
    assert main(["export-cells", "mdeq_larger"]) == 2
    assert "mdeq_larger" in capsys.readouterr().err


def test_a_training_by_another_recipe_is_not_taken(tmp_path, capsys):
    folder = tmp_path / "ignn_cora"
    folder.mkdir()
    config = RECIPES["ignn_pubmed"].load().mapping()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps({"status": "finished"}))
    assert main(["export-cells", "ignn_cora", "--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "another configuration" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
