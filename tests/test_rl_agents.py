"""The agents' losses against slow references written from the equations, and their chains."""

import copy
import dataclasses
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

from rl.critics import Critic, best_candidate
from rl.dacer import DACER
from rl.diffusion_agent import kappa_path
from rl.dipo import DIPO
from rl.dpmd import DPMD, DPMDConfig
from rl.off_policy import NextAction
from rl.policies import DiffusionPolicy
from rl.qsm import QSM
from rl.qvpo import QVPO
from rl.replay import Batch, ReplayBuffer
from rl.sdac import SDAC, SDACConfig
from rl.training import load
from rsm_sampler.box_kernel import TruncatedReverseKernel
from rsm_sampler.checkpoint import CheckpointError
from rsm_sampler.losses import denoising_loss, mirror_descent_loss
from rsm_sampler.schedules import Cosine, Linear

DOUBLE = torch.float64
OBS, ACT, N = 3, 2, 16
SMALL = {"width": 16, "batch_size": N, "replay_size": 64, "num_draws": 8, "policy_states": N}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(n=N, dtype=torch.float32):
    g = rng(5)
    return Batch(
        torch.randn(n, OBS, generator=g, dtype=dtype),
        2 * torch.rand(n, ACT, generator=g, dtype=dtype) - 1,
        torch.randn(n, generator=g, dtype=dtype),
        torch.randn(n, OBS, generator=g, dtype=dtype),
        (torch.rand(n, generator=g) < 0.3).to(dtype),
        torch.randint(1, 4, (n,), generator=g).to(dtype),
    )


def filled_replay():
    replay = ReplayBuffer(64, OBS, ACT)
    replay.add(batch(64))
    return replay


def in_double(agent):
    for module in agent._modules().values():
        module.double()
    return agent


def sdac(preset="corrected", **changes):
    return SDAC(OBS, ACT, SDACConfig.preset(preset, **{**SMALL, **changes}), device="cpu")


def dpmd(preset="corrected", **changes):
    small = {key: value for key, value in SMALL.items() if key != "num_draws"}
    config = DPMDConfig.preset(preset, **{**small, **changes, "policy_states": 4})
    return DPMD(OBS, ACT, config, device="cpu")


# The other diffusion agents, and what makes them quick.
FEW = {
    QSM: {"num_draws": 8},
    DIPO: {},
    DACER: {"entropy_states": 4, "entropy_draws": 16, "kappa_period": 2},
    QVPO: {"draws_per_state": 4},
}


def small(kind, preset="corrected", **changes):
    common = {key: value for key, value in SMALL.items() if key != "num_draws"}
    config = kind.config_type.preset(preset, **{**common, **FEW[kind], **changes})
    return kind(OBS, ACT, config, device="cpu")


qsm, dipo, dacer, qvpo = OTHERS = [partial(small, kind) for kind in FEW]


