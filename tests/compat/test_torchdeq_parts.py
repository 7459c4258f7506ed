"""Norms, dropout, losses, estimates, configuration: the contract on replacement and original; then what is better."""

import copy
import gc
import importlib
import inspect
import io
import math
import pickle
import pkgutil
import sys
import warnings
import weakref
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn

import pydeq.compat

NORMS = ("weight_norm", "spectral_norm")
MODULES = {
    "linear": lambda: nn.Linear(4, 3),
    "conv": lambda: nn.Conv2d(2, 3, 3),
    "transposed": lambda: nn.ConvTranspose1d(2, 3, 3),
}

# fmt: off
NAMES = [
    "get_deq", "reset_deq", "register_deq",
    "add_deq_args", "mem_gc", "mixed_init",
    "get_solver", "register_solver", "jac_reg",
    "power_method", "solver_stat_from_final_step", "fp_correction",
    "register_weight_func", "apply_norm", "reset_norm",
    "remove_norm", "register_norm", "register_norm_module",
    "VariationalDropout", "VariationalDropout1d", "VariationalDropout2d",
    "VariationalDropout3d", "VariationalDropToken1d", "VariationalDropToken2d",
    "VariationalDropToken3d", "reset_dropout", "core.DEQBase",
    "core.DEQSliced", "core.DEQIndexing", "core.get_deq",
    "solver.get_solver", "solver.stat.SolverStat", "solver.anderson.anderson_solver",
    "solver.broyden.broyden_solver", "solver.fp_iter.fixed_point_iter", "solver.fp_iter.simple_fixed_point_iter",
    "norm.apply_norm", "norm.weight_norm.WeightNorm", "norm.spectral_norm.SpectralNorm",
    "loss.fp_correction", "loss.jac_reg", "loss.power_method",
    "loss.jacobian.jac_reg", "loss.correction.fp_correction", "utils.mem_gc",
    "utils.config.DEQConfig", "utils.arg_utils.add_deq_args", "utils.layer_utils.deq_decorator",
    "grad.backward_factory", "dropout.VariationalDropout",
]
# fmt: on


def test_names_and_submodules(td):
    for path in NAMES:
        thing = td
        for name in path.split("."):
            thing = getattr(thing, name)
        assert callable(thing)


def test_every_public_name_of_the_original_is_here(original, new):
    names = {name for name in dir(original) if not name.startswith("_")}
    modules = {name for name in names if inspect.ismodule(getattr(original, name))}
    assert not {name for name in names - modules if not hasattr(new, name)}
    assert modules >= {"core", "solver", "grad", "norm", "loss", "utils", "dropout"}


# Norms


@pytest.mark.parametrize("kind", MODULES)
def test_weight_norm(td, kind):
    torch.manual_seed(0)
    module = MODULES[kind]()
    before, dim = module.weight.detach().clone(), int(kind == "transposed")
    td.apply_norm(module)
    assert {name for name, _ in module.named_parameters()} == {"weight_g", "weight_v", "bias"}
    torch.testing.assert_close(module.weight.detach(), before)
    assert module.weight_g.shape == tuple(size if i == dim else 1 for i, size in enumerate(before.shape))
    with torch.no_grad():
        module.weight_g.mul_(2)
    torch.testing.assert_close(module.weight.detach(), before)  # until the reset
    td.reset_norm(module)
    torch.testing.assert_close(module.weight.detach(), 2 * before)
    module.weight.sum().backward()
    assert module.weight_g.grad is not None
    td.remove_norm(module)
    assert isinstance(module.weight, nn.Parameter)
    torch.testing.assert_close(module.weight.detach(), 2 * before)
    assert {name for name, _ in module.named_parameters()} == {"weight", "bias"}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("learn", [True, False])
