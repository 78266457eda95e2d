"""The peers: their targets and gradients against exact ones, what they learn, what they count.

`TWO` is a mixture of two normal laws in the plane, 0.7 and 0.3, close enough that each way of
learning it takes seconds. A weight w from n draws has the standard error sqrt(w (1 - w) / n); six
of them leave a false-alarm rate of 2e-9 for the draws. What a short training may be off by is
added to that, and is far less than what a method is off by that loses a mode (0.3) or takes both
for equal (0.2).
"""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch

from rsm_sampler import TrainerConfig
from rsm_sampler.baselines import (
    Baseline,
    FABConfig,
    IDEMConfig,
    ddpm,
    fab,
    fab_loss,
    flow_bootstrap,
    idem,
    idem_score,
    langevin,
)
from rsm_sampler.baselines.flow_bootstrap import (
    AnnealedDraws,
    _Buffer,
    _ToSquareRatio,
    annealed_draws,
)
from rsm_sampler.baselines.spline_flow import SplineFlow
from rsm_sampler.baselines.standard import StandardEnergy
from rsm_sampler.montecarlo.markov import HMC
from rsm_sampler.target.energy import EnergyError, MeteredEnergy
from tests.exact import IsotropicMixture, two_modes

DOUBLE = torch.float64
TWO = IsotropicMixture([[1.5, 0.0], [-1.5, 0.0]], [0.6, 0.6], [0.7, 0.3])
N = 20_000
IDEM = IDEMConfig(
    num_draws=512, batch_size=32, updates=8, inner_steps=20, refill=200, width=64, depth=2,
    num_steps=60, learning_rate=3e-3,
)  # fmt: skip
FAB = FABConfig(transforms=2, width=32, learning_rate=3e-3, first_passes=2)
DDPM = TrainerConfig(
    steps_per_cycle=400, max_cycles=1, batch_size=256, width=32, check_draws=512, num_steps=16
)
TINY_IDEM = IDEMConfig(
    num_draws=4, batch_size=8, inner_steps=2, refill=8, buffer_size=12, width=8, num_steps=4
)
TINY_FAB = FABConfig(batch_size=16, buffer_size=40, updates=2, first_passes=2, transforms=1,
                     width=8, bins=4)  # fmt: skip
TINY_DDPM = dataclasses.replace(DDPM, steps_per_cycle=3, check_draws=16, batch_size=16)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(x):
    return x.square().sum(-1) / 2


def right(x):
    """Share of the draws on the right, and what it should be."""
    share = TWO._component_log_prob(x, 0.0)[0].softmax(-1)[:, 0]
    return float(share.mean())


def grid(reach, points):
    """A square grid of points, (points**2, 2), and the area of a cell."""
    axis = torch.linspace(-reach, reach, points, dtype=DOUBLE)
    cells = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flatten(0, 1)
    return cells, float(axis[1] - axis[0]) ** 2


def standard(energy=TWO.energy, dim=2, **options):
    return StandardEnergy(energy, dim, device="cpu", **{"dtype": DOUBLE, **options})


def spline(dim=2, seed=0, **options):
    options = {"transforms": 2, "bins": 4, "width": 16, "depth": 1, **options}
    return SplineFlow(dim, seed=seed, **options).double()


def tiny(method, seed=0, energy=TWO.energy, **options):
    """The shortest run of each method."""
    options = {"seed": seed, "device": "cpu", **options}
    if method == "idem":
        return idem(energy, 2, evaluations=64 * 5 + 63, config=TINY_IDEM, **options)
    if method == "fab":
        return fab(energy, 2, evaluations=16 * 12 * 4 + 5, config=TINY_FAB, **options)
    if method == "ddpm":
        samples = TWO.sample(64, generator=rng(5))
        return ddpm(energy, 2, samples=samples, config=TINY_DDPM, **options)
    return langevin(energy, 2, num_steps=7, keep=2, **options)


METHODS = ["idem", "fab", "ddpm", "langevin"]


@pytest.mark.parametrize("method", METHODS[:3])
def test_training_shows_its_progress_where_asked_to(method, capsys):
    tiny(method, progress=True)
    assert "100%" in capsys.readouterr().err
    tiny(method)  # no terminal
    assert capsys.readouterr().err == ""