def gradients(agent, loss):
    parameters = list(agent.policy.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def test_slow_copies_keep_no_history():
    """A graph through all updates would fill the memory."""
    agent, replay = dpmd(target_from_average=True), filled_replay()
    for _ in range(3):
        agent.update(replay)
    for slow, _ in agent.slow_pairs():
        assert not any(p.requires_grad or p.grad_fn for p in slow.parameters())


# --- the policy ------------------------------------------------------------------------


def test_a_bound_policy_is_the_policy():
    policy = DiffusionPolicy(OBS, ACT, Cosine(7), width=16, generator=rng()).double()
    observation = torch.randn(4, OBS, dtype=DOUBLE, generator=rng(1))
    for m in (1, 5):
        bound = policy.bind(observation, m)
        for i, sigma in enumerate(policy._levels[:-1]):
            x = sigma * torch.randn(4 * m, ACT, dtype=DOUBLE, generator=rng(i))
            context = observation.repeat_interleave(m, 0)
            expected = policy.denoiser(x, torch.tensor(sigma, dtype=DOUBLE), context).clamp(-1, 1)
            torch.testing.assert_close(bound(x, sigma), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prediction", ["noise", "preconditioned"])
def test_the_chain_is_that_of_equation_8(prediction):
    """In the paper's variable, with the cut prediction at every step and half the noise."""
    schedule = Linear(20, scale=0.8)
    policy = DiffusionPolicy(
        OBS, ACT, schedule, width=16, prediction=prediction, start_scale=0.5, generator=rng()
    ).double()
    observation = torch.randn(3, OBS, dtype=DOUBLE, generator=rng(1))
    actions = policy.sample(observation, 4, generator=rng(2))
    g, context = rng(2), observation.repeat_interleave(4, 0)
    alpha_bar = schedule.alpha_bar(torch.arange(21))
    # The core's chain draws in variance-exploding coordinates, whose start is wider.
    first = torch.randn(12, ACT, dtype=DOUBLE, generator=g)
    a = 0.5 * first * math.sqrt(1 - alpha_bar[20])
    for t in range(20, 0, -1):
        beta = 1 - alpha_bar[t] / alpha_bar[t - 1]
        sigma = math.sqrt(1 / alpha_bar[t] - 1)
        exploding = a / math.sqrt(alpha_bar[t])
        clean = policy.denoiser(exploding, torch.tensor(sigma, dtype=DOUBLE), context)
        clean = clean.clamp(-1, 1)
        c_1 = beta * math.sqrt(alpha_bar[t - 1]) / (1 - alpha_bar[t])
        c_2 = (1 - alpha_bar[t - 1]) * math.sqrt(1 - beta) / (1 - alpha_bar[t])
        a = c_1 * clean + c_2 * a
        if t > 1:
            variance = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta
            a = a + math.sqrt(variance) * torch.randn(12, ACT, dtype=DOUBLE, generator=g)
    torch.testing.assert_close(actions.view(12, ACT), a, rtol=1e-5, atol=1e-6)


def test_actions_stay_in_the_box_whatever_the_network():
    policy = DiffusionPolicy(OBS, ACT, Cosine(20), width=16, generator=rng())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(30)
    x = policy.sample(torch.randn(600, OBS, generator=rng()), 4, generator=rng())
    assert x.shape == (600, 4, ACT) and x.abs().max() <= 1


def test_best_candidate_is_the_arg_max_of_the_smaller_value():
    critic = Critic(OBS, ACT, width=8, generator=rng()).double()
    data = batch(dtype=DOUBLE)
    candidates = torch.rand(N, 6, ACT, dtype=DOUBLE, generator=rng(2))
    best = best_candidate(critic, data.observation, candidates)
    for i in range(N):
        values = [
            min(critic.values(data.observation[i], candidates[i, k]).tolist()) for k in range(6)
        ]
        assert torch.equal(best[i], candidates[i, int(np.argmax(values))])
    assert torch.equal(
        best_candidate(critic, data.observation, candidates[:, :1]), candidates[:, 0]
    )


# --- SDAC ------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["corrected", "official"])
def test_sdac_loss_is_equation_14(preset):
    """K network calls on noises, weights by softmax, in double precision: same gradient."""
    changes = {"proposal": "replay", "temperature": 0.3, "temperature_rule": "fixed"}
    agent = in_double(sdac(preset, **changes))
    agent._kernel = TruncatedReverseKernel(-1.0, 1.0) if preset == "corrected" else agent._kernel
    data = batch(dtype=DOUBLE)
    agent.generator.manual_seed(7)
    loss, metrics = agent.policy_loss(data, NextAction(data.action))

    g = rng(7)
    t = torch.randint(1, 21, (N,), generator=g)
    sigma = agent.policy.sigmas[t]
    x_t = data.action + sigma[:, None] * torch.randn(N, ACT, dtype=DOUBLE, generator=g)
    candidates = agent._kernel.draw(x_t, sigma, 8, generator=g).x_0
    noise = (x_t[:, None] - candidates) / sigma[:, None, None]
    reference, ess = 0.0, 0.0
    for i in range(N):
        values = agent.critic.minimum(data.observation[i], candidates[i].clamp(-1, 1)).detach()
        weight = torch.softmax(values / 0.3, 0)
        ess += float(1 / weight.square().sum()) / 8 / N
        for k in range(8):
            predicted = (x_t[i] - agent.policy.denoiser(x_t[i], sigma[i], data.observation[i])) / (
                sigma[i]
            )
            error = (predicted - noise[i, k]).square().sum()
            # The score loss times sigma^2, or in units of the preconditioned output.
            scale = 1.0 if preset == "official" else 1 + (sigma[i] / 0.5) ** 2
            reference = reference + weight[k] * scale * error / N
    torch.testing.assert_close(gradients(agent, loss), gradients(agent, reference))
    assert float(metrics["q_weight_ess"]) == pytest.approx(ess)
    assert bool(loss < reference)  # by the spread of the candidates alone


def test_sdac_ignores_a_constant_and_the_common_scale_of_value_and_temperature():
    """Shift Q by c: nothing. Q and temperature times b: nothing."""
    data, found = batch(dtype=DOUBLE), []
    for shift, scale in ((0.0, 1.0), (40.0, 1.0), (0.0, 7.0)):
        agent = in_double(sdac(temperature=0.2 * scale, temperature_rule="fixed"))
        with torch.no_grad():
            agent.critic.weights[-1].mul_(scale)
            agent.critic.biases[-1].add_(shift)
        found.append(gradients(agent, agent.policy_loss(data, NextAction(data.action))[0]))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


@pytest.mark.parametrize(("num_steps", "size", "repeats"), [(20, 4000, 40), (400, 256, 600)])
def test_entropy_of_a_known_policy(num_steps, size, repeats):
    """Uniform actions whose denoiser is exact: log 2 per dimension, and the lowest noise."""
    from scipy.integrate import quad
    from scipy.stats import norm

    class Uniform(torch.nn.Module):
        def forward(self, x, sigma, context):
            s = sigma.unsqueeze(-1)
            low, high = (-1 - x) / s, (1 - x) / s
            normal = torch.distributions.Normal(0.0, 1.0)
            mass = normal.cdf(high) - normal.cdf(low)
            edge = normal.log_prob(low).exp() - normal.log_prob(high).exp()
            inside = x + s * edge / mass
            return torch.where(mass > 1e-9, inside, x.clamp(-1, 1))

    agent = in_double(
        sdac(batch_size=size, replay_size=size, policy_states=1, num_steps=num_steps)
    )
    agent.policy.denoiser = Uniform()
    data, generator = batch(size, DOUBLE), rng(5)
    entropies = []
    for _ in range(repeats):
        action = 2 * torch.rand(size, ACT, generator=generator, dtype=DOUBLE) - 1
        metrics = agent.after_policy_step(data, NextAction(action))
        entropies.append(float(metrics["entropy_per_dim"]))
    sigma = float(agent.policy.sigmas[1])

    def integrand(x):
        p = (norm.cdf((1 - x) / sigma) - norm.cdf((-1 - x) / sigma)) / 2
        return -p * math.log(p) if p > 0 else 0.0

    exact = quad(integrand, -2, 2, limit=200)[0]
    assert num_steps > 20 or exact == pytest.approx(0.774, abs=0.001)
    assert np.std(entropies) / math.sqrt(repeats) < 0.01
    noise = 2 * math.pi * math.e * sigma**2
    exact = 0.5 * math.log(math.exp(2 * exact) - noise)  # above log 2: they are not normal
    # What is left are the trapezoids, of which the lowest is as wide as log 2.
    assert np.mean(entropies) == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize("num_steps", [5, 10, 20])
def test_entropy_of_normal_actions_has_no_noise_in_it(num_steps):
    """However few the levels are: the lowest one is wider than these actions."""
    std, size = 0.08, 20_000

    class Normal(torch.nn.Module):
        def forward(self, x, sigma, context):
            return x * (std**2 / (std**2 + sigma.square())).unsqueeze(-1)

    agent = in_double(
        sdac(batch_size=size, replay_size=size, policy_states=1, num_steps=num_steps)
    )
    agent.policy.denoiser = Normal()
    data, generator = batch(size, DOUBLE), rng(5)
    entropies = []
    for _ in range(20):
        action = std * torch.randn(size, ACT, generator=generator, dtype=DOUBLE)
        metrics = agent.after_policy_step(data, NextAction(action))
        entropies.append(float(metrics["entropy_per_dim"]))
    exact = 0.5 * math.log(2 * math.pi * math.e * std**2)
    assert 5 * np.std(entropies) / math.sqrt(20) < 0.02
    # What is left are the trapezoids, which lie above a convex integrand.
    assert exact - 0.02 < np.mean(entropies) < exact + 0.2


@pytest.mark.parametrize("num_steps", [5, 20])
def test_the_geometric_schedule_is_as_sharp_with_few_steps(num_steps):
    sigmas = sdac(schedule="geometric", num_steps=num_steps).policy.sigmas
    assert len(sigmas) == num_steps + 1
    assert sigmas[[0, 1, -1]].tolist() == pytest.approx([0.0, 0.1, 5.0])
    ratios = sigmas[2:] / sigmas[1:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))


@pytest.mark.parametrize("make", [sdac, dpmd])
def test_noise_on_actions_is_no_entropy_of_the_policy(make):
    agent, data = make(noise=0.1), batch()
    agent.generator.manual_seed(3)
    drawn = agent.next_action(data, True)
    agent.config = dataclasses.replace(agent.config, noise=0.0)
    agent.generator.manual_seed(3)
    plain = agent.next_action(data, True)
    assert torch.equal(drawn.of_policy, plain.action)
    assert not torch.equal(drawn.action, plain.action)
    if make is sdac:
        entropies = []
        for found in (drawn, NextAction(plain.action)):
            agent.generator.manual_seed(3)
            entropies.append(agent.after_policy_step(data, found)["entropy_per_dim"])
        assert torch.equal(*entropies)


def test_temperature_rises_while_entropy_is_missing():
    for target, sign in ((5.0, 1), (-5.0, -1)):
        agent = sdac(target_entropy=target, temperature_lr=0.01, min_ess=1e-3)
        agent.update(filled_replay())
        agent.update(filled_replay())
        assert sign * math.log(agent.temperature) == pytest.approx(0.01, rel=1e-6)


@pytest.mark.parametrize(
    ("min_ess", "target", "floor"),
    [
        (3.0, -5.0, 3.0),
        (7.0, -5.0, SMALL["num_draws"] / 2),
        (None, -5.0, 2.0),
        (None, 0.3, SMALL["num_draws"] * math.exp(0.3 * ACT) / 2**ACT),  # 3.6
    ],
)
def test_temperature_rises_where_the_candidates_do_not_suffice(min_ess, target, floor):
    """However much entropy there is: weights of one candidate tell nothing sharper."""
    for temperature, sign in ((1e-6, 1), (1e3, -1)):
        agent = sdac(
            target_entropy=target,
            temperature_lr=0.01,
            temperature=temperature,
            min_ess=min_ess,
        )
        before = math.log(agent.temperature)
        for _ in range(2):
            metrics = agent.update(filled_replay())
        ess = float(metrics["q_weight_ess"]) * agent.config.num_draws
        assert (ess < floor) == (sign > 0)
        missing = max(math.log(floor / ess), target - float(metrics["entropy_per_dim"]))
        step = math.log(agent.temperature) - before
        assert step == pytest.approx(0.01 * max(-1, min(1, missing)), rel=1e-3)
        assert min_ess is None or sign * step > 0


@pytest.mark.parametrize(
    ("proposal", "anchor_share"),
    [
        ("uniform", 0.0),  # its noisy actions have no clean one behind them
        *itertools.product(["replay", "next", "policy", "noised-policy"], [0.0, 0.5]),
    ],
)
def test_every_proposal_trains(proposal, anchor_share):
    agent = sdac(proposal=proposal, policy_period=1, anchor_share=anchor_share)
    before = copy.deepcopy(agent.policy.state_dict())
    metrics = agent.update(filled_replay())
    assert all(bool(value.isfinite()) for value in metrics.values())
    assert any(not torch.equal(before[k], v) for k, v in agent.policy.state_dict().items())


# --- DPMD ------------------------------------------------------------------------------


@pytest.mark.parametrize("standardise", ["moments", "published", "none"])
def test_dpmd_loss_is_equation_13(standardise):
    agent = in_double(
        dpmd("printed", standardise=standardise, temperature=0.7, terminal_states=True)
    )
    agent._value_mean.fill_(0.1)
    agent._value_std.fill_(0.05)
    data = batch(dtype=DOUBLE)
    action = data.action
    agent.generator.manual_seed(7)
    loss, _ = agent.policy_loss(data, NextAction(action))

    g = rng(7)
    t = torch.randint(1, 21, (N,), generator=g)
    sigma = agent.policy.sigmas[t]
    x_t = action + sigma[:, None] * torch.randn(N, ACT, dtype=DOUBLE, generator=g)
    log_weights, errors = [], []
    for i in range(N):
        q = agent.critic.minimum(data.next_observation[i], action[i]).item()
        standard = {
            "moments": min(3, max(-3, (q - 0.1) / (0.05 + 1e-6))),
            "published": min(3, max(-3, q - 0.1 / (0.05 + 1e-6))),
            "none": q,
        }[standardise]
        log_weights.append(standard / 0.7)
        denoised = agent.policy.denoiser(x_t[i], sigma[i], data.next_observation[i])
        errors.append((1 / 0.25 + 1 / sigma[i] ** 2) * (denoised - action[i]).square().sum())
    weight = torch.softmax(torch.tensor(log_weights, dtype=DOUBLE), 0)
    reference = sum(w * e for w, e in zip(weight, errors, strict=True))
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gradients(agent, loss), gradients(agent, reference), rtol=1e-5, atol=1e-7
    )