def test_spectral_norm(td, kind, learn):
    torch.manual_seed(0)
    module = MODULES[kind]()
    before, dim = module.weight.detach().clone(), int(kind == "transposed")
    td.apply_norm(module, "spectral_norm", learn_scale=learn, target_norm=0.5)
    names = {"weight_orig", "bias"} | ({"weight_g"} if learn else set())
    assert {name for name, _ in module.named_parameters()} == names
    assert {name for name, _ in module.named_buffers()} == {"weight_u", "weight_v"}
    for _ in range(200):
        td.reset_norm(module)
    sigma = torch.linalg.matrix_norm(before.movedim(dim, 0).flatten(1), 2)
    torch.testing.assert_close(module.weight.detach(), 0.5 * before / sigma, rtol=1e-3, atol=1e-5)
    module.eval()
    u = module.weight_u.clone()
    td.reset_norm(module)
    assert torch.equal(module.weight_u, u)
    td.remove_norm(module)
    assert {name for name, _ in module.named_parameters()} == {"weight", "bias"}
    assert not list(module.buffers())


def test_norm_options(td):
    linear = nn.Linear(4, 4)
    td.apply_norm(
        linear, args={"norm_no_scale": True, "norm_target_norm": 3.0, "norm_clip": True, "norm_clip_value": 0.1}
    )
    assert not hasattr(linear, "weight_g")
    torch.testing.assert_close(linear.weight, 0.1 * linear.weight_v)
    linear = nn.Linear(4, 4)
    td.apply_norm(linear, norm_type="none")
    assert isinstance(linear.weight, nn.Parameter)
    with pytest.raises(AssertionError):
        td.apply_norm(linear, "other_norm")
    model = nn.ModuleDict({"embedding": nn.Linear(2, 2), "body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    td.apply_norm(model, filter_out="bed", prefix_filter_out=["head"])
    assert [hasattr(module, "weight_v") for module in model.values()] == [False, True, False]


def test_norms_of_ones_own(td):
    class Halved:
        _target_modules = {}  # noqa: RUF012

        @classmethod
        def apply(cls, module, deq_args=None, **kwargs):
            return cls()

        def __call__(self, module):
            module.resets = getattr(module, "resets", 0) + 1

        def remove(self, module):
            del module.resets

    td.register_norm("halved", Halved)
    td.register_norm_module(nn.Linear, "halved", "weight", 0)
    assert Halved._target_modules == {nn.Linear: ("weight", 0)}
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    td.apply_norm(model, "halved")
    td.reset_deq(model)
    td.reset_norm(model)
    assert model[0].resets == 2
    td.remove_norm(model)
    assert not hasattr(model[0], "resets")


@pytest.mark.parametrize("norm", NORMS)
def test_checkpoints_are_exchanged(original, new, norm):
    torch.manual_seed(0)
    theirs, ours = nn.Conv1d(2, 3, 3), nn.Conv1d(2, 3, 3)
    original.apply_norm(theirs, norm)
    new.apply_norm(ours, norm)
    ours.load_state_dict(theirs.state_dict())
    for model, package in ((ours, new), (theirs, original)):
        package.reset_norm(model.train())
    torch.testing.assert_close(ours.weight, theirs.weight)
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("norm", NORMS)
def test_normed_modules_are_copied(new, norm):
    model = nn.Sequential(nn.Linear(3, 3), nn.Conv1d(1, 1, 1))
    new.apply_norm(model, norm)
    new.reset_norm(model)
    again = copy.deepcopy(model)
    torch.testing.assert_close(again[0].weight, model[0].weight.detach())
    new.reset_norm(again)
    again[0].weight.sum().backward()
    assert again[0].weight_g.grad is not None
    assert model[0].weight_g.grad is None
    copy.deepcopy(again)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("how", ["pickle", "save", "spawn", "deepcopy"])
def test_a_model_with_norms_is_saved_and_sent(new, norm, how):
    """torch.save of the model, and what torch.multiprocessing.spawn does with it, before and after a reset."""

    def again(model):
        if how == "deepcopy":
            return copy.deepcopy(model)
        if how == "pickle":
            return pickle.loads(pickle.dumps(model))
        file = io.BytesIO()
        if how == "save":
            torch.save(model, file)
            return torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        ForkingPickler(file).dump(model)
        return pickle.loads(file.getvalue())

    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "conv": nn.Conv1d(4, 4, 3, padding=1)})
    model["deq"] = new.get_deq(f_solver="anderson", b_solver="anderson", ift=True)
    new.apply_norm(model, norm)
    for module in model.values():
        if hasattr(module, "weight_g"):
            module.weight_g.data.mul_(0.3)

    def run(model):
        def f(z):
            return torch.tanh(model["conv"](model["linear"](z)) + 1)

        z = model["deq"](f, torch.zeros(2, 4, 4))[0][-1]
        gradients = torch.autograd.grad(z.sum(), list(model.parameters()), allow_unused=True)
        return [z.detach(), *gradients]

    model.eval()  # no power iteration
    for _ in range(2):
        new.reset_norm(model)
        model = model.train()
        sent = again(model)
        assert sent["linear"].weight.equal(model["linear"].weight)
        model.eval(), sent.eval()
        new.reset_norm(model), new.reset_norm(sent)
        model.train(), sent.train()
        for theirs, ours in zip(run(sent), run(model), strict=True):
            assert theirs.equal(ours)
        model.eval(), sent.eval()
        again(sent)
        model = sent


