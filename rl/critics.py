r"""Critics: an ensemble of Q-functions in one network.

Pessimism is :math:`Q_{\min}(s, a) = \min_i Q_i(s, a)`. Best-of-M action selection (16) is the
arg max of it over M candidates: an implicitly sharper policy, at most
:math:`\log M - (M - 1)/M` nats from the one that made the candidates.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rsm_sampler.ensemble import EnsembleMLP

__all__ = ["Critic", "best_candidate"]


class Critic(EnsembleMLP):
    r"""Q-functions :math:`Q_i(s, a)`, Mish perceptrons of observation and action.

    Arguments:
        observation_dim: Length of an observation.
        action_dim: Length of an action.
        members: Number of Q-functions.
        width: Units of a hidden layer.
        depth: Number of hidden layers.
        layer_norm: Whether hidden layers are normalised.
        generator: Source of the initial weights, on the CPU.

    Example:
        >>> critic = Critic(3, 2, width=16)
        >>> critic.values(torch.randn(5, 1, 3), torch.randn(5, 64, 2)).shape
        torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        members: int = 2,
        width: int = 256,
        depth: int = 3,
        layer_norm: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            [observation_dim, action_dim],
            1,
            members=members,
            width=width,
            depth=depth,
            layer_norm=layer_norm,
            generator=generator,
        )

    def values(
        self,
        observation: Float[Tensor, "*#batch observation_dim"],
        action: Float[Tensor, "*batch action_dim"],
    ) -> Float[Tensor, "members *batch"]:
        """The values of all members; the batch shapes broadcast."""
        return self(observation, action).squeeze(-1)

    def minimum(
        self,
        observation: Float[Tensor, "*#batch observation_dim"],
        action: Float[Tensor, "*batch action_dim"],
    ) -> Float[Tensor, "*batch"]:
        """The smallest value of the members."""
        return self.values(observation, action).amin(0)


@torch.no_grad()
def best_candidate(
    critic: Critic,
    observation: Float[Tensor, "n observation_dim"],
    candidates: Float[Tensor, "n m action_dim"],
) -> Float[Tensor, "n action_dim"]:
    """The candidate of the largest pessimistic value, (16).

    Arguments:
        critic: Ranks the candidates; not asked about single ones.
        observation: Observations, (n, observation_dim).
        candidates: Actions, (n, m, action_dim).
    """
    if candidates.shape[1] == 1:
        return candidates[:, 0]
    best = critic.minimum(observation.unsqueeze(1), candidates).argmax(1)
    index = best.view(-1, 1, 1).expand(-1, 1, candidates.shape[-1])
    return candidates.gather(1, index).squeeze(1)