def test_dpmd_loss_of_several_draws_is_equation_13_within_each_state():
    """The default: weights N softmax(Q / lambda) of the N draws of a state, averaged over all."""
    agent = in_double(dpmd(draws_per_state=4, temperature=0.02, temperature_lr=0.0))
    data, states = batch(dtype=DOUBLE), agent.config.policy_states
    draws = 2 * torch.rand(states, 4, ACT, generator=rng(9), dtype=DOUBLE) - 1
    agent.generator.manual_seed(7)
    loss, metrics = agent.policy_loss(data, NextAction(draws[:, 0], draws=draws))

    g = rng(7)
    sigma = agent.policy.sigmas[torch.randint(1, 21, (4 * states,), generator=g)].view(states, 4)
    noise = torch.randn(4 * states, ACT, dtype=DOUBLE, generator=g).view(states, 4, ACT)
    reference, divergence = 0.0, 0.0
    for i in range(states):
        over = data.terminated[i] > 0  # no policy acts there
        state = data.observation[i] if over else data.next_observation[i]
        q = torch.stack([agent.critic.minimum(state, a) for a in draws[i]]).detach()
        weight = torch.exp(q / 0.02) / torch.exp(q / 0.02).sum()
        divergence += float((weight * (4 * weight).log()).sum()) / states
        for j in range(4):
            x_t = draws[i, j] + sigma[i, j] * noise[i, j]
            error = (agent.policy.denoiser(x_t, sigma[i, j], state) - draws[i, j]).square().sum()
            scale = 1 / 0.25 + 1 / sigma[i, j] ** 2
            reference = reference + 4 * weight[j] * scale * error / (4 * states)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gradients(agent, loss), gradients(agent, reference), rtol=1e-5, atol=1e-7
    )
    assert 0.01 < divergence == pytest.approx(float(metrics["kl_to_old"]), rel=1e-5)