# --- coordinates ------------------------------------------------------------------------


def test_gradients_pass_through_the_coordinates_and_are_counted():
    target = standard(loc=torch.tensor([1.0, -2.0]), scale=3.0)
    z = torch.randn(4, 5, 2, dtype=DOUBLE, generator=rng()).requires_grad_()
    (gradient,) = torch.autograd.grad(target(z).sum(), z)
    x = torch.tensor([1.0, -2.0]) + 3.0 * z
    torch.testing.assert_close(gradient, -3.0 * TWO.score(x))
    torch.testing.assert_close(target(z), TWO.energy(x))
    torch.testing.assert_close(target.to_z(target.to_x(z)), z)
    assert target.meter.evaluations == 80


def test_gradients_of_particles_live_on_centred_configurations():
    def springs(x):
        first, second, third = x.unflatten(-1, (3, 2)).unbind(-2)
        return (first - second).square().sum(-1) + 3 * (second - third).square().sum(-1) ** 2

    target = standard(springs, 6, particles=(3, 2), scale=2.0)
    z = torch.randn(7, 4, dtype=DOUBLE, generator=rng()).requires_grad_()
    (gradient,) = torch.autograd.grad(target(z).sum(), z)
    plain = z.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(springs(target.to_x(plain)).sum(), plain)
    torch.testing.assert_close(gradient, expected)
    assert target.to_x(z).unflatten(-1, (3, 2)).mean(-2).abs().max() < 1e-12


# --- iDEM -------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.05, 0.4, 1.5])
def test_the_target_of_idem_tends_to_the_exact_score(sigma):
    """Six standard errors of the delta method in each coordinate, and its bias of order 1/K.

    A self-normalised mean over weights of effective size e has the variance
    sum w_k^2 (g_k - mean)^2 and a bias of at most std(g) / e; false alarm below 1e-6. A value
    target without gradients would pass too, so its variance is asked about in the next test.
    """
    target, num_draws = two_modes(), 100_000
    x_t = torch.tensor([[1.5, 0.2], [0.0, -0.3], [-1.4, -1.0], [2.5, -2.0]], dtype=DOUBLE)
    found = idem_score(target.energy, x_t, sigma, num_draws, generator=rng())
    x_0 = x_t.unsqueeze(1) - sigma * torch.randn(4, num_draws, 2, dtype=DOUBLE, generator=rng())
    weight = torch.softmax(-target.energy(x_0), -1).unsqueeze(-1)
    slope = target.score(x_0)
    mean = (weight * slope).sum(1)
    torch.testing.assert_close(found.score, mean)  # the formula, written out
    spread = (slope - mean.unsqueeze(1)).square()
    se = (weight.square() * spread).sum(1).sqrt()
    bias = (weight * spread).sum(1).sqrt() / found.ess.unsqueeze(-1)
    exact = target.score(x_t, sigma)
    assert bool(((found.score - exact).abs() <= 6 * se + bias).all())
    assert float((6 * se + bias).max()) < 0.15


def test_at_low_noise_the_target_is_the_slope_of_the_energy():
    """Its error is of the order of sigma, where the value target's would be 1 / sigma."""
    target = two_modes()
    x_t = torch.tensor([[1.0, 0.0], [-1.0, 0.3]], dtype=DOUBLE)
    found = idem_score(target.energy, x_t, 1e-6, 4, generator=rng())
    torch.testing.assert_close(found.score, target.score(x_t), rtol=0, atol=1e-4)


def test_long_scores_are_cut_and_keep_their_direction():
    def steep(x):
        return 50 * x[..., 0] + x[..., 1]

    x_t = torch.zeros(2, dtype=DOUBLE)
    cut = idem_score(steep, x_t, 0.1, 4, score_clip=10.0, generator=rng()).score
    whole = idem_score(steep, x_t, 0.1, 4, generator=rng()).score
    torch.testing.assert_close(whole, torch.tensor([-50.0, -1.0], dtype=DOUBLE))
    torch.testing.assert_close(cut, whole * 10 / whole.norm())


