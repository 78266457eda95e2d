"""What the agents learn where every action is worth the same: identities that need training."""

import math

import pytest
import torch

from rl.dpmd import DPMD, DPMDConfig
from rl.off_policy import NextAction
from rl.replay import Batch
from rl.sdac import SDAC, SDACConfig

SMALL = {"width": 64, "num_steps": 20, "batch_size": 256, "policy_period": 1}


class Constant:
    def minimum(self, observation, action):
        return torch.full(action.shape[:-1], 3.0)


def batch_of(action):
    zero = torch.zeros(len(action), 1)
    return Batch(zero, action, zero[:, 0], zero, zero[:, 0], zero[:, 0] + 1)


def train(agent, draw, steps):
    """Adam with a learning rate that falls to nothing; draw gives the actions of a step."""
    agent.critic = Constant()
    for i in range(steps):
        batch, drawn = draw()
        loss, _ = agent.policy_loss(batch, drawn)
        for group in agent.policy_optimiser.param_groups:
            group["lr"] = 5e-3 * 0.5 * (1 + math.cos(math.pi * i / steps))
        agent.policy_optimiser.zero_grad()
        loss.backward()
        agent.policy_optimiser.step()


def error(agent, exact, x_0, generator):
    """Root mean square error of the denoiser at each level, over noisy actions."""
    found = []
    for sigma in agent.policy.sigmas[1:]:
        x = x_0 + sigma * torch.randn(x_0.shape, generator=generator)
        with torch.no_grad():
            mine = agent.policy.denoiser(x, sigma.expand(len(x)), torch.zeros(len(x), 1))
        found.append(float((mine - exact(x, sigma)).square().mean().sqrt()))
    return found


def uniform_denoiser(x, sigma):
    x, sigma = x.double(), float(sigma)
    low, high = (-1 - x) / sigma, (1 - x) / sigma
    mass = torch.special.ndtr(high) - torch.special.ndtr(low)
    edge = (torch.exp(-0.5 * low**2) - torch.exp(-0.5 * high**2)) / math.sqrt(2 * math.pi)
    return torch.where(mass > 1e-9, x + sigma * edge / mass, x.clamp(-1, 1))


@pytest.mark.numbers
@pytest.mark.parametrize("anneal_stages", [0, 2])
def test_sdac_of_a_constant_value_is_uniform_on_the_box(anneal_stages):
    """The denoiser is that of the uniform law, whose own spread is 0.58.

    64 candidates of spread up to 0.58 leave a noise of 0.07 in a target, of which a fit over
    100,000 noisy actions keeps a tenth; a kernel that is not truncated is off by 0.3.
    """
    config = SDACConfig(
        **SMALL, policy_states=256, temperature_rule="fixed", anneal_stages=anneal_stages
    )
    agent = SDAC(1, 1, config, seed=0, device="cpu")
    generator = torch.Generator().manual_seed(1)

    def draw():
        action = 2 * torch.rand(256, 1, generator=generator) - 1
        return batch_of(action), NextAction(action)

    train(agent, draw, 400)
    x_0 = 2 * torch.rand(5000, 1, generator=generator) - 1
    assert max(error(agent, uniform_denoiser, x_0, generator)) < 0.05


@pytest.mark.numbers
def test_dpmd_of_a_constant_value_is_the_old_policy():
    """The denoiser is that of the old policy, here a normal law of spread 0.3 at 0.2.

    A target is a draw, of spread up to 0.3; a fit over 200,000 of them keeps a twentieth. The
    denoiser of an unweighted uniform law is off by 0.2.
    """
    config = DPMDConfig(
        **SMALL, draws_per_state=4, policy_states=128, target_kl=None, old_policy_period=10**9
    )
    agent = DPMD(1, 1, config, seed=0, device="cpu")
    generator = torch.Generator().manual_seed(1)

    def draw():
        draws = 0.2 + 0.3 * torch.randn(128, 4, 1, generator=generator)
        return batch_of(draws[:, 0]), NextAction(draws[:, 0], draws=draws)

    def exact(x, sigma):
        return (0.2 * sigma**2 + 0.09 * x) / (sigma**2 + 0.09)

    train(agent, draw, 400)
    x_0 = 0.2 + 0.3 * torch.randn(5000, 1, generator=generator)
    assert max(error(agent, exact, x_0, generator)) < 0.05