def test_norms_leave_no_cycle(new):
    model = nn.Linear(3, 3)
    new.apply_norm(model)
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_norming_twice_changes_nothing(new):
    linear = nn.Linear(3, 3)
    new.apply_norm(linear)
    new.apply_norm(linear)
    assert {name for name, _ in linear.named_parameters()} == {"weight_g", "weight_v", "bias"}


# Dropout

SHARED = {  # name -> dimensions along which the mask is constant, token_first and not
    "VariationalDropout1d": ((1,), (2,)),
    "VariationalDropout2d": ((1, 2), (2, 3)),
    "VariationalDropout3d": ((1, 2, 3), (2, 3, 4)),
    "VariationalDropToken1d": ((2,), (1,)),
    "VariationalDropToken2d": ((3,), (1,)),
    "VariationalDropToken3d": ((4,), (1,)),
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("token_first", [True, False])
def test_dropout_shares_its_mask(td, name, token_first):
    torch.manual_seed(0)
    dropout = getattr(td, name)(0.4, token_first=token_first)
    shared = SHARED[name][not token_first]
    x = torch.ones(50, *range(6, 6 + int(name[-2]) + 1))
    y = dropout(x)
    assert ((y == 0) | torch.isclose(y, torch.tensor(1 / 0.6))).all()
    for dim in range(x.dim()):
        assert (y == y.narrow(dim, 0, 1)).all() == (dim in shared)
    share = (y == 0).double().mean().item()
    independent = math.prod(size for dim, size in enumerate(x.shape) if dim not in shared)
    assert abs(share - 0.4) < 5 * (0.24 / independent) ** 0.5
    assert torch.equal(dropout(2 * x), 2 * y)
    td.reset_dropout(nn.Sequential(dropout))
    assert not torch.equal(dropout(x), y)
    assert torch.equal(dropout.eval()(x), x)


def test_dropout_of_single_entries(td):
    torch.manual_seed(0)
    dropout = td.VariationalDropout(0.25)
    x = torch.ones(4000)
    y = dropout(x)
    assert abs((y == 0).double().mean().item() - 0.25) < 5 * (0.1875 / 4000) ** 0.5
    td.reset_deq(dropout)
    assert dropout.mask is None
    assert torch.equal(td.VariationalDropout(0.0)(x), x)
    for bad in (-0.1, 1.5):
        with pytest.raises(ValueError):
            td.VariationalDropout(bad)


def test_dropout_draws_where_the_tensor_is(new):
    dropout = new.VariationalDropout(0.5)
    assert dropout(torch.ones(3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert dropout(torch.ones(2, 4, dtype=torch.bfloat16)).shape == (2, 4)  # a last, smaller batch
    assert dropout(torch.ones(3, 4, device="meta")).device.type == "meta"


@pytest.mark.parametrize("shape", [(2, 1, 4), (1, 1, 4), (4,), (2, 6, 4)])
@pytest.mark.parametrize("base", ["_VariationalDropoutNd", "VariationalDropout1d", "VariationalDropToken1d"])
def test_a_mask_of_ones_own_is_drawn_once(td, base, shape):
    """Drawn by an overridden ``reset_mask``, in any shape that broadcasts to the input."""
    draws = []

    class Own(getattr(td.dropout, base)):
        def reset_mask(self, x):
            draws.append(x.shape)
            self.mask = (torch.rand(shape) > 0.5).to(x) * 2

    torch.manual_seed(0)
    module, x = Own(0.5), torch.randn(2, 6, 4)
    for _ in range(3):
        assert module(x).equal(x * module.mask)
    assert len(draws) == 1
    td.reset_dropout(module)
    assert module(x).shape == x.shape
    assert len(draws) == 2


def test_a_mask_that_was_given_is_used(td):
    module, x = td.VariationalDropout1d(0.5), torch.randn(2, 6, 4)
    module.mask = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert module(x).equal(x * module.mask)


def test_either_librarys_reset_forgets_the_masks_of_both(original, new, monkeypatch):
    for place in (original, original.core, original.dropout):
        monkeypatch.setattr(place, "reset_dropout", place.reset_dropout)  # undo what drawing a mask puts there
    model = nn.Sequential(original.VariationalDropout(0.5), new.VariationalDropout(0.5))
    for reset in (original.reset_deq, new.reset_deq, original.core.reset_deq, new.reset_dropout):
        model(torch.ones(4, 5))
        assert all(module.mask is not None for module in model)
        reset(model)
        assert all(module.mask is None for module in model)
    model(torch.ones(4, 5))
    original.dropout.reset_dropout(model)
    assert all(module.mask is None for module in model)


def test_the_replacement_may_be_put_in_the_originals_place(new, monkeypatch):
    for name in ("", ".core", ".dropout"):
        monkeypatch.setitem(sys.modules, f"torchdeq{name}", sys.modules[f"pydeq.compat.torchdeq{name}"])
    reset = new.dropout.reset_dropout
    module = new.VariationalDropout(0.5)
    for _ in range(2):
        module(torch.ones(4, 5))
        new.reset_deq(module)
        assert module.mask is None
    assert new.dropout.reset_dropout is new.core.reset_dropout is reset


def test_dropping_everything_gives_zeros(new):
    assert torch.equal(new.VariationalDropout1d(1.0)(torch.ones(2, 3, 4)), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="must have 3 dimensions"):
        new.VariationalDropout1d()(torch.ones(2, 3))


# Losses and estimates


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [0.64, 0.8, 1.0]),
        ({"gamma": 0.5}, [0.25, 0.5, 1.0]),
        ({"weight_func": "linear"}, [0.4, 0.7, 1.0]),
        ({"weight_func": "linear", "gamma": 0.3, "bias": 1.0}, [1.8, 1.9, 2.0]),
    ],
)
def test_fixed_point_correction(td, options, weights):
    states, target = [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(4.0)], torch.tensor(0.5)
    loss, values = td.fp_correction(lambda z, y: (z - y) ** 2, (states, target), return_loss_values=True, **options)
    assert values == [0.25, 2.25, 12.25]
    torch.testing.assert_close(loss, torch.tensor(sum(w * v for w, v in zip(weights, values, strict=True))))
    assert td.fp_correction(lambda z, y: (z - y) ** 2, (states, target), **options) == loss
    with pytest.raises(AssertionError):
        td.fp_correction(lambda z: z, [states], weight_func="nothing")
    with pytest.raises(AssertionError):
        td.register_weight_func("own", 3)
    td.register_weight_func("own", lambda n, k, **kwargs: float(k == 0))
    assert td.fp_correction(lambda z, y: (z - y) ** 2, (states, target), weight_func="own") == 0.25


