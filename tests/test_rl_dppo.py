"""DPPO: decisions, advantages and the clipped loss against references from the equations."""

import math

import numpy as np
import pytest
import torch

import rl
from rl.dppo import DPPO, DPPOConfig, _Row, advantages, clip_range
from rl.environments import Transition
from rl.grid import estimate_cost
from rl.policies import inward_cut
from tests.test_rl_agents import ACT, DOUBLE, OBS, in_double, rng
from tests.toy_envs import Wells

SMALL = {"width": 16, "depth": 2, "num_steps": 4, "batch_size": 8, "rollout_steps": 12}


def make(preset="corrected", **changes):
    return DPPO(OBS, ACT, DPPOConfig.preset(preset, **{**SMALL, **changes}), device="cpu")


def in_double_too(agent):
    in_double(agent)
    agent._decisions = tuple(part.double() for part in agent._decisions)
    agent._clips = agent._clips.double()
    return agent


def played(agent, rounds, *, seed=0, valid=None):
    """Let an agent act on random observations, with random outcomes."""
    random = np.random.default_rng(seed)
    n = agent.config.num_envs
    for k in range(rounds):
        agent.act(random.normal(size=(n, OBS)).astype(np.float32))
        after = random.normal(size=(n, OBS)).astype(np.float32)
        ended = random.random(n) < 0.3
        over = ended & (random.random(n) < 0.5)
        good = np.ones(n, bool) if valid is None else valid[k]
        reward = random.normal(size=n).astype(np.float32)
        agent.observe(Transition(after, after, reward, over, ended, good))
    return _Row(*(torch.stack(parts) for parts in zip(*agent._rows, strict=True)))


def test_advantages_are_sums_along_episodes():
    """Discounted sums of temporal differences that stop at ends, by the definition."""
    g, shape = rng(1), (7, 3)
    reward, value, after = (torch.randn(shape, generator=g, dtype=DOUBLE) for _ in range(3))
    ended = (torch.rand(shape, generator=g) < 0.3).double()
    terminated = ended * (torch.rand(shape, generator=g) < 0.5)
    found = advantages(reward, value, after, terminated, ended, discount=0.9, gae=0.8)
    delta = reward + 0.9 * (1 - terminated) * after - value
    for k, e in np.ndindex(shape):
        total, factor = 0.0, 1.0
        for j in range(k, shape[0]):
            total += factor * float(delta[j, e])
            if ended[j, e]:
                break
            factor *= 0.9 * 0.8
        assert abs(float(found[k, e]) - total) < 1e-12


@pytest.mark.parametrize("preset", ["corrected", "official"])
def test_decisions_have_the_law_that_they_are_drawn_from(preset):
    """Stored log-densities are those of normal laws about the reverse step's means."""
    agent = make(preset, **SMALL)
    rollout = played(agent, 3)
    levels = agent.policy.sigmas.flip(0).double()
    for i in range(4):
        above, below = levels[i], levels[i + 1]
        posterior = below / above * ((above - below) * (above + below)).sqrt()
        std = max(float(posterior), 0.1 * math.sqrt(1 + float(below) ** 2))
        before, after = rollout.chain[:, i], rollout.chain[:, i + 1]
        with torch.no_grad():
            denoised = agent.policy.denoiser(before, above.float(), rollout.observation)
        mean = torch.lerp(denoised.clamp(-1, 1), before, float(below / above) ** 2)
        law = torch.distributions.Normal(mean.double(), std)
        each = law.log_prob(after.double())
        expected = each.sum(-1) if preset == "corrected" else each.clamp(-5, 2).mean(-1)
        torch.testing.assert_close(rollout.log_prob[:, i].double(), expected, rtol=1e-4, atol=1e-4)
        assert float(((after - mean) / std).abs().max()) < 3 + 1e-4
    assert min(float(part) for part in agent._decisions[2]) >= 0.1


