"""The targets of the benchmarks of exploration: energies, draws, masses and log Z agree."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, stats

FOLDER = Path(__file__).parent.parent / "examples" / "benchmarks"
POSTERIORS = ("epidemic", "orbit", "light-curve", "labels")
CHECKED = {"light-curve"}  # by a nested sampler, too

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the source tree")
sys.path.insert(0, str(FOLDER))
try:
    import exploration_posteriors as posteriors
    import exploration_targets as targets
finally:
    sys.path.remove(str(FOLDER))

EXACT = [name for name in targets.MAKERS if name not in POSTERIORS]
# Not differentiable within the support, or a density that does not vanish at its edge.
EDGED = {
    "island_nan_2d", "hole_inf_3d", "hole_inf_14d", "island_inf_6d", "corner_2d", "corner_14d",
    "corner_6d", "plateau_4d", "plateau_3d",
}  # fmt: skip
# Derivatives without a fourth moment: the central limit theorem comes too late.
WILD = {"funnel", "funnel_shifted_10d", "eight"}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", EXACT)
def test_draws_have_the_masses_and_the_energy_is_an_energy(name):
    """Pearson's statistic of the shares; soft shares vary less than counts. False alarm 1e-7."""
    case, n = targets.get(name), 4000
    x = case.draw(n, generator())
    energy = case.energy(x)
    assert x.shape == (n, case.dim) and x.dtype == energy.dtype == torch.float64
    assert energy.shape == (n,) and bool(energy.isfinite().all())
    torch.testing.assert_close(case.energy(x[5:6]), energy[5:6], rtol=1e-12, atol=1e-9)
    assert case.energy(x.float()).dtype == torch.float32
    low, high = case.bounds or (-math.inf, math.inf)
    assert bool(((x >= torch.as_tensor(low)) & (x <= torch.as_tensor(high))).all())
    if case.box is not None and not case.heavy and "funnel" not in name:
        assert float(((x > case.box[0]) & (x < case.box[1])).all(-1).double().mean()) > 0.999
    if case.masses is not None and name != "mw32":  # whose regions overlap
        share = case.shares(x)
        assert float(case.masses.sum()) == pytest.approx(1, abs=1e-9)
        torch.testing.assert_close(share.sum(-1), torch.ones(n, dtype=torch.float64))
        pearson = n * float(((share.mean(0) - case.masses).square() / case.masses).sum())
        assert pearson < stats.chi2.isf(1e-7, len(case.masses) - 1) * (2 if case.heavy else 1)


@pytest.mark.parametrize("name", [name for name in EXACT if name not in EDGED | WILD])
def test_draws_follow_the_energy(name):
    """Stein's identity, E[f'(x_i) - f(x_i) dE/dx_i] = 0 with f = tanh((x_i - median) / spread).

    Six standard errors: false alarm below 1e-6 over all coordinates. Detects, in two dimensions,
    a mode's width off by 5 %.
    """
    case, n = targets.get(name), 4000
    x = case.draw(n, generator(3)).requires_grad_()
    (slope,) = torch.autograd.grad(case.energy(x).sum(), x)
    x = x.detach()
    quartiles = x.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), 0)
    spread = quartiles[2] - quartiles[0]
    bend = ((x - quartiles[1]) / spread).tanh()
    terms = (1 - bend.square()) / spread - bend * slope
    score = terms.mean(0) / (terms.std(0) / math.sqrt(n))
    assert float(score.abs().max()) < 6


def test_steins_identity_sees_a_wrong_width():
    case = targets.get("two_2d_same_far")
    x = 1.05 * case.draw(20_000, generator(3))
    x[:, 0] -= 0.05 * 60 * (x[:, 0] > 30)  # only the widths, not the distance
    x.requires_grad_()
    (slope,) = torch.autograd.grad(case.energy(x).sum(), x)
    y = x.detach()
    y = y[y[:, 0] < 30]
    terms = (1 - y.tanh().square()) - y.tanh() * slope[x.detach()[:, 0] < 30]
    score = terms.mean(0) / (terms.std(0) / math.sqrt(len(y)))
    assert float(score.abs().max()) > 6


