"""QSM, DIPO, DACER and QVPO: losses against slow references written from the equations."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

from rl.critics import Critic
from rl.dacer import DACER, DACERConfig
from rl.dipo import DIPO, DIPOConfig, SecondActions, ascend
from rl.mixtures import fit_mixtures
from rl.off_policy import Alone, NextAction
from rl.policies import DiffusionPolicy, inward_cut
from rl.qsm import QSM, LangevinPolicy, QSMConfig
from rl.qvpo import QVPO, QVPOConfig
from rl.replay import Batch, ReplayBuffer
from rsm_sampler.losses import denoising_loss
from rsm_sampler.schedules import Cosine, Linear
from tests.test_rl_agents import (
    ACT,
    DOUBLE,
    OBS,
    N,
    batch,
    filled_replay,
    gradients,
    in_double,
    rng,
    small,
)


def make(kind, preset="corrected", *, double=True, **changes):
    agent = small(kind, preset, **{"policy_period": 1, **changes})
    return in_double(agent) if double else agent


def near(found, expected, rtol=1e-5, atol=1e-7):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def slope_of(value, action):
    """The gradient of a function of one action, by autograd on that action alone."""
    action = action.detach().clone().requires_grad_()
    return torch.autograd.grad(value(action), action)[0]


class Quadratic(Critic):
    """Twin values -|a - centre|^2 / (2 width^2), whatever the state."""

    def __init__(self, centre, width):
        super().__init__(OBS, ACT, width=1, depth=1)
        self.centre, self.width = centre, width

    def values(self, observation, action):
        value = -(action - self.centre).square().sum(-1) / (2 * self.width**2)
        return torch.stack([value, value])


# --- QSM -------------------------------------------------------------------------------


def test_qsm_loss_is_the_regression_on_the_noised_score():
    """Gradients alone as targets: the mean of the K slopes under the weights, state by state."""
    agent = make(QSM, target="gradient", temperature=0.3, temperature_rule="fixed", wall=0.2)
    data = batch(dtype=DOUBLE)
    agent.generator.manual_seed(7)
    loss, metrics = agent.policy_loss(data, NextAction(data.action))

    g = rng(7)
    sigma = agent.policy.sigmas[torch.randint(1, 11, (N,), generator=g)].double()
    x_t = data.action + sigma[:, None] * torch.randn(N, ACT, dtype=DOUBLE, generator=g)
    candidates = agent._kernel.draw(x_t, sigma, 8, generator=g).x_0
    beyond = 0
    reference, ess = 0.0, 0.0
    for i in range(N):
        log_weight, slopes = [], []
        for a in candidates[i]:

            def log_density(a, i=i):
                inside = a.clamp(-1, 1)
                value = agent.critic.values(data.observation[i], inside).amin()
                return value / 0.3 - (a - inside).square().sum() / (2 * 0.2**2)

            beyond += int(a.abs().max() > 1)
            # phi / r, of which the part that depends on a is one over the broad normal density
            log_weight.append(log_density(a).detach() + a.square().sum() / (2 * 0.8**2))
            slopes.append(slope_of(log_density, a))
        weight = torch.softmax(torch.stack(log_weight), 0)
        ess += float(1 / weight.square().sum()) / 8 / N
        target = x_t[i] + sigma[i] ** 2 * (weight[:, None] * torch.stack(slopes)).sum(0)
        error = agent.policy.denoiser(x_t[i], sigma[i], data.observation[i]) - target
        reference = reference + (1 / 0.25 + 1 / sigma[i] ** 2) * error.square().sum() / N
    assert 0 < beyond < 8 * N  # on both sides of the walls
    near(loss, reference)
    near(gradients(agent, loss), gradients(agent, reference))
    assert float(metrics["q_weight_ess"]) == pytest.approx(ess, rel=1e-5)


@pytest.mark.parametrize("level", [1, 4, 7, 10])
def test_qsm_targets_are_those_of_the_exact_law(level):
    """A quadratic value whose law N(0.2, 0.15^2) lies within the box, at every noise level.

    20,000 candidates tell the mean to 0.15 / sqrt(20,000 / 20) = 0.005 where one in twenty counts;
    the gradient at the noisy action, of the published code, is off by 0.15 and more.
    """
    agent = make(QSM, num_draws=20_000, temperature=2.0, temperature_rule="fixed")
    agent.critic = Quadratic(0.2, 0.15 / math.sqrt(2.0))
    sigma = agent.policy.sigmas[level].double()
    x_t = 0.2 + sigma * torch.randn(6, ACT, dtype=DOUBLE, generator=rng(1))
    agent.generator.manual_seed(3)
    found = agent._estimate(torch.zeros(6, OBS, dtype=DOUBLE), x_t, sigma.expand(6)).mean
    exact = 0.2 + 0.15**2 / (0.15**2 + sigma**2) * (x_t - 0.2)
    assert (found - exact).abs().max() < 0.02


def test_qsm_walls_keep_the_law_in_the_box():
    """A value that rises outwards for ever: the law ends within a few widths of the wall."""
    agent = make(QSM, num_draws=4000, temperature=1.0, temperature_rule="fixed", wall=0.05)
    agent.critic = Quadratic(30.0, 3.0)
    sigma = agent.policy.sigmas[[2, 6, 10]].double()
    x_t = sigma[:, None] * torch.randn(3, ACT, dtype=DOUBLE, generator=rng(1))
    mean = agent._estimate(torch.zeros(3, OBS, dtype=DOUBLE), x_t, sigma).mean
    assert mean.abs().max() < 1.1


def test_published_qsm_loss_is_the_noise_plus_the_gradient():
    agent = make(QSM, "official")
    data = batch(dtype=DOUBLE)
    agent.generator.manual_seed(7)
    loss, _ = agent.policy_loss(data, NextAction(data.action))
    g, alpha_bar = rng(7), agent.policy.schedule.alpha_bar(torch.arange(6))
    t = torch.randint(1, 6, (N,), generator=g)
    noise = torch.randn(N, ACT, dtype=DOUBLE, generator=g)
    reference = 0.0
    for i in range(N):
        keep = alpha_bar[t[i]]
        a_t = keep.sqrt() * data.action[i] + (1 - keep).sqrt() * noise[i]
        slope = slope_of(lambda a, i=i: agent.critic.values(data.observation[i], a).mean(), a_t)
        sigma = agent.policy.sigmas[t[i]]
        predicted = agent.policy.denoiser.noise(a_t / keep.sqrt(), sigma, data.observation[i])
        reference = reference + (predicted + 50 * slope).square().sum() / N
    near(loss, reference, rtol=1e-4)
    near(gradients(agent, loss), gradients(agent, reference), rtol=1e-4, atol=1e-6)


def test_qsm_of_the_comparison_regresses_on_clean_gradients():
    agent = make(QSM, "icml2025")
    data = batch(dtype=DOUBLE)
    loss, _ = agent.policy_loss(data, NextAction(data.action))
    reference = 0.0
    for i in range(N):
        s, a = data.observation[i], data.action[i]
        slope = slope_of(lambda a, s=s: agent.critic.values(s, a).min(), a)
        reference = reference + (agent.policy.score(s, a) - slope).square().sum() / N
    near(gradients(agent, loss), gradients(agent, reference))


def test_langevin_actions_follow_their_recursion():
    policy = LangevinPolicy(OBS, ACT, 4, width=16, generator=rng()).double()
    observation = batch(3, DOUBLE).observation
    found = policy.sample(observation, 5, generator=rng(2))
    noise = torch.randn(5, 3, 5, ACT, dtype=DOUBLE, generator=rng(2))
    for i, j in itertools.product(range(3), range(5)):
        x = noise[0, i, j].clamp(-1, 1)
        for k, delta in enumerate((1.0, 0.75, 0.5, 0.25)):
            step = 0.5 * delta * policy.score(observation[i], x).detach()
            x = (x + step + math.sqrt(delta) * noise[k + 1, i, j]).clamp(-1, 1)
        near(found[i, j], x)


def test_qsm_temperature_follows_the_entropy():
    for target, sign in ((5.0, 1), (-5.0, -1)):
        agent = make(QSM, double=False, target_entropy=target, temperature_lr=0.01, min_ess=1e-3)
        entropy = float(agent.update(filled_replay())["entropy_per_dim"])
        assert sign * (target - entropy) > 1
        assert math.log(agent.temperature) == pytest.approx(0.01 * sign, rel=1e-6)


# --- DIPO ------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_ascent_is_adam_within_the_box(clip):
    """Against torch's own optimiser, on all actions as one parameter."""
    critic = Critic(OBS, ACT, width=16, generator=rng()).double()
    data = batch(dtype=DOUBLE)
    found = ascend(critic, data.observation, data.action, steps=12, lr=0.1, clip=clip)
    x = data.action.clone().requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.1, maximize=True)
    for _ in range(12):
        optimiser.zero_grad()
        critic.values(data.observation, x).amin(0).sum().backward(inputs=[x])
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([x], clip * ACT)
        optimiser.step()
        with torch.no_grad():
            x.clamp_(-1, 1)
    near(found, x.detach())
    assert (found.abs() == 1).any() and not (found.abs() == 1).all()
    assert all(p.requires_grad and p.grad is None for p in critic.parameters())
    better = critic.minimum(data.observation, found) > critic.minimum(
        data.observation, data.action
    )
    assert better.all()