def test_constant_correction_works_on_any_device(new):
    assert new.fp_correction(lambda z: z, [[1.0, 2.0]], weight_func="const", c=3.0) == 9.0


def linear_map(A, batch=4, dtype=torch.float64):
    z = torch.randn(batch, len(A), dtype=dtype, requires_grad=True)
    return z @ A.T.to(dtype), z


def test_jacobian_penalty(td):
    torch.manual_seed(0)
    A = torch.randn(6, 6, dtype=torch.float64)
    f0, z0 = linear_map(A, batch=2)
    estimates = torch.stack([td.jac_reg(f0, z0, vecs=8, create_graph=False) for _ in range(300)])
    assert estimates.shape == (300,)
    expected = A.square().sum() / 6
    error = estimates.std() / 300**0.5
    assert abs(estimates.mean() - expected) < 5 * error
    parameter = torch.tensor(2.0, requires_grad=True)
    z = torch.ones(2, 3, requires_grad=True)
    torch.manual_seed(1)
    td.jac_reg(parameter * z, z).backward()
    torch.manual_seed(1)
    v = torch.randn(2, 3)
    torch.testing.assert_close(parameter.grad, 4 * v.square().mean())


def test_jacobian_penalty_is_the_one_of_this_package(td, monkeypatch):
    cell = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3, padding=1), torch.nn.GroupNorm(1, 2), torch.nn.GELU()).double()
    z = torch.randn(3, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    basis = iter(torch.eye(24, dtype=torch.float64))
    for name in ("randn", "randn_like"):
        monkeypatch.setattr(torch, name, lambda *_, **__: next(basis).expand(3, 24).reshape(3, 2, 3, 4))
    theirs = 24 * td.jac_reg(cell(z), z, vecs=24)  # each vector of the basis once: the exact norm
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # torch does not vectorize the norm's second derivative
        ours = pydeq.jacobian_penalty(cell, z, method="exact")
        gradients = [torch.autograd.grad(value, cell.parameters(), allow_unused=True) for value in (theirs, ours)]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-14)


