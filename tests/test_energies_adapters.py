"""Adapters (NumPy code, log-densities, distributions) and the registry."""

import gc
import math
import multiprocessing
import pickle
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as dist

import energies
from energies import from_distribution, from_log_prob, from_numpy

# -- NumPy ----------------------------------------------------------------------------------------

MODULE = """
import os
import numpy as np

class Picky(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")

def fn(x):
    if x[0] == 101:
        return 1 / 0
    if x[0] == 102:
        raise Picky("one", "two")
    if x[0] == 103:
        os._exit(3)
    if x[0] == 104:
        return float("nan")
    if x[0] == 105:
        return float(os.getpid())
    return float((x**2).sum())

def batch(x):
    return (x**2).sum(-1)

def with_context(x, c):
    return float(x @ c)
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A user's module, which worker processes can import as well."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "user_energy_module.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import user_energy_module

        yield user_energy_module


@pytest.fixture(scope="module")
def pool(user):
    with from_numpy(user.fn, vectorized=False, workers=2) as energy:
        yield energy


@given(batch=st.lists(st.integers(0, 4), max_size=3), double=st.booleans())
def test_numpy_energies_keep_shape_and_dtype(batch, double):
    dtype = torch.float64 if double else torch.float32
    x = torch.arange(math.prod(batch) * 2, dtype=dtype).reshape(*batch, 2)

    def seen(points):
        assert points.dtype == np.float64
        assert points.shape == (math.prod(batch), 2)
        return points.sum(-1)

    for energy in (from_numpy(seen), from_numpy(lambda p: p.sum(), vectorized=False)):
        value = energy(x)
        assert value.dtype == dtype
        assert value.shape == tuple(batch)
        torch.testing.assert_close(value, x.sum(-1))


def test_numpy_energies_take_tensors_with_gradients():
    energy = from_numpy(lambda x: x.sum(-1))
    value = energy(torch.ones(3, 2, requires_grad=True))
    assert not value.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numpy_functions_may_work_in_place(dtype):
    """The points are the sampler's own."""

    def centred(x):
        x -= 3.0
        return 0.5 * (x**2).sum(-1)

    points = torch.ones(4, 2, dtype=dtype)
    value = energies.from_numpy(centred)(points)
    assert torch.equal(points, torch.ones(4, 2, dtype=dtype))
    assert torch.equal(value, torch.full((4,), 4.0, dtype=dtype))


def test_a_circle_is_not_the_whole_line():
    """The density of VonMises repeats itself beyond pi, the law does not."""
    target = energies.from_distribution(torch.distributions.VonMises(0.0, 4.0))
    value = target(torch.tensor([[0.0], [3.1], [3.2], [10 * math.pi]]))
    assert value[:2].isfinite().all() and value[2:].isposinf().all()


def test_numpy_context_broadcasts():
    x, c = torch.randn(4, 3, 2), torch.randn(3, 5)
    expected = x.sum(-1) + c.sum(-1)
    batch = from_numpy(lambda x, c: x.sum(-1) + c.sum(-1), context=True)
    point = from_numpy(lambda x, c: x.sum() + c.sum(), context=True, vectorized=False)
    torch.testing.assert_close(batch(x, c), expected)
    torch.testing.assert_close(point(x, c), expected)


def test_nan_and_infinity_pass_through():
    energy = from_numpy(lambda x: np.array([np.nan, np.inf, 1.0]))
    value = energy(torch.zeros(3, 1))
    assert value.isnan().tolist() == [True, False, False]
    assert value.isposinf().tolist() == [False, True, False]


def test_an_exception_arrives_with_its_traceback_and_point(user):
    energy = from_numpy(user.fn, vectorized=False)
    with pytest.raises(ZeroDivisionError) as caught:
        energy(torch.tensor([[1.0, 2.0], [101.0, 7.0]]))
    assert caught.traceback[-1].name == "fn"
    assert "at point 1: x = [101.0, 7.0]" in caught.value.__notes__[0]

    def broken(x):
        raise KeyError("inside")

    with pytest.raises(KeyError) as caught:
        from_numpy(broken)(torch.zeros(5, 2))
    assert "points 0 to 4" in caught.value.__notes__[0]


