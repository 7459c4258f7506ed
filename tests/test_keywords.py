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


def test_solvers_stay_dataclasses():
    assert pydeq.Anderson(3) == pydeq.Anderson(memory=3) != pydeq.Anderson(4)
    assert repr(pydeq.Anderson(3)) == "Anderson(memory=3, damping=1.0, ridge=1e-06)"
    assert hash(pydeq.Broyden()) == hash(pydeq.Broyden())
    with pytest.raises(AttributeError):
        pydeq.Picard().damping = 0.5  # pyright: ignore
    with pytest.raises(TypeError, match="positional"):
        pydeq.Picard(1.0, 2.0)  # pyright: ignore
