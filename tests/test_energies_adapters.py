"""Adapters (NumPy code, log-densities, distributions) and the registry."""

import functools
import gc
import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as dist

import energies
from energies import from_distribution, from_log_prob, from_numpy
from rsm_sampler.target.energy import EnergyError

# -- NumPy ----------------------------------------------------------------------------------------

MODULE = """
import os
import time
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
    if x[0] == 106:
        time.sleep(600)
    return float((x**2).sum())

def batch(x):
    return (x**2).sum(-1)

def slow(x):
    time.sleep(0.2)
    return x[:, 0]

def dies_once(path, x):
    if x[0] == 0 and not os.path.exists(path):
        open(path, "w").close()
        os._exit(3)
    return float(x.sum())

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


def test_points_that_end_two_workers_are_refused_and_the_next_call_works(user):
    before = set(multiprocessing.active_children())
    energy = from_numpy(user.fn, vectorized=False, workers=1)
    points = torch.tensor([[1.0, 2.0]] * 9 + [[103.0, -7.0]])
    with pytest.raises(EnergyError) as caught:
        energy(points)
    message = (
        "two worker processes (exit code 3) at points 7 to 9 of 10, in x[0] in [1, 103], x[1]"
    )
    assert message in str(caught.value)
    assert energy(torch.ones(2, 2)).tolist() == [2.0, 2.0]
    del energy, caught  # forgotten without close
    gc.collect()
    deadline = time.monotonic() + 10
    while set(multiprocessing.active_children()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(multiprocessing.active_children()) <= before


METHODS = [
    name if name == "spawn" else pytest.param(name, marks=pytest.mark.slow)
    for name in multiprocessing.get_all_start_methods()
]
# Python 3.12 says so of every process that runs threads.
forks = pytest.mark.filterwarnings("ignore:.*use of fork.* may lead to deadlocks")


@forks
@pytest.mark.parametrize("start_method", METHODS)
def test_points_of_a_worker_that_dies_once_are_tried_again(user, tmp_path, start_method):
    """The function ends its process at the first point, unless a file says that it has."""
    fn = functools.partial(user.dies_once, str(tmp_path / "died"))
    with from_numpy(fn, vectorized=False, workers=2, start_method=start_method) as energy:
        x = torch.arange(40.0).reshape(20, 2)
        assert torch.equal(energy(x), x.sum(-1))
        assert (tmp_path / "died").exists()


def test_a_worker_killed_while_idle_is_replaced(user):
    with from_numpy(user.fn, vectorized=False, workers=2) as energy:
        ids = energy(torch.full((20, 2), 105.0, dtype=torch.float64))
        for pid in set(ids.tolist()):
            os.kill(int(pid), signal.SIGKILL)
        assert energy(torch.ones(20, 2)).tolist() == [2.0] * 20


def test_an_interrupted_call_leaves_no_answers_behind(user, monkeypatch):
    with from_numpy(user.slow, workers=2) as energy:
        energy(torch.zeros(2, 1))
        hear = energy._pool._hear

        def interrupted(*arguments):
            monkeypatch.setattr(energy._pool, "_hear", hear)
            raise KeyboardInterrupt

        monkeypatch.setattr(energy._pool, "_hear", interrupted)
        with pytest.raises(KeyboardInterrupt):
            energy(torch.tensor([[5.0], [6.0]]))
        assert energy(torch.tensor([[1.0], [2.0]])).tolist() == [1.0, 2.0]


@pytest.mark.slow
def test_threads_share_the_workers(user):
    with from_numpy(user.batch, workers=2) as energy, ThreadPoolExecutor(4) as threads:
        inputs = [torch.full((3, 2), float(i)) for i in range(12)]
        for i, value in enumerate(threads.map(energy, inputs)):
            assert value.tolist() == [2.0 * i * i] * 3


PARENT = """
import sys
import torch
import user_energy_module as user
from energies import from_numpy

