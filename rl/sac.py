r"""SAC, soft actor-critic with a squashed Gaussian policy: the yardstick of the others.

:math:`a = \tanh u`, :math:`u \sim \mathcal N(\mu_\theta(s), \sigma_\theta(s)^2)`, with the density

.. math:: \log \pi(a | s) = \log \mathcal N(u; \mu, \sigma^2) - \sum_j \log(1 - a_j^2), \qquad
          \log (1 - \tanh^2 u) = 2\, (\log 2 - u - \mathrm{softplus}(-2u)) .

The target subtracts :math:`\lambda \log \pi(a' | s')`, the policy minimises
:math:`\mathbb E[\lambda \log \pi - \min_i Q_i]`, and :math:`\lambda` follows Adam steps on
:math:`-\log\lambda\, (\log \pi + \bar{\mathcal H})` towards the entropy
:math:`\bar{\mathcal H} = -d_a` for the action.

References:
    | Soft actor-critic algorithms and applications (Haarnoja et al., 2018)
    | https://arxiv.org/abs/1812.05905
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rl.config import AgentConfig
from rl.off_policy import NextAction, OffPolicyAgent
from rl.replay import Batch
from rsm_sampler.ensemble import EnsembleMLP

__all__ = ["SAC", "SACConfig"]


@dataclass(frozen=True, kw_only=True)
class SACConfig(AgentConfig):
    """Configuration of :class:`SAC`.

    Attributes:
        temperature: Lambda at the start, in units of scaled reward.
        temperature_lr: Adam's learning rate of its logarithm; 0 to keep it.
        target_entropy: Entropy per dimension that is tuned for, in nats.
        log_std_min: Least logarithm of the standard deviation before the tanh.
        log_std_max: Largest.
    """

    policy_period: int = 1
    temperature: float = 1.0
    temperature_lr: float = 3e-4
    target_entropy: float = -1.0
    log_std_min: float = -5.0
    log_std_max: float = 2.0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant; see the base class."""
        super().__post_init__()
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not 0 <= self.temperature_lr < 1:
            raise ValueError(f"temperature_lr must be in [0, 1), got {self.temperature_lr}")
        if not self.log_std_min < self.log_std_max:
            raise ValueError(
                f"log_std_max must be above log_std_min {self.log_std_min}, got {self.log_std_max}"
            )


class SAC(OffPolicyAgent):
    """The agent; see :mod:`rl.sac` and :class:`~rl.off_policy.OffPolicyAgent`."""

    name = "sac"
    config_type = SACConfig
    policy: EnsembleMLP

    def build_policy(self, generator: torch.Generator) -> nn.Module:
        """Mean and logarithm of the standard deviation, before the tanh."""
        start = math.log(self.config.temperature)
        self._log_temperature = torch.full((), start, device=self.device, requires_grad=True)
        cuda = self.device.type == "cuda"
        self.temperature_optimiser = torch.optim.Adam(
            [self._log_temperature], lr=self.config.temperature_lr, fused=True, capturable=cuda
        )
        return EnsembleMLP(
            [self.observation_dim],
            2 * self.action_dim,
            width=self.config.width,
            depth=self.config.depth,
            generator=generator,
        )

    @property
    def temperature(self) -> float:
        """Lambda, in units of scaled reward."""
        return float(self._log_temperature.detach().exp())

    def sample(
        self, observation: Float[Tensor, "n obs"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "n act"], Float[Tensor, " n"]]:
        """Actions and their log-densities.

        Arguments:
            observation: Standardised observations.
            generator: Source of randomness.
        """
        mean, log_std = self.policy(observation)[0].chunk(2, -1)
        low, high = self.config.log_std_min, self.config.log_std_max
        log_std = low + 0.5 * (high - low) * (torch.tanh(log_std) + 1)
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        u = mean + log_std.exp() * noise
        log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
        return torch.tanh(u), (log_normal - log_slope).sum(-1)

    def explore(self, observation: Float[Tensor, "n obs"]) -> Float[Tensor, "n act"]:
        """A draw of the policy."""
        return self.sample(observation, self.acting_generator)[0]

    def exploit(self, observation: Float[Tensor, "n obs"]) -> Float[Tensor, "n act"]:
        """The tanh of the mean."""
        return torch.tanh(self.policy(observation)[0].chunk(2, -1)[0])

    def next_action(self, batch: Batch, with_policy: bool) -> NextAction:
        """A draw of the policy, with the entropy it costs."""
        action, log_prob = self.sample(batch.next_observation, self.generator)
        return NextAction(action, self._log_temperature.detach().exp() * log_prob)

    def policy_loss(self, batch: Batch, drawn: NextAction) -> tuple[Tensor, dict[str, Tensor]]:
        """The reparameterised objective at the batch's states."""
        action, log_prob = self.sample(batch.observation, self.generator)
        value = self.critic.minimum(batch.observation, action)
        temperature = self._log_temperature.detach().exp()
        self._missing = (-log_prob.detach() / self.action_dim).mean()
        return (temperature * log_prob - value).mean(), {"entropy_per_dim": self._missing}

    def after_policy_step(self, batch: Batch, drawn: NextAction) -> dict[str, Tensor]:
        """A step of the temperature."""
        if self.config.temperature_lr > 0:
            excess = self.action_dim * (self._missing - self.config.target_entropy)
            with torch.no_grad():
                self._log_temperature.grad = excess.to(self._log_temperature)
            self.temperature_optimiser.step()
        return {"temperature": self._log_temperature.detach().exp()}

    def extra_state(self) -> dict[str, Any]:
        """The temperature."""
        return {"log_temperature": self._log_temperature.detach()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back the temperature."""
        with torch.no_grad():
            self._log_temperature.copy_(state["log_temperature"])

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        return [*super()._optimisers(), self.temperature_optimiser]