def test_published_dpmd_weights_are_not_normalised():
    agent = in_double(dpmd("official"))
    data = batch(dtype=DOUBLE)
    agent.before_update(ReplayBuffer(4, OBS, ACT))
    agent.generator.manual_seed(7)
    loss, _ = agent.policy_loss(data, NextAction(data.action))
    g = rng(7)
    sigma = agent.policy.sigmas[torch.randint(1, 21, (N,), generator=g)]
    noise = torch.randn(N, ACT, dtype=DOUBLE, generator=g)
    x_t = data.action + sigma[:, None] * noise
    value = agent.critic.minimum(data.next_observation, data.action)
    weight = ((value - 0.0).clamp(-3, 3) / 5.0).exp().detach()
    predicted = agent.policy.denoiser.noise(x_t, sigma, data.next_observation)
    reference = (weight * (predicted - noise).square().sum(-1)).mean()
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)


def test_dpmd_with_equal_weights_is_plain_denoising():
    """A value that is constant, on the same random numbers."""
    agent = in_double(dpmd("printed", standardise="none"))
    with torch.no_grad():
        agent.critic.weights[-1].zero_()
    data = batch(dtype=DOUBLE)
    agent.generator.manual_seed(7)
    loss, metrics = agent.policy_loss(data, NextAction(data.action))
    g = rng(7)
    sigma = agent.policy.sigmas[torch.randint(1, 21, (N,), generator=g)]
    observation = agent._states(data)
    plain = denoising_loss(
        agent.policy.denoiser, data.action, sigma, context=observation, generator=g
    )
    torch.testing.assert_close(loss, plain.mean())
    assert float(metrics["kl_to_old"]) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("preset", ["corrected", "printed"])