@pytest.mark.parametrize("write_back", [True, False])
def test_dipo_loss_is_denoising_of_moved_actions(write_back):
    agent, replay = make(DIPO, write_back=write_back), filled_replay()
    replay._rows = [rows.double() for rows in replay._rows]
    agent.before_update(replay)
    start = 0.5 * agent._second.actions.clone()
    agent._second.actions.copy_(start)
    taken = replay.actions.clone()
    agent.generator.manual_seed(7)
    moved, _ = agent.policy_batch(batch(dtype=DOUBLE), Alone())
    loss, _ = agent.policy_loss(moved, NextAction(taken[:N]))
    g = rng(7)
    places = (torch.rand(N, dtype=DOUBLE, generator=g) * 64).long()
    sigma = agent.policy.sigmas[torch.randint(1, 11, (N,), generator=g)]
    noise = torch.randn(N, ACT, dtype=DOUBLE, generator=g)
    reference = 0.0
    for i, place in enumerate(places):
        s, a = replay.all().observation[place], start[place]
        moved = ascend(agent.critic, s[None], a[None], steps=5, lr=0.03)[0]
        error = agent.policy.denoiser(moved + sigma[i] * noise[i], sigma[i], s) - moved
        reference = reference + (1 / 0.25 + 1 / sigma[i] ** 2) * error.square().sum() / N
        near(agent._second.actions[place], moved if write_back else a)
    near(loss, reference)
    near(gradients(agent, loss), gradients(agent, reference))
    assert torch.equal(replay.actions, taken)  # critics learn from what was done
    untouched = torch.ones(64, dtype=torch.bool)
    untouched[places] = False
    assert torch.equal(agent._second.actions[untouched], start[untouched])