def test_idem_recovers_a_mixture():
    """The model may be off by 0.12, three times the scatter over eight seeds, beside the draws.

    The weighted draws are exact: log Z by six of their own standard errors, and by what a few
    hundred of them hide.
    """
    sampler = idem(TWO.energy, 2, evaluations=2_000_000, scale=1.8, config=IDEM, device="cpu")
    x = sampler.sample(N, generator=rng(1))
    assert abs(right(x) - 0.7) < 0.12 + 6 * math.sqrt(0.21 / N)
    assert abs(float(x[:, 1].std()) - 0.6) < 0.15
    spent = [record["evaluations"] for record in sampler.history]
    assert spent == sorted(spent) and spent[-1] == sampler.counts["training"]
    draws = sampler.weighted_draws(4096, generator=rng(2))
    log_z = float(torch.logsumexp(draws.log_weight.double(), 0)) - math.log(4096)
    assert draws.ess > 200
    assert abs(log_z) < 6 * math.sqrt(1 / draws.ess - 1 / 4096) + 0.01


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # within torch
def test_a_compiled_idem_learns_the_same():
    """Up to rounding, and with weights that are not those of the start."""
    eager, compiled, short = (
        idem(TWO.energy, 2, evaluations=64 * steps, device="cpu",
             config=dataclasses.replace(TINY_IDEM, compile=compiled)).denoiser.state_dict()
        for steps, compiled in ((20, False), (20, True), (1, False))
    )  # fmt: skip
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=0)
    assert max(float((eager[name] - short[name]).abs().max()) for name in eager) > 1e-2


def test_idem_of_particles_gives_centred_configurations():
    def pair(x):
        first, second = x.unflatten(-1, (2, 2)).unbind(-2)
        return ((first - second).square().sum(-1) - 4).square() / 8

    sampler = idem(pair, 4, particles=(2, 2), evaluations=64 * 4, config=TINY_IDEM, device="cpu")
    x = sampler.sample(6).unflatten(-1, (2, 2))
    assert x.shape == (6, 2, 2)
    assert x.mean(-2).abs().max() < 1e-5


# --- FAB --------------------------------------------------------------------------------