def test_dpmd_ignores_a_constant_and_the_scale_of_values(preset):
    """Shift Q by c, or Q and its temperature (or its moments) times b: the same gradient."""
    data, found = batch(dtype=DOUBLE), []
    draws = torch.rand(4, 4, ACT, dtype=DOUBLE, generator=rng()) if preset == "corrected" else None
    for shift, scale in ((0.0, 1.0), (40.0, 1.0), (0.0, 7.0)):
        temperature = 0.2 * (scale if preset == "corrected" else 1.0)
        agent = in_double(dpmd(preset, temperature=temperature))
        with torch.no_grad():
            agent.critic.weights[-1].mul_(scale)
            agent.critic.biases[-1].add_(shift)
        agent._value_mean.fill_(shift)
        agent._value_std.fill_(scale)
        loss = agent.policy_loss(data, NextAction(data.action, draws=draws))[0]
        found.append(gradients(agent, loss))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-7)


def test_mirror_descent_between_gaussians():
    """The weighted regression is least for the denoiser of the tilted law.

    Old policy N(mu, v), Q / lambda = -(a - m)^2 / (2 c): the product is normal, and the loss of
    its exact denoiser is below that of the old one and of a shifted one, by far more than noise.
    """
    mu, v, m, c, n = 0.3, 0.04, -0.2, 0.05, 40_000
    precision = 1 / v + 1 / c
    mean, variance = (mu / v + m / c) / precision, 1 / precision
    x_0 = mu + math.sqrt(v) * torch.randn(n, 1, dtype=DOUBLE, generator=rng(1))
    log_weight = -(x_0[:, 0] - m).square() / (2 * c)
    sigma = torch.full((n,), 0.2, dtype=DOUBLE)

    def loss(centre, spread):
        def denoiser(x_t, sigma):
            keep = spread / (spread + sigma.square())
            return centre + keep.unsqueeze(-1) * (x_t - centre)

        return mirror_descent_loss(denoiser, x_0, sigma, log_weight, generator=rng(2)).mean()

    best = loss(mean, variance)
    for centre, spread in ((mu, v), (mean + 0.05, variance), (mean, 1.5 * variance)):
        assert loss(centre, spread) > 1.005 * best


@pytest.mark.parametrize("preset", ["corrected", "printed"])
def test_states_without_a_future_take_no_part(preset):
    data = batch(dtype=DOUBLE)
    found = []
    for change in (0.0, 1.0):
        agent = in_double(dpmd())
        moved = data.next_observation + change * data.terminated[:, None]
        drawn = NextAction(data.action)
        if preset == "corrected":
            drawn = drawn._replace(draws=torch.rand(4, 4, ACT, dtype=DOUBLE, generator=rng()))
        loss = agent.policy_loss(data._replace(next_observation=moved), drawn)[0]
        found.append(gradients(agent, loss))
    torch.testing.assert_close(found[0], found[1])