def test_second_actions_follow_the_ring():
    """What was moved stays until its transition is overwritten."""
    replay, data = ReplayBuffer(10, OBS, ACT), batch()
    second = SecondActions(replay)
    for n, fresh in ((6, range(6)), (3, range(6, 9)), (3, (9, 0, 1)), (0, ()), (10, range(10))):
        replay.add(Batch(*(rows[:n] for rows in data)))
        before = second.actions.clone()
        second.follow()
        for place in range(10):
            source = replay.actions if place in fresh else before
            assert torch.equal(second.actions[place], source[place])
        second.put(torch.tensor([1, 4]), torch.full((2, ACT), 0.25))


def test_second_actions_climb_to_the_optimum_and_are_saved_for_training_alone():
    agent = make(DIPO, double=False, action_lr=0.05)
    agent.critic = Quadratic(0.4, 1.0)
    replay = filled_replay()
    agent.before_update(replay)
    for _ in range(60):
        agent.policy_batch(batch(), Alone())
    error = (agent._second.actions - 0.4).abs()
    assert error.mean() < 0.03 < (replay.actions - 0.4).abs().mean()
    agent = make(DIPO, double=False)
    agent.update(replay)
    assert "second_actions" not in agent.state(training=False)
    kept = agent.state()["second_actions"]
    assert not torch.equal(kept["actions"], replay.actions) and kept["count"] == 64
    agent.release()
    assert torch.equal(agent.state()["second_actions"]["actions"], kept["actions"])
    again = make(DIPO, double=False)
    again.load_state(copy.deepcopy(agent.state()))
    for each in (agent, again):
        each.update(replay)
    assert torch.equal(agent._second.actions, again._second.actions)
    # Of another replay, with fewer transitions, they cannot be.
    other = ReplayBuffer(64, OBS, ACT)
    other.add(batch(20))
    agent.update(other)
    assert agent._second.count == 20