def test_pool_evaluates_in_other_processes(pool):
    x = torch.randn(7, 11, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(pool(x), (x**2).sum(-1), rtol=0, atol=1e-15)
    assert pool(x[:0]).shape == (0, 11)
    assert pool(x[0, 0]).shape == ()
    elsewhere = pool(torch.full((20, 2), 105.0, dtype=torch.float64))
    assert multiprocessing.current_process().pid not in elsewhere.tolist()
    assert bool(pool(torch.full((1, 2), 104.0)).isnan())


def test_pool_sends_exceptions_home_and_goes_on(pool):
    x = torch.zeros(50, 2)
    x[37] = torch.tensor([101.0, 3.0])
    with pytest.raises(ZeroDivisionError) as caught:
        pool(x)
    notes = "\n".join(caught.value.__notes__)
    assert "at point 37: x = [101.0, 3.0]" in notes
    assert "return 1 / 0" in notes  # the user's own line
    x[37, 0] = 102.0  # an exception that cannot travel
    with pytest.raises(RuntimeError, match="Picky: one and two") as caught:
        pool(x)
    assert "at point 37" in "\n".join(caught.value.__notes__)
    assert pool(torch.ones(3, 2)).tolist() == [2.0, 2.0, 2.0]


def test_pool_closes_cleanly(user):
    before = set(multiprocessing.active_children())
    energy = from_numpy(user.batch, workers=1)
    assert set(multiprocessing.active_children()) == before  # nothing starts before the first call
    assert energy(torch.ones(3, 2)).tolist() == [2.0, 2.0, 2.0]
    assert len(set(multiprocessing.active_children()) - before) == 1
    twin = pickle.loads(pickle.dumps(energy))  # travels without its processes
    assert twin._pool is None
    energy.close()
    energy.close()
    assert set(multiprocessing.active_children()) == before
    with pytest.raises(RuntimeError, match="closed"):
        energy(torch.ones(3, 2))


def test_a_dead_worker_is_explained_and_replaced(user):
    before = set(multiprocessing.active_children())
    energy = from_numpy(user.fn, vectorized=False, workers=1)
    with pytest.raises(RuntimeError, match="a worker process ended abruptly"):
        energy(torch.full((2, 2), 103.0))
    assert energy(torch.ones(2, 2)).tolist() == [2.0, 2.0]
    del energy  # forgotten without close
    gc.collect()
    deadline = time.monotonic() + 10
    while set(multiprocessing.active_children()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_numpy(3), "fn must be callable, got 3"),
        (lambda: from_numpy(np.sum, workers=-1), "workers must be at least 0, got -1"),
        (lambda: from_numpy(lambda x: x, workers=2), "fn must be picklable when workers > 0"),
        (lambda: from_numpy(np.sum, start_method="thread"), "start_method must be one of"),
        (lambda: from_numpy(lambda x: x)(torch.zeros(3, 2)), r"fn must return shape \(3,\)"),
        (lambda: from_numpy(lambda x: x.sum())(torch.zeros(3, 2)), "vectorized=False"),
        (
            lambda: from_numpy(lambda x: x, vectorized=False)(torch.zeros(3, 2)),
            "fn must return one number for one point",
        ),
        (lambda: from_numpy(lambda x: x[:, 0] * 1j)(torch.zeros(3, 2)), "real numbers"),
        (
            lambda: from_numpy(np.sum)(torch.zeros(3, 2), torch.zeros(1)),
            "context must be left out",
        ),
        (lambda: from_numpy(np.sum, context=True)(torch.zeros(3, 2)), "context must be given"),
        (lambda: from_log_prob(None), "fn must be callable, got None"),
        (lambda: from_log_prob(lambda x: x)(torch.zeros(3, 2)), r"fn must return shape \(3,\)"),
        (lambda: from_log_prob(lambda x: 1.0)(torch.zeros(3, 2)), "fn must return a tensor"),
        (lambda: from_distribution(1.0), "distribution must be of type Distribution, got 1.0"),
        (lambda: from_distribution(dist.Normal(torch.zeros(2), 1.0)), "Independent"),
        (lambda: from_distribution(dist.Poisson(1.0)), "distribution must be continuous"),
        (lambda: from_distribution(dist.Wishart(3.0, torch.eye(2))), "event shape"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


# -- log-densities and distributions --------------------------------------------------------------


def test_log_prob_turns_the_sign_and_keeps_gradients():
    energy = from_log_prob(lambda x, c: -(x * c).sum(-1))
    x = torch.ones(3, 2, requires_grad=True)
    value = energy(x, torch.full((3, 2), 5.0))
    assert value.tolist() == [10.0, 10.0, 10.0]
    value.sum().backward()
    assert bool((x.grad == 5).all())


LAWS = {
    "normal": lambda: dist.Normal(1.0, 2.0),
    "multivariate": lambda: dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
    "gamma": lambda: dist.Independent(dist.Gamma(torch.tensor([2.0, 3.0]), 1.0), 1),
    "unchecked": lambda: dist.Independent(
        dist.Beta(torch.tensor([2.0, 3.0]), 2.0, validate_args=False), 1, validate_args=False
    ),
    "dirichlet": lambda: dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])),
    "lognormal": lambda: dist.LogNormal(0.0, 1.0),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])), dist.Normal(torch.tensor([-3.0, 3.0]), 1.0)
    ),
}