def test_weights_within_a_state_compare_actions_and_not_states():
    """A value that depends on the state alone leaves plain denoising."""
    for bias in (0.0, 3.0):
        agent = in_double(dpmd(draws_per_state=4, noise=0.0))
        with torch.no_grad():
            agent.critic.weights[0][:, OBS:] = 0  # blind to the action
            agent.critic.biases[-1].add_(bias)
        data = batch(dtype=DOUBLE)
        drawn = agent.next_action(data, True)
        assert drawn.draws.shape == (4, 4, ACT)
        assert torch.equal(drawn.draws[:, 0], drawn.action[:4])
        metrics = agent.policy_loss(data, drawn)[1]
        assert float(metrics["kl_to_old"]) == pytest.approx(0.0, abs=1e-12)
        assert float(metrics["q_weight_ess"]) == pytest.approx(1.0)


def test_temperature_follows_the_divergence():
    for target, sign in ((1e-6, 1), (1.0, -1)):
        agent = dpmd(draws_per_state=4, target_kl=target, temperature=0.5, policy_period=1)
        agent.update(filled_replay())
        assert sign * (agent.temperature - 0.5) > 0


def test_the_old_policy_is_frozen_between_copies():
    agent = dpmd(draws_per_state=4, old_policy_period=3, policy_period=1)
    replay = filled_replay()
    same = []
    for _ in range(7):
        agent.update(replay)
        first = [next(m.parameters()) for m in (agent.old_policy, agent.policy)]
        same.append(torch.equal(*first))
        kept = first[0].clone()
    assert not any(same)
    agent.update(replay)
    assert torch.equal(kept, next(agent.old_policy.parameters()))


# --- what they share --------------------------------------------------------------------


def test_the_critic_follows_equation_28():
    """Loss of the first update: mean squared error of both members to the same target."""
    agent = in_double(sdac(reward_scale=0.2, discount=0.9))
    data = batch(dtype=DOUBLE)

    class Fixed(ReplayBuffer):
        def sample(self, n, *, generator=None):
            return data

    generator = copy.deepcopy(agent.generator.get_state())
    critic, target = copy.deepcopy(agent.critic), copy.deepcopy(agent.target_critic)
    metrics = agent.update(Fixed(N, OBS, ACT))
    agent.generator.set_state(generator)
    fresh = in_double(sdac(reward_scale=0.2, discount=0.9))
    fresh.generator.set_state(generator)
    drawn = fresh.next_action(data, False)
    action = drawn.action
    assert drawn.entropy_cost == 0.0
    assert drawn.of_policy is action
    loss = 0.0
    for i in range(N):
        future = min(target.values(data.next_observation[i], action[i]).tolist())
        alive = 0.9 ** float(data.span[i]) * (1 - float(data.terminated[i]))
        y = 0.2 * float(data.reward[i]) + alive * future
        values = critic.values(data.observation[i], data.action[i]).tolist()
        loss += sum((v - y) ** 2 for v in values) / N
    assert float(metrics["critic_loss"]) == pytest.approx(loss, rel=1e-6)


def test_slow_copies_move_by_polyak():
    agent = sdac("official", polyak=0.25, target_period=1)
    slow = [p.clone() for p in agent.target_critic.parameters()]
    average = [p.clone() for p in agent.average.parameters()]
    agent.update(filled_replay())
    for before, after, fast in zip(
        slow, agent.target_critic.parameters(), agent.critic.parameters(), strict=True
    ):
        torch.testing.assert_close(after, before + 0.25 * (fast - before))
    for before, after, fast in zip(
        average, agent.average.parameters(), agent.policy.parameters(), strict=True
    ):
        torch.testing.assert_close(after, before + 0.25 * (fast - before))


@pytest.mark.parametrize(("entropy", "kappa"), [(-0.9, 0.98388), (-1.5, 0.53996)])
def test_the_tuned_noise_ends_at_the_golden_numbers(entropy, kappa):
    path = kappa_path(5.0, entropy, 7e-3, 4000)
    assert path[-1] == pytest.approx(kappa, abs=2e-4)
    log_kappa = torch.tensor(math.log(5.0), dtype=DOUBLE)
    optimiser = torch.optim.Adam([log_kappa], lr=7e-3)
    for value in path[:500]:
        assert value == pytest.approx(math.exp(float(log_kappa)), rel=1e-9)
        log_kappa.grad = log_kappa + math.log(0.1) + 0.5 * math.log(2 * math.pi * math.e) - entropy
        optimiser.step()


def test_one_candidate_is_the_plain_sampler():
    agent, data = sdac(), batch()
    agent.generator.manual_seed(3)
    action = agent.next_action(data, False).action
    over = data.terminated > 0
    assert over.any() and not over.all()  # no policy ever acts where an episode has ended
    acted = torch.where(over[:, None], data.observation, data.next_observation)
    assert torch.equal(action, agent.policy.sample(acted, 1, generator=rng(3))[:, 0])


def test_the_learning_rate_stays_where_it_is_set():
    agent = sdac(policy_lr=1e-4, policy_lr_hold=0, policy_lr_decay=1, policy_period=1)
    for _ in range(3):
        agent.update(filled_replay())
        assert agent.policy_optimiser.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_noises_of_evaluation_are_saved():
    one, other = sdac(), SDAC(OBS, ACT, sdac().config, seed=1, device="cpu")
    other.load_state(one.state())
    x = np.zeros(OBS, np.float32)
    np.testing.assert_array_equal(one.predict(x, True)[0], other.predict(x, True)[0])