# --- DACER -----------------------------------------------------------------------------


def test_a_walk_with_given_noises_is_the_chain():
    policy = DiffusionPolicy(OBS, ACT, Linear(6, scale=0.8), width=16, generator=rng()).double()
    observation = batch(dtype=DOUBLE).observation
    noise = torch.stack([torch.randn(N, ACT, dtype=DOUBLE, generator=g) for g in [rng(4)] * 6])
    sampled = policy.sample(observation, 1, generator=rng(4))[:, 0]
    near(policy.walk(observation, noise), sampled, rtol=1e-4, atol=1e-5)


def test_cut_actions_keep_a_way_back():
    x = torch.tensor([-3.0, -3.0, -1.0, 0.3, 1.0, 2.0, 2.0], requires_grad=True)
    gradient = torch.tensor([1.0, -1.0, 1.0, -2.0, -1.0, 1.0, -1.0])
    y = inward_cut(x)
    y.backward(gradient)
    assert torch.equal(y.detach(), x.detach().clamp(-1, 1))
    assert x.grad.tolist() == [0.0, -1.0, 1.0, -2.0, -1.0, 1.0, 0.0]


@pytest.mark.parametrize("inward", [True, False])
def test_dacer_loss_is_the_value_of_the_chain(inward):
    """Equation (8) in the paper's variable, state by state, back through every step."""
    agent = make(DACER, inward_gradient=inward, num_steps=4, kappa=2.0)
    with torch.no_grad():  # some actions beyond the box, some within
        agent.policy.network.body.weights[-1].mul_(12)
    data = batch(dtype=DOUBLE)
    agent.generator.manual_seed(7)
    loss, _ = agent.policy_loss(data, NextAction(data.action))
    noise = torch.randn(5, N, ACT, dtype=DOUBLE, generator=rng(7))
    alpha_bar = Cosine(4).alpha_bar(torch.arange(5))
    cut = inward_cut if inward else lambda x: x.clamp(-1, 1)
    reference, cuts = 0.0, 0
    for i in range(N):
        a = noise[0, i] * math.sqrt(1 - alpha_bar[4])
        for t in range(4, 0, -1):
            beta = 1 - alpha_bar[t] / alpha_bar[t - 1]
            sigma = torch.tensor(math.sqrt(1 / alpha_bar[t] - 1), dtype=DOUBLE)
            clean = agent.policy.denoiser(a / alpha_bar[t].sqrt(), sigma, data.observation[i])
            cuts += int((clean.abs() > 1).any())
            clean = cut(clean)
            a = beta * alpha_bar[t - 1].sqrt() / (1 - alpha_bar[t]) * clean + (
                (1 - alpha_bar[t - 1]) * (1 - beta).sqrt() / (1 - alpha_bar[t]) * a
            )
            if t > 1:
                variance = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta
                a = a + variance.sqrt() * noise[5 - t, i]
        noisy = cut(a + 0.1 * 2.0 * noise[4, i])
        reference = reference - agent.critic.values(data.observation[i], noisy).min() / N
    assert 0 < cuts < 4 * N
    near(loss, reference)
    near(gradients(agent, loss), gradients(agent, reference), rtol=1e-4, atol=1e-7)