if __name__ == "__main__":
    energy = from_numpy(user.fn, vectorized=False, workers=2, start_method=sys.argv[1])
    ids = energy(torch.full((20, 2), 105.0, dtype=torch.float64)).tolist()
    print(*sorted({int(i) for i in ids}), flush=True)
    if sys.argv[2] == "busy":
        energy(torch.full((2, 2), 106.0))  # for ten minutes
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("start_method", METHODS)
@pytest.mark.parametrize("state", [pytest.param("idle", marks=pytest.mark.slow), "busy"])
def test_workers_end_with_a_killed_parent(user, tmp_path, start_method, state):
    (tmp_path / "parent.py").write_text(PARENT)
    folders = [str(Path(user.__file__).parent), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, tmp_path / "parent.py", start_method, state]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True) as parent:
        ids = [int(word) for word in parent.stdout.readline().split()]
        assert ids and all(map(_runs, ids))
        time.sleep(0.5)  # until they are at work
        parent.kill()
        deadline = time.monotonic() + 5
        while any(map(_runs, ids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(_runs, ids))


def _runs(pid):
    """Whether a process runs: not gone, and not waiting for its parent to take note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_script_ends_with_its_workers(user, tmp_path):
    """The energy is neither closed nor forgotten."""
    (tmp_path / "parent.py").write_text(PARENT)
    folders = [str(Path(user.__file__).parent), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, tmp_path / "parent.py", "spawn", "idle"]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=60
    )
    assert done.returncode == 0 and done.stderr == b""
    assert not any(map(_runs, map(int, done.stdout.split())))


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_so(user, tmp_path):
    text = PARENT.replace('if __name__ == "__main__":', "if True:")
    (tmp_path / "parent.py").write_text(text)
    folders = [str(Path(user.__file__).parent), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, tmp_path / "parent.py", "spawn", "idle"]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=60
    )
    assert done.returncode == 1
    assert (
        b'could not start (exit code 1): a script needs `if __name__ == "__main__":`'
        in done.stderr
    )


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
        ("math:pi", "a callable energy.* got 'math:pi', which is a value 3.14"),
        ("math:sin", "which is the built-in function sin of math"),
        (
            "os:system",
            "a function written in Python or .*, got 'os:system', which is the built-in",
        ),
        ("os:makedirs", "which is the function makedirs of os"),
        ("os:environ", "which is a value of type _Environ"),
        ("os:environ.get", "which is the built-in function Mapping.get"),
        ("os:path", "which is the module posixpath"),
        ("numpy:exp", "of type ufunc"),
        ("torch:sin", "built-in function"),
        ("subprocess:Popen", "which is the class Popen, .*; give an instance"),
        ("pathlib:Path.cwd", "give an instance"),
        ("energies:Target", "give an instance"),
        ("torch.nn:Linear", "options must be the arguments of what name leads to, got {} for"),
    ],
)
def test_registry_names_what_is_wrong(name, message):
    with pytest.raises(ValueError, match=message):
        energies.get(name)


OWN = """
import functools, os
import torch

class Energy:
    def __init__(self, dim=3, context_dim=None, how="right"):
        self.dim, self.context_dim, self.how, self.seen = dim, context_dim, how, []

    def __call__(self, x, *context):
        self.seen.append((x.shape, x.dtype, *(c.shape for c in context)))
        if self.how == "raises":
            raise ArithmeticError("the model broke down")
        if self.how == "number":
            return 1.0
        if self.how == "single" and x.dtype != torch.float32:
            raise TypeError("single precision only")
        return x if self.how == "shape" else x.square().sum(-1)

class Plain:
    dim = 2

class Never:
    def __init__(self):
        os.environ["RSM_SAMPLER_TEST_CALLED"] = "1"

def function(x):
    return x.square().sum(-1)

instance, conditional, single = Energy(), Energy(2, 4), Energy(how="single")
method, part, cached = instance.__call__, functools.partial(function), functools.cache(function)
raises, number, shape = Energy(how="raises"), Energy(how="number"), Energy(how="shape")
network, value, alias = torch.nn.Identity(), Plain(), os.system
hidden = functools.partial(os.system)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_energy_module.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_energy_module", raising=False)
    import own_energy_module

    yield own_energy_module
    del sys.modules["own_energy_module"]


@pytest.mark.parametrize(
    "name",
    ["instance", "function", "method", "part", "cached", "network", "conditional", "single"],
)
def test_functions_and_objects_are_energies(own, name):
    assert energies.get(f"own_energy_module:{name}") == getattr(own, name)


def test_what_knows_its_dimension_is_tried_on_two_points(own):
    energies.get("own_energy_module:instance")
    assert own.instance.seen == [((2, 3), torch.float64)]
    energies.get("own_energy_module:conditional")
    assert own.conditional.seen == [((2, 2), torch.float64, (2, 4))]
    assert energies.get("own_energy_module:Energy", dim=5).dim == 5


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "values of shape .2,. for points .2, 3., .* raised ArithmeticError: the model"),
        ("number", "which returned float"),
        ("shape", r"got 'own_energy_module:shape', which returned \(2, 3\)"),
        ("Plain", "the class Plain, .*; give an instance"),
        ("value", "a value of type Plain"),
        ("Never", "the class Never"),
        ("alias", "the built-in function system"),
        ("hidden", "the built-in function system"),
        ("os", "the module os"),
    ],
)
def test_other_things_are_no_energies(own, name, message):
    with pytest.raises(ValueError, match=message):
        energies.get(f"own_energy_module:{name}")
    assert "RSM_SAMPLER_TEST_CALLED" not in os.environ


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