def test_agents_of_older_versions_have_defaults_for_what_is_new():
    state = sdac().state()
    for name in ("min_ess", "chain"):
        del state["config"][name]
    assert SDAC.from_state(state, device="cpu").config == sdac().config
    del state["extra"]["starts"]
    sdac().load_state(state)
    state["config"]["colour"] = "blue"
    with pytest.raises(CheckpointError, match="must have fields of SDACConfig, got 'colour'"):
        SDAC.from_state(state, device="cpu")


def test_large_values_with_predicted_noise_stay_finite():
    agent = dpmd("printed", prediction="noise", standardise="none", policy_period=1)
    agent.critic.biases[-1].data.fill_(300.0)
    metrics = agent.update(filled_replay())
    assert all(bool(value.isfinite()) for value in metrics.values())


def test_the_learning_rate_falls_linearly():
    agent = sdac(policy_lr_final=0.0, policy_lr_hold=2, policy_lr_decay=4, policy_period=1)
    rates = []
    for _ in range(8):
        agent.update(filled_replay())
        rates.append(agent.policy_optimiser.param_groups[0]["lr"] / 3e-4)
    assert rates == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25, 0, 0])


@pytest.mark.parametrize(
    ("make", "preset"),
    [
        *itertools.product([sdac, dpmd, *OTHERS], ["corrected", "official", "icml2025"]),
        (dpmd, "printed"),
    ],
)
def test_presets_train_and_predict(make, preset):
    agent = make(preset, policy_period=1)
    metrics = agent.update(filled_replay())
    assert all(bool(value.isfinite()) for value in metrics.values())
    action, state = agent.predict(np.zeros(OBS), deterministic=True)
    assert action.shape == (ACT,) and state is None and np.abs(action).max() <= 1


@pytest.mark.parametrize("make", [sdac, dacer, partial(qsm, "icml2025")])
def test_exploiting_is_a_function_of_the_observation(make):
    agent = make()
    observation = np.random.default_rng(0).normal(size=(6, OBS)).astype(np.float32)
    together, _ = agent.predict(observation, deterministic=True)
    alone = [agent.predict(row, deterministic=True)[0] for row in observation]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    exploring = [agent.predict(observation)[0] for _ in range(2)]
    assert not np.array_equal(*exploring)


@pytest.mark.parametrize("make", [sdac, dpmd, *OTHERS, partial(qsm, "icml2025")])
def test_saved_agents_act_the_same(make, tmp_path):
    agent = make()
    agent.low, agent.high = np.array([-2.0, 0.0]), np.array([4.0, 1.0])
    agent.update(filled_replay())
    agent.save(tmp_path / "agent.pt")
    again = load(tmp_path / "agent.pt", device="cpu")
    observation = np.ones((4, OBS), np.float32)
    np.testing.assert_array_equal(
        agent.predict(observation, deterministic=True)[0],
        again.predict(observation, deterministic=True)[0],
    )
    assert dataclasses.asdict(agent.config) == dataclasses.asdict(again.config)


def test_saved_agents_leave_out_what_does_not_act(tmp_path):
    """A loaded agent may learn on: its slow copies start as copies of what they follow."""
    agent = dpmd(draws_per_state=4, old_policy_period=3)
    agent.update(filled_replay())
    agent.save(tmp_path / "agent.pt")
    kept = agent.state(training=False)["modules"]
    assert set(kept) == {"critic", "policy", "moments"}
    assert set(agent.state()["modules"]) == {*kept, "target_critic", "old_policy"}
    again = load(tmp_path / "agent.pt", device="cpu")
    for slow, fast in ((again.target_critic, agent.critic), (again.old_policy, agent.policy)):
        for mine, theirs in zip(slow.parameters(), fast.parameters(), strict=True):
            assert torch.equal(mine, theirs) and not mine.requires_grad