def test_power_method_on_a_real_spectrum(td):
    torch.manual_seed(0)
    A = torch.diag(torch.tensor([-0.9, 0.5, 0.3], dtype=torch.float64))
    f0, z0 = linear_map(A)
    evector, evalue = td.power_method(f0, z0)
    assert evector.shape == z0.shape
    torch.testing.assert_close(evalue, torch.full((4,), 0.9, dtype=torch.float64))
    torch.testing.assert_close(evector.abs()[:, 0], torch.ones(4, dtype=torch.float64))
    f0, z0 = linear_map(A)
    assert td.power_method(f0, z0, 3)[1].shape == (4,)


def rotation(modulus, angle):
    c, s = modulus * math.cos(angle), modulus * math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("angle", [math.pi / 2, 1.0, 3.0, 0.01, math.pi])
def test_power_method_on_complex_pairs(new, angle, dtype):
    torch.manual_seed(0)
    A = torch.block_diag(rotation(0.9, angle), torch.diag(torch.tensor([0.6, -0.2], dtype=torch.float64)))
    basis = torch.randn(4, 4, dtype=torch.float64)
    f0, z0 = linear_map(basis @ A @ torch.linalg.inv(basis), dtype=dtype)
    modulus = new.power_method(f0, z0)[1]
    torch.testing.assert_close(
        modulus, torch.full((4,), 0.9, dtype=dtype), rtol=1e-3 if dtype == torch.float64 else 1e-2, atol=0
    )


def test_power_method_without_a_jacobian(new):
    z = torch.ones(2, 3, requires_grad=True)
    for image in (0 * z, torch.ones(2, 3, requires_grad=True) * 2):
        evector, evalue = new.power_method(image, z)
        assert (evalue == 0).all()
        assert evector.isfinite().all()


def test_power_method_of_opposite_eigenvalues(new):
    f0, z0 = linear_map(torch.diag(torch.tensor([0.8, -0.8, 0.1])))
    torch.testing.assert_close(new.power_method(f0, z0)[1], torch.full((4,), 0.8, dtype=torch.float64))


