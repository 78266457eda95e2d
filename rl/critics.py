r"""Critics: an ensemble of Q-functions in one network.

Pessimism is :math:`Q_{\min}(s, a) = \min_i Q_i(s, a)`. Best-of-M action selection (16) is the
arg max of it over M candidates: an implicitly sharper policy, at most
:math:`\log M - (M - 1)/M` nats from the one that made the candidates.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rsm_sampler.checked import checked
from rsm_sampler.ensemble import Activation, EnsembleMLP

__all__ = ["Critic", "ReturnCritic", "best_candidate", "frozen"]


@checked
class Critic(EnsembleMLP):
    r"""Q-functions :math:`Q_i(s, a)`, perceptrons of observation and action.

    Arguments:
        observation_dim: Length of an observation.
        action_dim: Length of an action.
        members: Number of Q-functions.
        width: Units of a hidden layer.
        depth: Number of hidden layers.
        layer_norm: Whether hidden layers are normalised.
        activation: The nonlinearity, ``"mish"`` or ``"relu"``.
        generator: Source of the initial weights, on the CPU.
        outputs: Numbers that a member returns, of which the first is its value.

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
        activation: Activation = "mish",
        generator: torch.Generator | None = None,
        outputs: int = 1,
    ) -> None:
        super().__init__(
            [observation_dim, action_dim],
            outputs,
            members=members,
            width=width,
            depth=depth,
            layer_norm=layer_norm,
            activation=activation,
            generator=generator,
        )
        self.observation_dim, self.action_dim = observation_dim, action_dim

    def values(
        self,
        observation: Float[Tensor, "*#batch observation_dim"],
        action: Float[Tensor, "*batch action_dim"],
    ) -> Float[Tensor, "members *batch"]:
        """The values of all members; the batch shapes broadcast."""
        return self(observation, action)[..., 0]

    def minimum(
        self,
        observation: Float[Tensor, "*#batch observation_dim"],
        action: Float[Tensor, "*batch action_dim"],
    ) -> Float[Tensor, "*batch"]:
        """The smallest value of the members."""
        return self.values(observation, action).amin(0)


@checked
class ReturnCritic(Critic):
    r"""Normal laws of the return, :math:`\mathcal N(Q_i(s, a), \sigma_i(s, a)^2)`.

    Arguments:
        observation_dim: Length of an observation.
        action_dim: Length of an action.
        **options: As for :class:`Critic`.

    Example:
        >>> mean, std = ReturnCritic(3, 2, width=16).law(torch.randn(5, 3), torch.randn(5, 2))
        >>> mean.shape, bool((std > 0).all())
        (torch.Size([2, 5]), True)
    """

    def __init__(self, observation_dim: int, action_dim: int, **options: Any) -> None:  # noqa: ANN401
        super().__init__(observation_dim, action_dim, **{**options, "outputs": 2})

    def law(
        self,
        observation: Float[Tensor, "*#batch observation_dim"],
        action: Float[Tensor, "*batch action_dim"],
    ) -> tuple[Float[Tensor, "members *batch"], Float[Tensor, "members *batch"]]:
        """Means and standard deviations of all members; the batch shapes broadcast."""
        mean, raw = self(observation, action).unbind(-1)
        return mean, nn.functional.softplus(raw)


@checked
@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let no gradients go to a module's own parameters: for those of its inputs alone.

    Arguments:
        module: Its parameters are trainable before and after. A plain one
            (:class:`~rsm_sampler.ensemble.EnsembleMLP`) stays as it is, since within
            ``torch.vmap`` its parameters are others.
    """
    if getattr(module, "plain", False):
        yield
        return
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


@checked
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
    if candidates.shape[-1] != critic.action_dim:
        raise ValueError(
            f"candidates must have shape (n, m, {critic.action_dim}), "
            f"got {tuple(candidates.shape)}"
        )
    if candidates.shape[1] == 1:
        return candidates[:, 0]
    best = critic.minimum(observation.unsqueeze(1), candidates).argmax(1)
    index = best.view(-1, 1, 1).expand(-1, 1, candidates.shape[-1])
    return candidates.gather(1, index).squeeze(1)