def test_critics_of_returns_follow_their_loss():
    agent = make(DACER, reward_scale=0.5, discount=0.9)
    with torch.no_grad():  # slow copies that differ, and returns wide enough to be cut
        for p in agent.target_critic.parameters():
            p.mul_(1.5)
    data = batch(dtype=DOUBLE)
    data = data._replace(reward=8 * data.reward)
    spread = torch.tensor([0.3, 0.9], dtype=DOUBLE)
    agent._spread.copy_(spread[:, None])
    drawn = NextAction(data.action.flip(0))
    agent.generator.manual_seed(7)
    loss, values = agent.critic_loss(data, drawn)
    z = torch.randn(N, dtype=DOUBLE, generator=rng(7)).clamp(-3, 3)
    mean, std = agent.critic.law(data.observation, data.action)
    near(values, mean)
    bar_mean, bar_std = agent.target_critic.law(data.next_observation, drawn.action)
    omega = 0.995 * spread + 0.005 * std.detach().mean(1)
    reference, cut = 0.0, 0
    for i, j in itertools.product(range(2), range(N)):
        low = int(bar_mean[:, j].argmin())
        alive = 0.9 ** float(data.span[j]) * (1 - float(data.terminated[j]))
        y = 0.5 * float(data.reward[j]) + alive * float(bar_mean[low, j])
        draw = y + alive * float(bar_std[low, j]) * float(z[j])
        q, s, limit = mean[i, j], std[i, j], 3 * float(omega[i])
        q_0, s_0 = float(q.detach()), float(s.detach())
        bounded = q_0 + min(limit, max(-limit, draw - q_0))
        cut += abs(draw - q_0) > limit
        pull = (y - q_0) / (s_0**2 + 0.1)
        widen = ((q_0 - bounded) ** 2 - s_0**2) / (s_0**3 + 0.1)
        reference = reference - (float(omega[i]) ** 2 + 0.1) * (q * pull + s * widen) / N
    assert 0 < cut < 2 * N
    near(loss, reference)
    parameters = list(agent.critic.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(reference, parameters),
        strict=True,
    ):
        near(mine, theirs)
    near(agent._spread[:, 0].double(), omega)


def test_the_first_spread_is_the_one_measured():
    agent = make(DACER)
    data = batch(dtype=DOUBLE)
    agent.critic_loss(data, NextAction(data.action))
    std = agent.critic.law(data.observation, data.action)[1].mean(1)
    near(agent._spread[:, 0].double(), std.detach())


def test_mixtures_are_those_of_another_library():
    """Three well separated clusters: the same optimum as scikit-learn's."""
    mixture = pytest.importorskip("sklearn.mixture")
    g, centres = rng(3), torch.tensor([[-4.0, 0.0], [0.0, 3.0], [4.0, 0.0]], dtype=DOUBLE)
    part = torch.multinomial(torch.tensor([0.5, 0.2, 0.3]), 600, True, generator=g)
    spread = torch.tensor([[0.5, 0.2], [0.3, 0.9], [1.0, 0.4]], dtype=DOUBLE)[part]
    x = centres[part] + spread * torch.randn(600, 2, dtype=DOUBLE, generator=g)
    found = fit_mixtures(x.expand(8, -1, -1), 3, iterations=200, generator=g)
    theirs = mixture.GaussianMixture(3, random_state=0, n_init=5, tol=1e-10, max_iter=500)
    theirs.fit(x.numpy())
    best = int(found.cross_entropy(x.expand(8, -1, -1)).argmin())  # of eight random beginnings
    order, other = found.mean[best, :, 0].argsort(), np.argsort(theirs.means_[:, 0])
    near(found.weight[best, order], torch.from_numpy(theirs.weights_[other]), rtol=1e-3)
    near(found.mean[best, order], torch.from_numpy(theirs.means_[other]), rtol=1e-3, atol=1e-3)
    covariance = found.factor[best] @ found.factor[best].mT
    expected = torch.from_numpy(theirs.covariances_[other])
    near(covariance[order], expected, rtol=1e-3, atol=1e-3)
    entropy = -theirs.score(x.numpy())
    assert float(found.cross_entropy(x.expand(8, -1, -1))[best]) == pytest.approx(
        entropy, rel=1e-4
    )
    each = [0.5 * np.linalg.slogdet(2 * math.pi * math.e * c)[1] for c in theirs.covariances_]
    bound = (theirs.weights_ * (each - np.log(theirs.weights_))).sum()
    assert float(found.component_entropy()[best]) == pytest.approx(bound, rel=1e-3)