PARTS = {
    "normal": lambda: targets.Normal(targets.point(0.3, -0.2), 0.5),
    "turned": lambda: targets.Normal(
        targets.point(0.3, -0.2), torch.tensor([[0.6, 0.0], [0.4, 0.3]], dtype=torch.float64)
    ),
    "student": lambda: targets.Student(targets.point(0.1, 0.2), 0.7, 30.0),
    "box": lambda: targets.Box(-2.0, 2.0, 2),
    "inside": lambda: targets.Radial(2, 0.8, 0.0, 1.0),
    "outside": lambda: targets.Radial(2, 1.0, 0.8, math.inf),
    "shell": lambda: targets.Shell(targets.point(0.2, 0.1), 1.5, 0.2),
    "banana": lambda: targets.Banana(targets.point(0, -1), 1.0, 0.4, 0.5),
}


@pytest.mark.parametrize("kind", PARTS)
def test_components_are_normalised_and_draw_their_law(kind):
    """The density adds up to one, and shares of a grid's columns fit draws; false alarm 1e-7."""
    part = PARTS[kind]()
    cells = 1200
    edges = torch.linspace(-8, 8, cells + 1, dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    grid = torch.cartesian_prod(middle, middle)
    mass = part.log_prob(grid).exp().view(cells, cells) * (16 / cells) ** 2
    smooth = kind not in {"box", "inside", "outside"}
    assert float(mass.sum()) == pytest.approx(1, abs=1e-5 if smooth else 2e-3)
    n = 20_000
    x = part.draw(n, generator(4))
    for axis in (0, 1):
        share = mass.sum(1 - axis).view(60, -1).sum(-1)
        count = torch.histc(x[:, axis], 60, -8, 8)
        often = share * n > 10
        pearson = ((count - n * share).square() / (n * share))[often].sum()
        assert float(pearson) < stats.chi2.isf(1e-7, int(often.sum())) + (0 if smooth else 30)


def test_the_corner_is_normalised_and_draws_its_law():
    part = targets.Corner(-2.0, 3.0, 1, 4.0)
    value, _ = integrate.quad(
        lambda u: float(part.log_prob(torch.tensor([[u]], dtype=torch.float64)).exp()), -2, 3
    )
    assert value == pytest.approx(1, abs=1e-8)
    x = part.draw(20_000, generator())[:, 0]
    law = stats.truncexpon(20, 0, 0.25)
    band = math.sqrt(math.log(2 / 1e-6) / 40_000)  # Dvoretzky-Kiefer-Wolfowitz
    assert stats.kstest((3 - x).numpy(), law.cdf).statistic <= band


@pytest.mark.parametrize("name", ["eggbox", "shells2", "moons", "rings", "ring_spot_2d"])
def test_log_z_in_the_plane(name):
    """The trapezoidal rule on a fine grid."""
    case, cells = targets.get(name), 2000
    low, high = case.bounds or case.box or (targets.ones(2, -9), targets.ones(2, 9))
    nodes = [torch.linspace(float(low[i]), float(high[i]), cells).double() for i in (0, 1)]
    step = (nodes[0][1] - nodes[0][0]) * (nodes[1][1] - nodes[1][0])
    parts = [
        (-case.energy(torch.cartesian_prod(piece, nodes[1]))).logsumexp(0)
        for piece in nodes[0].split(400)
    ]
    log_z = float(torch.stack(parts).logsumexp(0) + step.log())
    assert log_z == pytest.approx(case.log_z, abs=2e-3)


def test_log_z_of_the_eggs_in_space():
    case = targets.get("eggs25_3d")
    nodes = [torch.linspace(-0.5, 0.5, 121).double(), torch.linspace(-6, 6, 241).double()]
    grid = torch.cartesian_prod(nodes[0], nodes[0], nodes[1])
    cell = 2 * math.log(1 / 120) + math.log(12 / 240)
    log_z = float((-case.energy(grid)).logsumexp(0)) + cell + math.log(25)
    assert log_z == pytest.approx(case.log_z, abs=1e-4)


def test_log_z_of_rosenbrocks_chain():
    """Against a sum over a grid of the last but one coordinates, in three dimensions."""
    case = targets.rosenbrock(3, targets.HARD)("rosen3")
    a, b = torch.linspace(-4, 4, 4001).double(), torch.linspace(-2, 12, 7001).double()
    pieces = [
        -(100 * (b - p[:, None] ** 2) ** 2 + (1 - p[:, None]) ** 2 + (1 - b) ** 2)
        for p in a.split(500)
    ]
    total = torch.stack([piece.flatten().logsumexp(0) for piece in pieces]).logsumexp(0)
    log_z = float(total) + 2 * math.log(0.002) + 0.5 * math.log(math.pi / 100)
    assert case.log_z == pytest.approx(log_z, abs=1e-6)
    assert targets.get("rosen4").log_z == pytest.approx(-5.8792, abs=1e-4)


def test_log_z_that_others_have_published():
    """Of the eggbox and of shells, Feroz, Hobson and Bridges (2009), means over their boxes."""
    eggbox = targets.get("eggbox").log_z - 2 * math.log(10 * math.pi)
    assert eggbox == pytest.approx(235.88, abs=0.03)
    for dim, mean in ((2, -1.75), (10, -14.59)):
        box = dim * math.log(12)
        assert targets.get(f"shells{dim}").log_z - box == pytest.approx(mean, abs=0.01)


def test_eight_schools_against_importance_sampling():
    """Effects are integrated out by their normal laws: draws of the rest from a wide Student law.

    Five standard errors; false alarm below 1e-6.
    """
    case, n = targets.get("eight"), 200_000
    mu_log_tau = case.draw(4000, generator(1))[:, :2]
    law = stats.multivariate_t(
        mu_log_tau.mean(0).numpy(), 1.5 * np.cov(mu_log_tau.numpy().T), df=4
    )
    z = torch.as_tensor(law.rvs(n, random_state=np.random.default_rng(2)))
    effect = targets.point(28, 8, -3, 7, -1, 1, 18, 12)
    error = targets.point(15, 10, 16, 11, 9, 11, 10, 18)
    tau = z[:, 1:2].exp()
    precision = tau**-2 + error**-2
    mean = (z[:, :1] / tau**2 + effect / error**2) / precision
    theta = mean + torch.randn(n, 8, generator=generator(3)).double() / precision.sqrt()
    log_q = torch.as_tensor(law.logpdf(z.numpy())) + torch.distributions.Normal(
        mean, precision.rsqrt(), validate_args=False
    ).log_prob(theta).sum(-1)
    log_weight = -case.energy(torch.cat([z, theta], -1)) - log_q
    weight = (log_weight - case.log_z).exp()
    assert abs(float(weight.mean()) - 1) < 5 * float(weight.std()) / math.sqrt(n)


@pytest.mark.parametrize("name", targets.SETS["hidden"] + targets.SETS["kinds_hidden"])
def test_the_hidden_mode_has_the_basin_that_is_said(name):
    """Within the radius the energy falls towards the centre; a start rarely lies there."""
    case = targets.get(name)
    mode = case.hidden
    inwards = -mode.centre / mode.centre.norm()
    steps = torch.linspace(0, 1, 200).double()[1:, None]
    energy = case.energy(mode.centre + steps * 0.98 * mode.radius * inwards)
    assert bool((energy.diff() > 0).all())
    beyond = case.energy(mode.centre + torch.tensor([[1.05], [1.1]]) * mode.radius * inwards)
    assert float(beyond.diff()) < 1e-4
    assert float(case.masses[-1]) == mode.mass >= 0.3
    shares = [mode.share_of_normal(torch.zeros(case.dim).double(), s) for s in (0.1, 1, 10, 100)]
    assert max(shares) < 1e-3


def test_shares_of_starts():
    """Against counting; five standard errors."""
    mode = targets.Hidden(targets.point(1, 2), 0.1, 0.3, 1.5)
    x = targets.point(0.5, 0) + 2 * torch.randn(100_000, 2, generator=generator()).double()
    share = mode.share_of_normal(targets.point(0.5, 0), 2.0)
    count = float(((x - mode.centre).norm(dim=-1) < 1.5).double().mean())
    assert abs(count - share) < 5 * math.sqrt(share / 100_000)
    box = mode.share_of_box(targets.point(-3, -3), targets.point(5, 5))
    assert box == pytest.approx(math.pi * 1.5**2 / 64)
    assert mode.share_of_box(targets.point(2, 2), targets.point(5, 5)) == 0


def test_scores_see_what_is_wrong():
    case = targets.get("two_5d_half")
    x = case.draw(20_000, generator(8))
    right, half = case.score(x), case.score(x[x[:, 0] < 0])
    assert right["tv"] < 0.02 and right["ks"] < 0.02 and right["mean"] < 0.05
    assert right["missed"] == 0 and right["ess"] == pytest.approx(20_000)
    assert half["tv"] == pytest.approx(0.25, abs=1e-3) and half["missed"] == 1
    assert half["ks"] == pytest.approx(0.25, abs=0.02)
    # Weights that undo a wrong split.
    first = x[:, 0] < 0
    uneven = torch.cat([x[first][:3000], x[~first][:3000]])
    log_weight = torch.cat([torch.full((3000,), math.log(3)), torch.zeros(3000)]).double()
    log_weight = log_weight[: len(uneven)]
    assert case.score(uneven, log_weight)["tv"] < 0.02 < case.score(uneven)["tv"]
    x[:10] = math.nan
    assert case.score(x)["lost"] == 10


# ------------------------------------------------------------------ posteriors


@pytest.mark.parametrize("name", POSTERIORS)
def test_priors_are_normalised_and_transformed(name):
    """Quantiles and densities are of one law: d quantile / du = exp(energy)."""
    for prior in posteriors.MODELS[name].parameters.values():
        if not math.isfinite(prior.a):
            continue
        u = np.linspace(0.05, 0.95, 19)
        slope = (prior.quantile(u + 1e-6) - prior.quantile(u - 1e-6)) / 2e-6
        energy = prior.energy(torch.as_tensor(prior.quantile(u)))
        np.testing.assert_allclose(np.log(slope), energy.numpy(), atol=1e-6)
        low, high = prior.bounds
        if math.isfinite(low):
            assert float(prior.energy(targets.point(low - 1e-9))) == math.inf
        if math.isfinite(high):
            assert float(prior.energy(targets.point(high + 1e-9))) == math.inf


@pytest.mark.parametrize("name", POSTERIORS)
def test_references_belong_to_the_models(name):
    """Data as they were made; the truth within the marginals; two ways to log Z agree."""
    model, reference = posteriors.load(name)
    fresh = posteriors.MODELS[name]()
    torch.testing.assert_close(model.data, fresh.data, rtol=1e-6, atol=1e-6)
    quantiles = np.array(reference["quantiles"])
    assert quantiles.shape == (model.dim, 199) and bool((np.diff(quantiles) > 0).all())
    truth = np.array(reference["truth"])
    assert bool(((truth > quantiles[:, 0]) & (truth < quantiles[:, -1])).all())
    assert reference["log_z_se"] < 0.005 and reference["ess"] > 20_000
    if name in CHECKED:
        assert reference["log_z"] == pytest.approx(reference["nested_log_z"], abs=0.06)
    x = torch.tensor([truth.tolist(), quantiles[:, 100].tolist()], dtype=torch.float64)
    assert bool(model(x).isfinite().all())


def test_the_epidemic_solves_its_equations():
    model = posteriors.Epidemic()
    x = torch.tensor([[1.7, 0.45, 3.0, 0.15]], dtype=torch.float64)

    def slope(_, y):
        return [-1.7 * y[0] * y[1], 1.7 * y[0] * y[1] - 0.45 * y[1]]

    days = np.arange(1, 13)
    right = integrate.solve_ivp(
        slope, (0, 12), [0.997, 0.003], t_eval=days, rtol=1e-10, atol=1e-12
    )
    np.testing.assert_allclose(model.curve(x)[0].numpy(), 1000 * right.y[1], rtol=2e-4)
    wild = torch.tensor([[1e7, 0.45, 3.0, 0.15], [1.7, 1e9, 3.0, 0.15]], dtype=torch.float64)
    assert bool((model(wild) == math.inf).all())


def test_the_orbit_solves_keplers_equation():
    """Velocities against numerical derivatives of positions along the line of sight."""
    model = posteriors.Orbit()
    period, e, omega, phase = 10**1.92, 0.35, 2.6, 3.4
    times = np.linspace(0, 200, 41)

    def anomaly(t):
        mean = phase + 2 * np.pi * t / period
        value = mean
        for _ in range(200):
            value = mean + e * np.sin(value)
        return value

    def sight(t):
        angle = anomaly(t)
        x, y = np.cos(angle) - e, np.sqrt(1 - e * e) * np.sin(angle)
        return x * np.sin(omega) + y * np.cos(omega)

    h = 1e-3
    velocity = (sight(times + h) - sight(times - h)) / (2 * h)
    velocity *= period / (2 * np.pi) * np.sqrt(1 - e * e)
    x = torch.tensor([[1.92, 28.0, e, omega, phase, 12.0]], dtype=torch.float64)
    curve = model.curve(x, torch.as_tensor(times))[0].numpy()
    np.testing.assert_allclose(curve, 12 + 28 * velocity, atol=1e-5)


def test_labels_may_be_exchanged():
    model = posteriors.Labels()
    x = torch.tensor([list(model.truth)], dtype=torch.float64)
    swapped = x[:, [2, 1, 0, 5, 4, 3, 6, 7]].clone()
    swapped[:, 6], swapped[:, 7] = -x[:, 6], x[:, 7] - x[:, 6]
    assert float(model(swapped)) == pytest.approx(float(model(x)), abs=1e-9)