@pytest.mark.parametrize(
    "changes", [{}, {"ratio": "mean"}, {"clip_base": 0.02, "denoising_discount": 0.8}]
)
def test_policy_loss_against_a_slow_reference(changes):
    """Value and gradient, decision by decision in double precision."""
    agent = in_double_too(make(clip=0.05, **changes))
    config, n, g = agent.config, 24, rng(3)
    observation = torch.randn(n, OBS, generator=g, dtype=DOUBLE)
    before = torch.randn(n, ACT, generator=g, dtype=DOUBLE)
    i = torch.arange(n) % 4
    noise = torch.randn(n, ACT, generator=g, dtype=DOUBLE)
    shift = 0.05 * torch.randn(n, generator=g, dtype=DOUBLE)
    advantage = torch.randn(n, generator=g, dtype=DOUBLE)
    with torch.no_grad():
        mean = agent._mean(before, i, observation)
        after = mean + agent._decisions[2][i].unsqueeze(-1) * noise
        old = agent._log_prob(after, mean, i) + shift
    loss, numbers = agent.policy_loss(observation, before, after, i, old, advantage)
    total = torch.zeros((), dtype=DOUBLE)
    for k in range(n):
        j = int(i[k])
        level, keep, std = (float(part[j]) for part in agent._decisions)
        denoised = agent.policy.denoiser(before[k : k + 1], level, observation[k : k + 1])[0]
        inside = inward_cut(denoised)
        each = torch.distributions.Normal(inside + keep * (before[k] - inside), std).log_prob(
            after[k]
        )
        density = each.clamp(-5, 2).mean() if config.ratio == "mean" else each.sum()
        ratio = (density - old[k]).exp()
        base = config.clip if config.clip_base is None else config.clip_base
        clip = base + (config.clip - base) * math.expm1(3 * j / 3) / math.expm1(3)
        weight = config.denoising_discount ** (3 - j) * advantage[k]
        total = total - torch.minimum(weight * ratio, weight * ratio.clamp(1 - clip, 1 + clip)) / n
    torch.testing.assert_close(loss, total, rtol=1e-6, atol=1e-8)
    parameters = list(agent.policy.parameters())
    for a, b in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(total, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert 0 < float(numbers["clipped"]) < 1
    assert float(numbers["kl_to_old"]) > 0


def test_the_first_step_on_a_rollout_is_unclipped():
    """The policy that drew has ratio 1: the loss is minus the mean advantage."""
    agent = make()
    rollout = played(agent, 3)
    chain = rollout.chain.transpose(1, 2).flatten(0, 1)
    old = rollout.log_prob.transpose(1, 2).flatten(0, 1)
    advantage = torch.randn(len(old), generator=rng(1))
    i = torch.full((len(old),), 2)
    loss, numbers = agent.policy_loss(
        rollout.observation.flatten(0, 1), chain[:, 2], chain[:, 3], i, old[:, 2], advantage
    )
    assert abs(float(loss.detach() + advantage.mean())) < 1e-5
    assert float(numbers["clipped"]) == 0


def test_a_rollout_is_learned_from_once_and_whole(monkeypatch):
    """Nothing happens before it is complete; steps that belong to no episode are left out."""
    agent = make(num_envs=3, epochs=2)
    replay = rl.ReplayBuffer(10, OBS, ACT)
    played(agent, 3)
    assert agent.update(replay) == {}
    valid = [np.array([True, k > 0, True]) for k in range(4)]
    agent._rows = []
    played(agent, 4, valid=valid)
    seen = []
    loss = agent.policy_loss

    def counted(observation, *rest):
        seen.append(len(observation))
        return loss(observation, *rest)

    monkeypatch.setattr(agent, "policy_loss", counted)
    numbers = agent.update(replay)
    decisions = (4 * 3 - 1) * 4
    assert sum(seen) == 2 * decisions
    assert agent.updates == len(seen)
    assert {"policy_loss", "critic_loss", "kl_to_old", "clipped"} <= numbers.keys()
    assert agent.update(replay) == {}


def test_a_rollout_is_left_when_the_policy_has_moved_far():
    """No step is taken from where the divergence exceeds its target."""
    agent = make(policy_lr=0.1, epochs=50, target_kl=0.01, rollout_steps=24)
    played(agent, 3)
    agent.update(rl.ReplayBuffer(10, OBS, ACT))
    assert 1 <= agent.updates < 50


def test_rewards_are_scaled_by_the_returns_spread():
    """By the running standard deviation of discounted returns, which end with an episode."""
    agent = make(num_envs=1)
    random = np.random.default_rng(0)
    totals, total = [], 0.0
    for k in range(30):
        agent.act(np.zeros((1, OBS), np.float32))
        reward, ended = float(random.normal()), k % 7 == 6
        total = 0.99 * total + reward
        totals.append(total)
        after = np.zeros((1, OBS), np.float32)
        flag = np.array([ended])
        agent.observe(Transition(after, after, np.float32([reward]), flag, flag, np.array([True])))
        scaled = float(agent._rows[-1].reward[0])
        if k > 2:
            assert abs(scaled * np.std(totals) - reward) < 1e-4
        total *= 1 - ended


def test_clips_grow_from_base_to_clip():
    """Exponentially; a chain of one step has the last clip."""
    found = clip_range(DPPOConfig(num_steps=5, clip=0.3, clip_base=0.1))
    assert torch.all(found.diff().diff() > 0)
    torch.testing.assert_close(found[[0, -1]], torch.tensor([0.1, 0.3]))
    assert float(clip_range(DPPOConfig(num_steps=1, clip=0.3, clip_base=0.1))[0]) == pytest.approx(
        0.3
    )


def test_learns_a_bandit():
    """Most draws end near one of the two good actions, where 0.4 of uniform ones lie."""
    trained = rl.train_dppo(
        Wells,
        total_steps=4000,
        num_envs=20,
        rollout_steps=400,
        batch_size=500,
        width=48,
        depth=2,
        num_steps=5,
        policy_lr=1e-3,
        eval_every=0,
        progress=False,
    )
    draws = trained.predict(np.zeros((600, 1)))[0][:, 0]
    near = np.minimum(abs(draws - 0.5), abs(draws + 0.5))
    assert (near < 0.2).mean() > 0.55


def test_cost_is_that_of_rollouts():
    """Counted and timed on two of them: twice the epochs cost more."""
    sizes = {"rollout_steps": 40, "num_envs": 2, "width": 16, "depth": 1, "batch_size": 64}
    once, often = (
        estimate_cost("dppo", "Pendulum-v1", epochs=n, target_kl=1e9, **sizes) for n in (1, 20)
    )
    assert 5 < often.gflop / once.gflop < 20
    assert once.seconds > 0


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_step": 3}, "n_step must be left at 1 for DPPO"),
        ({"noise": 0.1}, "noise must be left at 0.0 for DPPO"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"gae": 1.2}, r"gae must be in \[0, 1\], got 1.2"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"quantile": 0.5}, r"quantile must be in \[0, 0.5\)"),
        ({"ratio": "sum"}, "ratio must be one of"),
    ],
)
def test_bad_configurations_are_refused(changes, message):
    """With the field, the rule and the value."""
    with pytest.raises(ValueError, match=message):
        DPPOConfig(**changes)