def test_the_gradient_of_the_fab_loss_is_that_of_the_divergence():
    """Against quadrature of the integral itself, in double precision."""
    flow = spline(seed=3)
    z, _ = grid(6, 121)
    log_p = TWO.log_prob(z)
    parameters = list(flow.parameters())
    exact = torch.autograd.grad(torch.logsumexp(2 * log_p - flow.log_prob(z), 0), parameters)
    log_prob = flow.log_prob(z)
    loss = fab_loss(log_prob, 2 * log_p - log_prob)
    for found, wanted in zip(torch.autograd.grad(loss, parameters), exact, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    assert max(float(wanted.abs().max()) for wanted in exact) > 0.1


def test_the_fab_loss_written_out():
    log_prob = torch.tensor([-1.0, -2.0, -math.inf], dtype=DOUBLE)
    log_weight = torch.tensor([3.0, 1.0, -math.inf], dtype=DOUBLE)
    share = 1 / (1 + math.exp(-2))
    assert float(fab_loss(log_prob, log_weight)) == pytest.approx(share + 2 * (1 - share))
    plain = fab_loss(log_prob, log_weight, self_normalised=False)
    assert float(plain) == pytest.approx((math.exp(3) + 2 * math.exp(1)) / 3)


def test_the_path_goes_from_the_flow_to_the_square_ratio():
    flow, x = spline(seed=1), torch.randn(9, 2, dtype=DOUBLE, generator=rng())
    energy, gradient = TWO.energy(x), -TWO.score(x)
    for beta in (0.0, 0.3, 0.5, 1.0):
        path = _ToSquareRatio(beta, flow)
        leaf = x.clone().requires_grad_()
        log_q = flow.log_prob(leaf)
        expected = -((1 - beta) * log_q + beta * (2 * TWO.log_prob(leaf) - log_q))
        torch.testing.assert_close(path.potential(x, energy), expected.detach())
        (slope,) = torch.autograd.grad(expected.sum(), leaf)
        torch.testing.assert_close(path.slope(x, gradient), slope)


@pytest.mark.parametrize("levels", [1, 3])
def test_annealed_weights_estimate_the_divergence_without_bias(levels):
    """Mean weight against quadrature of the integral of p^2 / q, by five standard errors.

    The energy is off by a constant, which enters twice. Weights of the draws themselves, without
    the steps, have the same mean, so the spread of the weights is asked about as well: the steps
    make it smaller.
    """
    flow, n = spline(seed=2), 6000
    target = standard(IsotropicMixture([[0.5, 0.0]], [0.7], [1.0], log_z=0.3).energy)
    z, area = grid(8, 401)
    with torch.no_grad():
        exact = float((-2 * target(z) - flow.log_prob(z)).exp().sum()) * area
    kernels = [HMC(0.3, 4) for _ in range(levels)]
    found = annealed_draws(target, flow, kernels, n, generator=rng())
    weight = found.log_weight.exp()
    se = float(weight.std()) / math.sqrt(n)
    assert abs(float(weight.mean()) - exact) < 5 * se
    z, log_q = flow.draw(n, generator=rng())
    plain = (-2 * (target(z) + log_q)).exp()
    assert float(weight.std()) < 0.7 * float(plain.std())
    torch.testing.assert_close(found.log_prob, flow.log_prob(found.z).detach())


def test_the_buffer_follows_the_flow():
    """Weights for p^2 / q become those for p^2 / q' at the points that were looked at."""
    z = torch.randn(6, 2, dtype=DOUBLE, generator=rng())
    old, new = spline(seed=1), spline(seed=2)
    log_p, log_q = TWO.log_prob(z), old.log_prob(z).detach()
    buffer = _Buffer(5)
    for part in (slice(0, 2), slice(2, 6)):
        weight = 2 * log_p[part] - log_q[part]
        buffer.add(AnnealedDraws(z[part], weight, log_q[part], 1.0))
    assert torch.equal(buffer.z, z[1:])
    index = torch.tensor([3, 0, 3])
    log_new = new.log_prob(buffer.z[index]).detach()
    torch.testing.assert_close(buffer.follow(index, log_new), log_q[1:][index] - log_new)
    torch.testing.assert_close(buffer.log_weight[index], 2 * log_p[1:][index] - log_new)
    torch.testing.assert_close(buffer.log_weight[[1, 2, 4]], (2 * log_p - log_q)[[2, 3, 5]])
    drawn = buffer.draw(20_000, rng()).bincount(minlength=5) / 20_000
    expected = buffer.log_weight.softmax(0).float()
    torch.testing.assert_close(drawn, expected, rtol=0, atol=2 / 20_000 + 1e-6)


def test_a_flow_has_the_density_of_its_draws():
    flow = spline(seed=4)
    cells, area = grid(8, 321)
    assert float(flow.log_prob(cells).detach().exp().sum()) * area == pytest.approx(1, abs=1e-3)
    z, log_prob = flow.draw(50, generator=rng())
    torch.testing.assert_close(log_prob, flow.log_prob(z).detach())
    value, slope = flow.log_prob_and_slope(z)
    leaf = z.clone().requires_grad_()
    torch.testing.assert_close(slope, torch.autograd.grad(flow.log_prob(leaf).sum(), leaf)[0])
    torch.testing.assert_close(value, log_prob)


def test_fab_recovers_a_mixture():
    """The model may be off by 0.05 raw; its weighted draws by their own error alone."""
    sampler = fab(TWO.energy, 2, evaluations=80_000, scale=1.8, config=FAB, device="cpu")
    x = sampler.sample(N, generator=rng(1))
    assert abs(right(x) - 0.7) < 0.05 + 6 * math.sqrt(0.21 / N)
    draws = sampler.weighted_draws(N, generator=rng(2))
    assert draws.ess > 0.7 * N
    log_z = float(torch.logsumexp(draws.log_weight.double(), 0)) - math.log(N)
    assert abs(log_z) < 6 * math.sqrt(1 / draws.ess - 1 / N) + 1e-4
    torch.testing.assert_close(draws.log_prob, sampler.log_prob(draws.x), rtol=0, atol=1e-4)


def test_draws_of_a_flow_come_in_pieces(monkeypatch):
    sampler = fab(normal, 2, evaluations=16 * 12 * 3, config=TINY_FAB, device="cpu")
    x, log_prob = sampler.sample_with_log_prob(40, generator=rng(1))
    monkeypatch.setattr(flow_bootstrap, "_CHUNK", 16)
    pieces = sampler.sample_with_log_prob(40, generator=rng(1))
    torch.testing.assert_close(pieces, (x, log_prob))
    assert len(sampler.weighted_draws(33).x) == 33


def test_a_flow_in_one_dimension():
    sampler = fab(normal, 1, evaluations=16 * 12 * 3, config=TINY_FAB, device="cpu")
    assert sampler.sample(5).shape == (5, 1)


def test_zuko_leaves_the_global_state_alone():
    code = (
        "import torch\n"
        "from torch.distributions import Distribution, Normal\n"
        "from rsm_sampler.baselines.spline_flow import SplineFlow\n"
        "before = torch.get_rng_state(), dict(vars(Distribution))\n"
        "SplineFlow(2, transforms=1, bins=4, width=8, depth=1, seed=0)\n"
        "assert torch.equal(before[0], torch.get_rng_state())\n"
        "assert before[1] == dict(vars(Distribution))\n"
        "try:\n"
        "    Normal(0.0, -1.0)\n"
        "except ValueError:\n"
        "    print('validated')"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.stderr) == ("validated", "")


def test_a_missing_zuko_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko.flows", None)
    with pytest.raises(ImportError, match=r"rsm-sampler\[flows\]") as error:
        tiny("fab")
    assert error.value.name == "zuko"


# --- DDPM -------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["exact", "chains"])
def test_ddpm_recovers_a_mixture(source):
    """Of 4,000 samples the share itself has the standard error 0.007; the model may add 0.04."""
    options = {"samples": TWO.sample(4000, generator=rng(3)).float()}
    if source == "chains":
        options = {"evaluations": 200_000, "num_samples": 4000, "scale": 2.0}
    sampler = ddpm(TWO.energy, 2, config=DDPM, device="cpu", **options)
    x = sampler.sample(N, generator=rng(1))
    allowed = 0.04 + 6 * math.sqrt(0.21 / N + 0.21 / 4000)
    assert abs(right(x) - 0.7) < allowed
    assert sampler.counts.get("mcmc", 0) == (0 if source == "exact" else 199_296)
    assert sampler.counts["check"] == 512


# --- Langevin ---------------------------------------------------------------------------


def test_annealed_langevin_recovers_a_mixture():
    """Chains are independent; their steps may move 0.02 between the modes.

    Steps of 0.4 widen a mode by 4 % in variance, by which six standard errors are enlarged.
    """
    n, h = 2000, 0.4
    sampler = langevin(
        TWO.energy, 2, num_steps=1000, scale=2.0, detail=0.6, step_size=h, device="cpu"
    )
    x = sampler.sample(n, generator=rng(1))
    assert abs(right(x) - 0.7) < 0.02 + 6 * math.sqrt(0.21 / n)
    variance = 0.36 / (1 - h * h / 4)
    assert abs(float(x[:, 1].var()) - variance) < 6 * variance * math.sqrt(2 / n)
    assert sampler.counts == {"mcmc": 2 * 1001 * n}


def test_naive_langevin_has_its_own_stationary_law():
    """The variance of a normal law comes out as 1 / (1 - h^2 / 4); five standard errors."""
    n, h, detail = 8000, 1.2, 0.8
    sampler = langevin(
        normal,
        1,
        num_steps=60,
        annealing=0.0,
        detail=detail,
        step_size=h / detail,
        device="cpu",
        dtype=DOUBLE,
    )
    variance = 1 / (1 - h * h / 4)
    x = sampler.sample(n, generator=rng())
    assert abs(float(x.var()) - variance) < 5 * variance * math.sqrt(2 / n)


@pytest.mark.parametrize("annealing", [0.0, 0.5])
def test_far_modes_are_weighed_by_where_the_chains_start(annealing):
    """A limit of the method: 0.9 of the mass is on the right, but no chain crosses over."""
    far = IsotropicMixture([[6.0], [-6.0]], [1.0, 1.0], [0.9, 0.1])
    sampler = langevin(
        far.energy, 1, num_steps=300, annealing=annealing, scale=7.0, detail=1.0, device="cpu"
    )
    share = float((sampler.sample(2000, generator=rng()) > 0).double().mean())
    assert abs(share - 0.5) < 0.1


def test_kept_states_are_the_last_ones_of_each_chain():
    sampler = langevin(normal, 2, num_steps=10, annealing=0.5, keep=5, device="cpu")
    x = sampler.sample(13, generator=rng())
    assert x.shape == (13, 2)
    assert sampler.counts == {"mcmc": 2 * 11 * 3}
    single = langevin(normal, 2, num_steps=10, annealing=0.5, device="cpu")
    assert torch.equal(single.sample(3, generator=rng()), x[-3:])


# --- all of them ------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_decides_everything(method):
    state = torch.get_rng_state()
    first, again, other = (tiny(method, seed) for seed in (0, 0, 1))
    x = first.sample(9)
    assert torch.equal(x, again.sample(9))
    assert not torch.equal(x, other.sample(9))
    assert torch.equal(first.sample(4, generator=rng()), again.sample(4, generator=rng()))
    assert first.counts == again.counts
    assert torch.equal(state, torch.get_rng_state())
    assert isinstance(first, Baseline)
    assert x.shape == (9, 2) and first.sample(0).shape == (0, 2)


def test_evaluations_are_exact():
    """Also those of the energy itself: a gradient is one more than the one call."""
    calls = []

    def counted(x):
        calls.append(len(x))
        return TWO.energy(x)

    for method, expected in (("idem", 64 * 5), ("fab", 16 * 12 * 4)):
        calls.clear()
        sampler = tiny(method, energy=counted)
        assert sum(sampler.counts.values()) == expected == 2 * sum(calls)
        assert sampler.history[-1]["evaluations"] == expected
        sampler.sample(10)
        assert 2 * sum(calls) == expected
    calls.clear()
    sampler = tiny("langevin", energy=counted)
    assert sampler.counts == {} and calls == []
    sampler.sample(10)
    assert sampler.counts == {"mcmc": 2 * 8 * 5} and sum(calls) == 8 * 5


@pytest.mark.parametrize("method", METHODS)
def test_a_meter_is_counted_on(method):
    meter = MeteredEnergy(TWO.energy, 2)
    sampler = tiny(method, energy=meter)
    sampler.sample(3)
    assert meter.evaluations == sum(sampler.counts.values()) > 0


@pytest.mark.parametrize("method", ["idem", "fab", "langevin"])
def test_precision_is_as_asked_for(method):
    x = tiny(method, dtype=DOUBLE, loc=torch.tensor([0.5, 0.0]), scale=2.0).sample(4)
    assert x.dtype == DOUBLE and bool(x.isfinite().all())


@pytest.mark.parametrize("method", ["idem", "fab", "langevin"])
def test_an_energy_that_is_nowhere_finite_is_an_error(method):
    def nowhere(x):
        return x.sum(-1) * math.nan

    with pytest.raises(EnergyError, match="finite somewhere"):
        tiny(method, energy=nowhere).sample(4)
    if method == "fab":  # with so many passes that none of the first ones reports
        with pytest.raises(EnergyError, match="finite somewhere"):
            fab(nowhere, 2, evaluations=16 * 12 * 600, config=TINY_FAB, device="cpu")


@pytest.mark.parametrize("method", ["idem", "fab", "langevin"])
def test_an_energy_without_gradients_is_refused(method):
    with pytest.raises(EnergyError, match="differentiable by autograd"):
        tiny(method, energy=lambda x: TWO.energy(x.detach())).sample(4)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_they_run_on_a_gpu(method):
    x = tiny(method, device="cuda").sample(5)
    assert x.device.type == "cuda" and bool(x.isfinite().all())


# --- bad input --------------------------------------------------------------------------


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
        ({"scale": math.inf}, "scale must be a finite number, got inf"),
        ({"loc": math.nan}, "loc must be a finite number, got nan"),
        ({"loc": torch.zeros(3)}, "loc must be a finite number or 2 of them"),
        ({"dtype": torch.int64}, "dtype must be a floating-point type, got torch.int64"),
        ({"device": "nowhere"}, "device must be available on this machine, got 'nowhere'"),
    ],
)
@pytest.mark.parametrize("method", ["idem", "fab", "langevin"])
def test_bad_arguments_are_named(method, options, message):
    with pytest.raises(ValueError, match=message):
        tiny(method, **options)