def test_legacy_power_method_is_the_originals(original, new):
    torch.manual_seed(0)
    f0, z0 = linear_map(torch.randn(5, 5))
    torch.manual_seed(1)
    with pydeq.compat.legacy():
        ours = new.power_method(f0, z0, 20)
    torch.manual_seed(1)
    theirs = original.power_method(f0, z0, 20)
    torch.testing.assert_close(ours, theirs)


# The rest


def test_checkpointing(td):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    x = torch.randn(2, 3, requires_grad=True)
    plain = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    out = td.mem_gc(module, (x,))
    for mine, yours in zip(torch.autograd.grad(out.square().sum(), [x, *module.parameters()]), plain, strict=True):
        torch.testing.assert_close(mine, yours)


def test_mixed_init(td):
    torch.manual_seed(0)
    z = td.mixed_init((100, 50))
    assert z.shape == (100, 50)
    assert abs((z == 0).double().mean() - 0.5) < 0.05
    assert abs(z[z != 0].std() - 1) < 0.1


def test_configuration(td):
    config = td.utils.config.DEQConfig({"a": 1})
    config.update(b=2)
    assert (config.get("a"), config.get("b"), config.get("c"), config.get("c", 4)) == (1, 2, None, 4)

    class Options:
        def __init__(self):
            self.a = 5

    with pytest.warns(UserWarning, match="Unrecognized config type"):
        assert td.utils.config.DEQConfig(Options()).get("a") == 5


def test_wrappers(td):
    wrap = td.utils.layer_utils.deq_decorator
    z = (torch.ones(2, 3), torch.full((2, 2, 2), 2.0))
    func, flat = wrap(lambda a, b: (2 * a, 3 * b), z, no_stat=False)
    assert flat.shape == (2, 7)
    for part, expected in zip(func.vec2list(func(flat, tau=0.5)), (1.5 * z[0], 2.0 * z[1]), strict=True):
        torch.testing.assert_close(part, expected)
    func, same = wrap(lambda a, b: (2 * a, 3 * b), z, no_stat=True)
    assert same is z
    torch.testing.assert_close(func(z, tau=0.5)[1], 2.0 * z[1])
    func, same = wrap(lambda a: 2 * a, z[0])
    torch.testing.assert_close(func(same, tau=0.25), 1.25 * z[0])
    with pytest.raises(AssertionError):
        wrap(lambda a: a, 3)


# Signatures

# Parts of the original's solvers and of its checkpointing that no code outside of it calls.
INTERNAL = {"line_search", "matvec", "rmatvec", "scalar_search_armijo", "DEQGradCkpt"}
INTERNAL |= {"filter_input", "filter_out", "reset_grad"}
METHODS = ("__init__", "forward", "apply", "compute_weight", "remove", "from_solver_info", "from_final_step", "get")
METHODS += ("update", "reset_mask")


def public(original):
    """(module, name) of every public function and class, by the modules that define them."""
    found = []
    for info in pkgutil.walk_packages(original.__path__, "torchdeq."):
        module = importlib.import_module(info.name)
        for name, thing in vars(module).items():
            if callable(thing) and not name.startswith("_") and getattr(thing, "__module__", "") == info.name:
                found.append((info.name.removeprefix("torchdeq."), name))
    return found


