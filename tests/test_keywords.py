"""Unknown keywords answer with the name that was probably meant."""

import re

import pytest
import torch

import pydeq
from pydeq.arguments import unknown_keyword


def half(z):
    return 0.5 * z


@pytest.mark.parametrize(
    ("keyword", "meant"),
    [
        ("max_iter", "max_steps"),
        ("f_max_iter", "max_steps"),
        ("threshold", "max_steps"),
        ("tol", "rtol"),
        ("f_tol", "rtol"),
        ("eps", "rtol"),
        ("f_solver", "solver"),
        ("max_step", "max_steps"),
        ("Tol", "rtol"),
        ("batch_context", "batched_context"),
    ],
)
def test_fixed_point_suggests(keyword, meant):
    expected = f"fixed_point got an unexpected keyword argument {keyword!r}: did you mean {meant!r}?"
    with pytest.raises(TypeError, match=re.escape(expected)):
        pydeq.fixed_point(half, torch.ones(2), **{keyword: 1})


@pytest.mark.parametrize(
    ("solver", "keyword", "meant"),
    [
        (pydeq.Anderson, "m", "memory"),
        (pydeq.Anderson, "lam", "ridge"),
        (pydeq.Anderson, "beta", "damping"),
        (pydeq.Anderson, "tau", "damping"),
        (pydeq.Anderson, "riddge", "ridge"),
        (pydeq.Broyden, "lbfgs_thres", "memory"),
        (pydeq.Broyden, "m", "memory"),
        (pydeq.Picard, "tau", "damping"),
        (pydeq.Picard, "damp", "damping"),
    ],
)
def test_solvers_suggest(solver, keyword, meant):
    expected = f"{solver.__name__} got an unexpected keyword argument {keyword!r}: did you mean {meant!r}?"
    with pytest.raises(TypeError, match=re.escape(expected)):
        solver(**{keyword: 1})


@pytest.mark.parametrize("keyword", ["m", "ridge", "xyz"])
def test_no_suggestion_lists_what_there_is(keyword):
    """A known name of another solver's is not suggested."""
    expected = f"Picard got an unexpected keyword argument {keyword!r}: it takes damping"
    with pytest.raises(TypeError, match=re.escape(expected)):
        pydeq.Picard(**{keyword: 1})


def test_a_translation_is_used_only_where_it_is_known():
    assert "did you mean 'probes'?" in str(unknown_keyword("f", "vecs", ["probes"]))
    assert "probes" not in str(unknown_keyword("f", "vecs", ["memory"]))


@pytest.mark.parametrize(
    "setting",
    [
        pydeq.Anderson(7, ridge=0.0), pydeq.Broyden(line_search=True), pydeq.GMRES(9), pydeq.NewtonKrylov(),
        pydeq.Picard(0.5), pydeq.Implicit(pydeq.GMRES(), 1e-6, warm_start=True), pydeq.JacobianFree(),
        pydeq.JacobianPenalty(0.5, milestones=[(3, 0.7)]), pydeq.Phantom(3, 0.5), pydeq.Reversible(),
        pydeq.Shine(refine_steps=2), pydeq.Unrolled(checkpoint=True),
    ],
    ids=lambda setting: type(setting).__name__,
)  # fmt: skip
def test_print_shows_all_that_is_set(setting):
    assert eval(repr(setting), vars(pydeq).copy()) == setting


def test_solvers_stay_dataclasses():
    assert pydeq.Anderson(3) == pydeq.Anderson(memory=3) != pydeq.Anderson(4)
    assert repr(pydeq.Anderson(3)) == "Anderson(memory=3, damping=1.0, ridge=1e-06)"
    assert hash(pydeq.Broyden()) == hash(pydeq.Broyden())
    with pytest.raises(AttributeError):
        pydeq.Picard().damping = 0.5  # pyright: ignore
    with pytest.raises(TypeError, match="positional"):
        pydeq.Picard(1.0, 2.0)  # pyright: ignore