def test_entropies_of_a_normal_law():
    """Of a fit of 5 parameters to 32 points: 5 / 64 nats too few on these, too many on others.

    The bound by three components is too large by up to one nat.
    """
    x = 0.1 * torch.randn(400, 64, 2, dtype=DOUBLE, generator=rng(1))
    exact = math.log(2 * math.pi * math.e * 0.01)
    found = fit_mixtures(x[:, :32], 1, generator=rng(2))
    inside, outside = (found.cross_entropy(part).mean() - exact for part in x.chunk(2, 1))
    noise = 5 / math.sqrt(400 * 32)  # a log-density of two dimensions has variance 1
    assert float(inside) == pytest.approx(-5 / 64, abs=noise)
    assert float(inside + outside) / 2 == pytest.approx(0.0, abs=0.02 + noise)
    assert float(outside) > 0.05
    bound = fit_mixtures(x, 3, iterations=1, generator=rng(2)).component_entropy().mean()
    assert float(bound) > exact + 0.3


def test_mixtures_of_degenerate_points_stay_finite():
    x = torch.ones(2, 20, 3)
    x[0, :10] = -1
    found = fit_mixtures(x, 3, generator=rng())
    for value in (found.component_entropy(), found.cross_entropy(x)):
        assert bool(value.isfinite().all())


def test_kappa_is_tuned_to_the_entropy():
    """Towards the target from either side, and to the exact noise for a policy without width."""
    for target, sign in ((50.0, 1), (-50.0, -1)):
        agent = make(DACER, double=False, kappa_entropy=target, kappa=2.0)
        replay = filled_replay()
        agent.update(replay)
        assert agent.kappa == pytest.approx(2.0)
        metrics = agent.update(replay)
        assert "entropy_per_dim" in metrics
        assert sign * math.log(agent.kappa / 2.0) == pytest.approx(0.03, rel=1e-3)
        assert float(agent._noise) == pytest.approx(0.1 * agent.kappa)
    agent = make(DACER, double=False, entropy_draws=400, entropy_components=1, kappa=3.0)
    agent.policy.sample = lambda s, m, generator: torch.zeros(len(s), m, ACT)
    for _ in range(150):
        agent._tune(replay)
    assert agent.kappa == pytest.approx(0.984, abs=0.06)


def test_the_noises_of_evaluation_are_saved():
    agent = make(DACER, double=False, evaluation_candidates=3)
    again = DACER(OBS, ACT, agent.config, seed=5, device="cpu")
    again.load_state(agent.state(training=False))
    found = [each.predict(np.zeros(OBS), deterministic=True)[0] for each in (agent, again)]
    np.testing.assert_array_equal(*found)


# --- QVPO ------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["corrected", "official", "icml2025"])
def test_qvpo_loss_is_weighted_denoising_of_the_best_and_of_uniform_actions(preset):
    changes = {"policy_states": 5, "draws_per_state": 6, "uniform_actions": 3}
    agent = make(QVPO, preset, **changes)
    if preset == "icml2025":
        with torch.no_grad():
            agent.critic.biases[-1].add_(1.0)  # some values above 1, some below
    data, config = batch(dtype=DOUBLE), agent.config
    agent.before_update(filled_replay())
    agent.generator.manual_seed(7)
    loss, _ = agent.policy_loss(data, NextAction(data.action))

    g = rng(7)
    states = data.observation[:5]
    draws = agent.policy.sample(states, 6, generator=g)
    uniform = 2 * torch.rand(15, ACT, dtype=DOUBLE, generator=g) - 1
    other = states.repeat(3, 1)
    if preset == "icml2025":
        order = torch.rand(15 * OBS, dtype=DOUBLE, generator=g).argsort()
        other = other.flatten()[order].view(15, OBS)
    t = torch.randint(1, config.num_steps + 1, (20,), generator=g)
    noise = torch.randn(20, ACT, dtype=DOUBLE, generator=g)
    terms, weights = [], []

    def term(action, state, j):
        sigma = agent.policy.sigmas[t[j]]
        error = agent.policy.denoiser(action + sigma * noise[j], sigma, state) - action
        scale = 1 / sigma**2 + (4 if preset == "corrected" else 0)
        return scale * error.square().sum()

    for i in range(5):
        values = [agent.critic.values(states[i], a).min().item() for a in draws[i]]
        best = max(values)
        weight = best * (best > 1) if preset == "icml2025" else best - sum(values) / 6
        terms.append(term(draws[i, values.index(best)], states[i], i))
        weights.append(weight)
    c = 0.1 if preset == "corrected" else 0.2
    for j in range(15):
        terms.append(term(uniform[j], other[j], 5 + j))
        weights.append(weights[j % 5] * c / 3)
    total = sum(weights) / 20 if preset == "corrected" else 1.0
    assert sum(weights) > 0 and (preset != "icml2025" or 0 in weights)
    reference = sum(w / total * x for w, x in zip(weights, terms, strict=True)) / 20
    near(loss, reference)
    near(gradients(agent, loss), gradients(agent, reference))