@pytest.mark.bad_input
@pytest.mark.parametrize("method", METHODS)
def test_an_energy_must_be_callable(method):
    with pytest.raises(TypeError, match="energy must be a callable, got str"):
        tiny(method, energy="many-well-32")


@pytest.mark.bad_input
def test_too_few_evaluations_say_what_would_do():
    with pytest.raises(ValueError, match="evaluations must be at least 64 for one step, got 63"):
        idem(normal, 2, evaluations=63, config=TINY_IDEM)
    with pytest.raises(ValueError, match="evaluations must be at least 192 for one pass, got 191"):
        fab(normal, 2, evaluations=191, config=TINY_FAB)
    with pytest.raises(ValueError, match="evaluations must be at least 1152 beside those"):
        ddpm(normal, 2, evaluations=1000, config=TINY_DDPM)


@pytest.mark.bad_input
def test_particles_must_fit():
    with pytest.raises(ValueError, match=r"particles must have n s equal to dim 2, got \(3, 2\)"):
        tiny("idem", particles=(3, 2))
    with pytest.raises(ValueError, match=r"loc must be 0 for particles, got 1\.0"):
        tiny("fab", particles=(2, 1), loc=1.0)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (IDEMConfig, {"num_draws": 0}, "num_draws must be at least 1, got 0"),
        (IDEMConfig, {"score_clip": 0.0}, "score_clip must be positive, got 0.0"),
        (IDEMConfig, {"sigma_max": 0.01}, "sigma_max must be finite and above sigma_min 0.01"),
        (FABConfig, {"levels": 0}, "levels must be at least 1, got 0"),
        (FABConfig, {"bins": 1}, "bins must be at least 2, got 1"),
        (FABConfig, {"weight_clip": -1.0}, "weight_clip must be positive, got -1.0"),
        (FABConfig, {"buffer_size": 3}, "buffer_size must be at least batch_size 256, got 3"),
    ],
)
def test_settings_are_checked_when_they_are_made(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"keep": 6}, "keep must be at most 5, the steps at the target, got 6"),
        ({"annealing": 1.0}, "annealing must be at least 0 and below 1, got 1.0"),
        ({"step_size": 2.0}, "step_size must be positive and below 2, got 2.0"),
        ({"detail": -1.0}, "detail must be positive and finite, got -1.0"),
    ],
)
def test_bad_chains_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        langevin(normal, 2, **{"num_steps": 10, **options})


@pytest.mark.bad_input
def test_ddpm_wants_samples_or_evaluations():
    samples = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="samples or evaluations must be given, one of them"):
        ddpm(normal, 2)
    with pytest.raises(ValueError, match="got samples and evaluations=5"):
        ddpm(normal, 2, samples=samples, evaluations=5)
    with pytest.raises(ValueError, match="num_chains must be at least 1, got 0"):
        ddpm(normal, 2, evaluations=10_000, num_chains=0)
    with pytest.raises(ValueError, match=r"scale must be positive, got -1\.0"):
        ddpm(normal, 2, samples=samples, scale=-1.0)


@pytest.mark.bad_input
def test_bad_arguments_of_the_parts():
    with pytest.raises(ValueError, match=r"score_clip must be positive, got 0\.0"):
        idem_score(normal, torch.zeros(1, 2), 1.0, 4, score_clip=0.0)
    with pytest.raises(ValueError, match=r"log_weight must have shape \(2,\), got \(3,\)"):
        fab_loss(torch.zeros(2), torch.zeros(3))
    for method in ("fab", "langevin"):
        with pytest.raises(ValueError, match="n must be at least 0, got -1"):
            tiny(method).sample(-1)