def test_nothing_is_read_back_in_an_update():
    """The host never waits for a value: what a captured graph needs."""
    from tests.exact import NoReadBack

    replay = filled_replay()
    agents = [
        sdac(anneal_stages=2),
        sdac(anchor_share=0.5, proposal="next", chain="multistep", critic_layer_norm=True),
        sdac("official"),
        dpmd(),
        dpmd("official"),
        dacer(return_critic=False),
        *(make(preset) for make in OTHERS for preset in ("corrected", "official", "icml2025")),
    ]
    for agent in agents:
        agent.update(replay)
        with NoReadBack():
            agent.update(replay)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (SDACConfig, {"num_draws": 0}, "num_draws must be at least 1, got 0"),
        (SDACConfig, {"anneal_moves": 0}, "anneal_moves must be at least 1, got 0"),
        (SDACConfig, {"num_draws": 3, "anneal_stages": 1}, "num_draws must be at least 4 with"),
        (SDACConfig, {"policy_states": 300}, "policy_states must be from 1 to batch_size 256"),
        (SDACConfig, {"persistence": 1.0}, r"persistence must be in \[0, 1\), .* got 1.0"),
        (DPMDConfig, {"persistence": 0.5, "chain": "multistep"}, "or another chain .* got 0.5"),
        (SDACConfig, {"discount": 1.0}, r"discount must be in \[0, 1\), got 1.0"),
        (SDACConfig, {"anchor_share": 1.0}, r"anchor_share must be in \[0, 1\)"),
        (SDACConfig, {"anchor_share": 0.5, "truncated": False}, "and 0 with the proposal"),
        (SDACConfig, {"anchor_share": 0.5, "proposal": "uniform"}, "and 0 with the proposal"),
        (SDACConfig, {"truncated": "false"}, "truncated must be True or False, got 'false'"),
        (SDACConfig, {"num_draws": 64.5}, "num_draws must be an integer, got 64.5"),
        (SDACConfig, {"batch_size": True}, "batch_size must be an integer, got True"),
        (SDACConfig, {"kappa": "x"}, r"kappa must be a number, got 'x'"),
        (SDACConfig, {"start_scale": 0.0}, "start_scale must be positive and finite, got 0.0"),
        (SDACConfig, {"schedule_scale": 3.0}, "betas must lie within"),
        (SDACConfig, {"schedule": "vp", "schedule_scale": 0.5}, "schedule_scale must be 1"),
        (
            SDACConfig,
            {"schedule": "geometric", "schedule_scale": 2.0},
            "must be 1 for 'geometric'",
        ),
        (SDACConfig, {"min_ess": 0.0}, "min_ess must be positive and finite, got 0.0"),
        (SDACConfig, {"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        (SDACConfig, {"proposal": "none"}, "proposal must be one of .* got 'none'"),
        (SDACConfig, {"critic_activation": "tanh"}, "critic_activation must be one of .* 'tanh'"),
        (SDACConfig, {"temperature_rule": "kappa"}, "kappa must be given"),
        (SDACConfig, {"soft_target": True}, "noise must be positive for soft_target"),
        (SDACConfig, {"schedule": "quadratic"}, "schedule must be one of"),
        (SDACConfig, {"replay_size": 10}, "replay_size must be at least batch_size 256, got 10"),
        (SDACConfig, {"updates_per_step": 0}, "updates_per_step must be positive"),
        (SDACConfig, {"noise": -1.0}, "noise must be at least 0 and finite, got -1.0"),
        (DPMDConfig, {"draws_per_state": 1}, "target_kl must be positive, with draws_per_state"),
        (
            DPMDConfig,
            {"draws_per_state": 2, "target_kl": 0.7},
            r"target_kl must be below log\(draws_per_state\) = 0.69",
        ),
        (
            DPMDConfig,
            {"draws_per_state": 4, "policy_states": 300},
            "policy_states must be at most batch_size 256",
        ),
        (DPMDConfig, {"clip": 0.0}, "clip must be positive"),
    ],
)
def test_nonsense_is_refused(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind.preset("corrected", **changes)


@pytest.mark.bad_input
def test_presets_and_fields_are_named():
    with pytest.raises(ValueError, match=r"preset must be one of .'corrected', 'icml2025'"):
        SDACConfig.preset("best")
    with pytest.raises(ValueError, match="config must have fields of SDACConfig, got 'alpha'"):
        SDACConfig.preset(alpha=0.2)
    with pytest.raises(ValueError, match="config must be a SDACConfig, got DPMDConfig"):
        SDAC(OBS, ACT, DPMDConfig())
    with pytest.raises(ValueError, match="observation must have length 3"):
        sdac().predict(np.zeros(4))


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_persistent_actions_follow_the_policy_and_each_other(noise):
    """4,000 environments at one state, three steps of acting.

    Every step has the law of independent actions: Kolmogorov-Smirnov below 0.045, of two samples
    of 4,000, has a false alarm of 6e-4 in each of 6 cases. Random numbers that correlate by 0.9
    give actions that do: above 0.5, where independent ones stay below 0.08 (five standard errors).
    """
    n, options = 4000, {"noise": noise, "num_steps": 4}
    observation = np.tile(np.float32([[0.3, -1.0, 2.0]]), (n, 1))
    plain, slow = sdac(**options), sdac(persistence=0.9, **options)
    first, second, third = (slow.act(observation).copy() for _ in range(3))
    alone, after = plain.act(observation).copy(), plain.act(observation).copy()
    for j in range(ACT):
        for step in (first, second, third):
            assert stats.ks_2samp(step[:, j], alone[:, j]).statistic < 0.045
        assert np.corrcoef(first[:, j], second[:, j])[0, 1] > 0.5
        assert abs(np.corrcoef(alone[:, j], after[:, j])[0, 1]) < 0.08
        gap = np.corrcoef(first[:, j], third[:, j])[0, 1]
        assert gap < np.corrcoef(first[:, j], second[:, j])[0, 1]