def test_qvpo_does_not_see_the_scale_of_values():
    data, found = batch(dtype=DOUBLE), []
    for shift, scale in ((0.0, 1.0), (40.0, 1.0), (0.0, 7.0)):
        agent = make(QVPO)
        with torch.no_grad():
            agent.critic.weights[-1].mul_(scale)
            agent.critic.biases[-1].add_(shift)
        found.append(gradients(agent, agent.policy_loss(data, NextAction(data.action))[0]))
    near(found[0], found[1])
    near(found[0], found[2])


def test_qvpo_without_an_advantage_does_nothing():
    """A value that is the same for all actions: weights of zero, and no NaN."""
    agent = make(QVPO)
    with torch.no_grad():
        agent.critic.weights[-1].zero_()
    data = batch(dtype=DOUBLE)
    loss = agent.policy_loss(data, NextAction(data.action))[0]
    assert loss.item() == 0 and not gradients(agent, loss).any()


def test_qvpo_with_one_uniform_action_each_is_denoising_of_both():
    """With equal weights, on the same random numbers, as the core's own loss."""
    agent = make(QVPO, uniform_actions=1, uniform_share=1.0, uniform_share_final=1.0)
    agent._best = lambda observation: (data.action, torch.ones(N, dtype=DOUBLE))
    data = batch(dtype=DOUBLE)
    agent.generator.manual_seed(7)
    loss = agent.policy_loss(data, NextAction(data.action))[0]
    g = rng(7)
    uniform = 2 * torch.rand(N, ACT, dtype=DOUBLE, generator=g) - 1
    sigma = agent.policy.sigmas[torch.randint(1, 11, (2 * N,), generator=g)]
    both, context = torch.cat([data.action, uniform]), data.observation.repeat(2, 1)
    plain = denoising_loss(agent.policy.denoiser, both, sigma, context=context, generator=g)
    near(loss, plain.mean())


def test_the_uniform_share_falls():
    agent = make(
        QVPO,
        double=False,
        uniform_share=0.4,
        uniform_share_final=0.1,
        uniform_share_updates=3,
    )
    shares = []
    for _ in range(5):
        agent.update(filled_replay())
        shares.append(float(agent._share))
    assert shares == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.1])


# --- what they share -------------------------------------------------------------------


def test_a_slow_policy_draws_for_the_target_and_slow_critics_rank():
    agent = make(QVPO, target_from_average=True, target_candidates=4, noise=0.0, polyak=0.25)
    with torch.no_grad():
        for module, factor in ((agent.target_policy, 1.7), (agent.target_critic, -1.0)):
            for p in module.parameters():
                p.mul_(factor)
    data = batch(dtype=DOUBLE)
    agent.generator.manual_seed(3)
    action = agent.next_action(data, False).action
    states = agent._states(data)
    draws = agent.target_policy.sample(states, 4, generator=rng(3))
    best = agent.target_critic.minimum(states.unsqueeze(1), draws).argmax(1)
    assert torch.equal(action, draws[torch.arange(N), best])
    assert "target_policy" not in agent.state(training=False)["modules"]
    fresh = make(QVPO, double=False, target_from_average=True, polyak=0.25)
    before = copy.deepcopy(fresh.target_policy.state_dict())
    fresh.update(filled_replay())
    for name, parameter in fresh.policy.named_parameters():
        slow = fresh.target_policy.get_parameter(name)
        torch.testing.assert_close(slow, before[name] + 0.25 * (parameter - before[name]))