@pytest.mark.parametrize("name", LAWS)
def test_distributions_become_targets(name):
    law = LAWS[name]()
    state = torch.get_rng_state()
    target = from_distribution(law)
    x = target.sample((4, 5), generator=torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(x, target.sample((4, 5), generator=torch.Generator().manual_seed(0)))
    inner = x if law.event_shape else x.squeeze(-1)
    torch.testing.assert_close(target(x), -law.log_prob(inner))
    torch.testing.assert_close(target.log_prob(x), law.log_prob(inner))
    assert target(x.double()).dtype == torch.float64
    assert bool(target(torch.full((target.dim,), torch.nan)).isnan())
    low, high = target.extent
    assert bool(((x >= low) & (x <= high)).all())


@pytest.mark.parametrize("name", ["gamma", "unchecked", "dirichlet", "lognormal"])
def test_outside_of_the_support_the_energy_is_infinite(name):
    target = from_distribution(LAWS[name]())
    inside = target.sample((), generator=torch.Generator().manual_seed(0))
    x = torch.stack([inside, torch.full_like(inside, -1.0)]).requires_grad_()
    energy = target(x)
    assert energy.isposinf().tolist() == [False, True]
    energy[0].backward()
    assert bool(x.grad.isfinite().all())
    assert bool(target(x[1:].detach()).isposinf().all())  # nobody inside


def test_distribution_cells():
    target = from_distribution(dist.Independent(dist.Normal(torch.zeros(2), 1.0), 1))
    edges = torch.tensor([-9.0, 0.0, 9.0])
    torch.testing.assert_close(
        target.cell_masses(edges, edges), torch.full((2, 2), 0.25).double(), atol=1e-6, rtol=0
    )


# -- registry -------------------------------------------------------------------------------------


def test_registry_knows_its_names():
    expected = {"paper-mixture", "gmm40", "two-moons", "rings", "grid9", "funnel"}
    assert expected | {"many-well-32", "double-well", "student-t"} <= set(energies.names())
    for name in energies.names():
        target = energies.get(name)
        assert target.name == name
        assert name in repr(target)
    assert energies.get("student-t", dim=5, df=2.0).dim == 5


def test_registry_follows_import_paths(user):
    assert energies.get("user_energy_module:batch") is user.batch
    assert energies.get("energies:Rings").name == "rings"
    assert energies.get("energies:GaussianMixture.paper").name == "paper-mixture"
    assert energies.get("energies:from_numpy", fn=user.batch)(torch.ones(2, 2)).tolist() == [2, 2]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gmm4", "did you mean 'gmm40'"),
        ("no_such_module_here:x", "a module that can be imported"),
        ("energies:nothing", "has no 'nothing'"),
        ("energies:", "must look like"),
        ("math:pi", "a callable energy"),
    ],
)
def test_registry_names_what_is_wrong(name, message):
    with pytest.raises(ValueError, match=message):
        energies.get(name)


def test_a_broken_import_inside_a_users_module_is_shown(tmp_path, monkeypatch):
    (tmp_path / "broken_energy_module.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing"):
        energies.get("broken_energy_module:energy")


@pytest.mark.parametrize(
    ("fn", "vectorized", "message"),
    [
        (lambda x: (x[:, 0], x[:, 1]), True, r"nothing beside it, got a tuple \(ndarray, nd"),
        (lambda x: (x[0], x[1]), False, "fn must return one number for one point, and nothing"),
        (lambda x: {"logp": x[:, 0]}, True, "fn must return an array of energies, .* got dict"),
        (lambda x: None, False, "fn must return one number for one point, got NoneType"),
    ],
)
def test_blobs_and_nothing_are_refused(fn, vectorized, message):
    with pytest.raises(ValueError, match=message):
        from_numpy(fn, vectorized=vectorized)(torch.zeros(3, 2))