def test_signatures_are_the_originals(original, new):
    empty = inspect.Parameter.empty
    compared = 0
    for path, name in public(original):
        if name in INTERNAL:
            continue
        theirs = getattr(importlib.import_module(f"torchdeq.{path}"), name)
        ours = getattr(importlib.import_module(f"{new.__name__}.{path}"), name)
        assert inspect.isclass(ours) == inspect.isclass(theirs), (path, name)
        methods = [method for method in METHODS if method in vars(theirs)] if inspect.isclass(theirs) else [None]
        for method in methods:
            pair = [thing if method is None else getattr(thing, method) for thing in (theirs, ours)]
            a, b = (list(inspect.signature(thing).parameters.values()) for thing in pair)
            where = (path, name, method)
            names = [["z_init" if p.name == "z_star" else p.name for p in parameters] for parameters in (a, b)]
            assert names[0] == names[1], where  # DEQSliced calls it z_star, which is accepted here too
            assert [p.kind for p in a] == [p.kind for p in b], where
            for p, q in zip(a, b, strict=True):
                # What must be given there may have a default here; {} and None both stand for no options.
                assert p.default is empty or q.default == p.default or (p.default, q.default) == ({}, None), where
            compared += 1
    assert compared > 60


def test_parts_of_solvers_of_ones_own(td):
    parts = td.solver.utils
    x = torch.arange(12.0).view(2, 2, 3)
    assert parts.batch_flatten(x).shape == (2, 6)
    assert parts.batch_flatten(x[0, 0]).shape == (3, 1)
    mask = torch.tensor([True, False])
    assert torch.equal(parts.batch_masked_mixing(mask, x, -x), torch.stack([x[0], -x[1]]))
    assert torch.equal(parts.batch_masked_mixing(mask, 3, torch.zeros(2)), torch.tensor([3.0, 0.0]))
    with pytest.raises(ValueError):
        parts.batch_masked_mixing(mask, 1, 2)
    trace, lowest, steps = parts.init_solver_info(2, "cpu")
    best = torch.zeros(2, 3)
    for step, residuals in enumerate([[3.0, 1.0], [2.0, 4.0]], start=1):
        diff = torch.tensor(residuals)
        best = parts.update_state(
            best, torch.full((2, 3), float(step)), step, "abs", diff, diff / 8, trace, lowest, steps
        )
    assert torch.equal(best[:, 0], torch.tensor([2.0, 1.0]))
    assert torch.equal(lowest["rel"], torch.tensor([0.25, 0.125]))
    info = td.solver.utils.solver_stat_from_info("abs", lowest, trace, steps)
    assert torch.equal(info["abs_trace"], torch.tensor([[1e8, 3.0, 2.0], [1e8, 1.0, 4.0]]))
    assert torch.equal(info["nstep"], torch.tensor([2.0, 1.0]))
    diff = torch.full((2,), 9.0)
    last = parts.update_state(best, torch.zeros(2, 3), 3, "rel", diff, diff, trace, lowest, steps, return_final=True)
    assert torch.equal(last, torch.zeros(2, 3))
    assert torch.equal(lowest["abs"], diff)


def test_masked_mixing_keeps_nan_out(new):
    mask = torch.tensor([True, False])
    mixed = new.solver.utils.batch_masked_mixing(mask, torch.tensor([1.0, torch.nan]), torch.tensor([torch.nan, 2.0]))
    assert torch.equal(mixed, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "options", [{}, {"clip": True}, {"clip": True, "clip_value": 0.4}, {"learn_scale": False, "target_norm": 0.7}]
)
def test_normed_gradients_are_the_originals(original, new, norm, options):
    gradients = []
    for module in (original, new):
        torch.manual_seed(0)
        linear = nn.Linear(4, 3)
        module.apply_norm(linear, norm, **options)
        module.reset_norm(linear)
        linear(torch.linspace(-1, 2, 8).view(2, 4)).square().sum().backward()
        gradients.append({name: p.grad for name, p in linear.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():  # at the bound of a clip too, where the gradient is halved
        torch.testing.assert_close(gradients[1][name], gradient)


def test_options_of_norms_of_ones_own(td):
    class Scaled:
        _target_modules = {nn.Linear: ("weight", 0)}  # noqa: RUF012
        given = None

        @classmethod
        def apply(cls, module, deq_args=None, **options):
            Scaled.given = options
            return cls()

    td.register_norm("scaled", Scaled)
    td.apply_norm(nn.Linear(2, 2), "scaled", norm_eps=0.1, other=3)
    assert Scaled.given == {"norm_eps": 0.1, "other": 3}