def test_gradients_are_shortened():
    found = {}
    for clip in (None, 1e-3):
        agent = make(DIPO, double=False, gradient_clip=clip)
        agent.update(filled_replay())
        for name in ("policy", "critic"):
            parts = [p.grad.flatten() for p in getattr(agent, name).parameters()]
            found[name, clip] = torch.cat(parts)
    for name in ("policy", "critic"):
        whole, short = found[name, None], found[name, 1e-3]
        torch.testing.assert_close(short, 1e-3 * whole / whole.norm(), rtol=2e-2, atol=1e-7)


def test_policy_steps_leave_the_critics_alone():
    """No gradient of theirs, and they can be trained as before."""
    for kind in (QSM, DIPO, DACER, QVPO):
        agent = make(kind, double=False)
        agent.update(filled_replay())
        before = [p.grad.clone() for p in agent.critic.parameters()]
        drawn = agent.next_action(batch(), True)
        learned, _ = agent.policy_batch(batch(), Alone())
        agent.policy_loss(learned, drawn)[0].backward(inputs=list(agent.policy.parameters()))
        for old, parameter in zip(before, agent.critic.parameters(), strict=True):
            assert torch.equal(old, parameter.grad) and parameter.requires_grad


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (QSMConfig, {"num_draws": 0}, "num_draws must be at least 1, got 0"),
        (QSMConfig, {"policy_states": 300}, "policy_states must be from 1 to batch_size 256"),
        (QSMConfig, {"wall": 0.0}, "wall must be positive and finite, got 0.0"),
        (QSMConfig, {"temperature_lr": 1.0}, r"temperature_lr must be in \[0, 1\), got 1.0"),
        (QSMConfig, {"score": "dirty"}, "score must be one of .* got 'dirty'"),
        (QSMConfig, {"target": "none"}, "target must be one of .* got 'none'"),
        (
            QSMConfig,
            {"score": "clean", "temperature_rule": "fixed", "persistence": 0.5},
            "persistence must be 0 for the score 'clean', .* got 0.5",
        ),
        (QSMConfig, {"score": "clean"}, "temperature_rule must be 'fixed' unless score is"),
        (DIPOConfig, {"action_steps": 0}, "action_steps must be at least 1, got 0"),
        (DIPOConfig, {"action_lr": 0.0}, "action_lr must be positive and finite, got 0.0"),
        (DIPOConfig, {"action_clip": 0.0}, "action_clip must be positive or None, got 0.0"),
        (DIPOConfig, {"gradient_clip": 0.0}, "gradient_clip must be positive or None, got 0.0"),
        (DACERConfig, {"entropy_draws": 5}, "entropy_draws must be at least twice .* got 5"),
        (DACERConfig, {"entropy_states": 0}, "entropy_states must be at least 1, got 0"),
        (DACERConfig, {"kappa": None}, "kappa must be positive for DACER, got None"),
        (DACERConfig, {"kappa_lr": 1.0}, r"kappa_lr must be in \[0, 1\), got 1.0"),
        (DACERConfig, {"chain": "multistep"}, "chain must be 'ancestral' for DACER"),
        (DACERConfig, {"policy_states": 0}, "policy_states must be from 1 to batch_size 256"),
        (QVPOConfig, {"draws_per_state": 1}, "draws_per_state must be at least 2 for the weight"),
        (QVPOConfig, {"weighting": "rank"}, "weighting must be one of .* got 'rank'"),
        (QVPOConfig, {"uniform_actions": -1}, "uniform_actions must be at least 0, got -1"),
        (QVPOConfig, {"uniform_share": -0.1}, "uniform_share must be at least 0 and finite"),
        (QVPOConfig, {"policy_states": 300}, "policy_states must be from 1 to batch_size 256"),
    ],
)
def test_nonsense_is_refused(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind.preset("corrected", **changes)


@pytest.mark.bad_input
def test_bad_mixtures():
    x = torch.zeros(2, 5, 1)
    for options, message in (
        ({"components": 6}, "components must be from 1 to the 5 points, got 6"),
        ({"components": 1, "iterations": 0}, "iterations must be at least 1, got 0"),
        ({"components": 1, "ridge": 0.0}, "ridge must be positive, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_mixtures(x, **options)
