r"""A diffusion policy: one network for all states, sampled by the core's ancestral chain.

The policy is the core's :class:`~rsm_sampler.denoisers.Denoiser` with the observation as context,
at the T noise levels of a discrete schedule, and its actions are the core's chain over these
levels, of first or of second order (:mod:`rsm_sampler.ancestral`). Two things are particular to
actions.

**They live in a box.** The denoised action is cut to :math:`[-1, 1]` at every step of the chain
(its last step returns it, so that actions never leave the box), but not in the losses, whose
gradient would vanish where a cut one lies outside.

**One observation meets many noisy actions**, of M candidates and T levels.
:meth:`DiffusionPolicy.bind` multiplies the first layer with the observation and with the embedded
times once per chain; a step then only adds the share of the noisy action.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rsm_sampler.ancestral import Ancestral, Multistep
from rsm_sampler.checked import checked
from rsm_sampler.denoisers import Denoiser, Prediction
from rsm_sampler.ensemble import EnsembleMLP
from rsm_sampler.flows import DDIM
from rsm_sampler.schedules import DiscreteSchedule

__all__ = ["ActionSource", "ChainName", "DiffusionPolicy", "PolicyNetwork", "inward_cut"]

CHUNK = 2048
"""Actions that one chain draws together on a CPU; what it works on stays in the cache."""


@runtime_checkable
class ActionSource(Protocol):
    """Anything that draws actions: a diffusion policy, or another chain on its network."""

    def sample(
        self,
        observation: Float[Tensor, "n observation_dim"],
        candidates: int = 1,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "n candidates action_dim"]:
        """Independent actions, (n, candidates, action_dim), within [-1, 1].

        Arguments:
            observation: Observations, (n, observation_dim).
            candidates: Actions of each.
            generator: Source of randomness, on the policy's device.
        """


ChainName = Literal["ancestral", "multistep"]

_TIME = 16


@checked
class PolicyNetwork(nn.Module):
    r"""Mish perceptron of the noisy action, the observation and an embedded time.

    The embedding is that of the code published with the paper: a sinusoid of length 16, divided
    by 4, then linear to 32, Mish, linear to 16.

    Arguments:
        action_dim: Length of an action.
        observation_dim: Length of an observation.
        schedule: Turns noise levels into times.
        sigma_data: The unit of the noise levels it is given, in units of actions.
        width: Units of a hidden layer.
        depth: Number of hidden layers.
        generator: Source of the initial weights, on the CPU.
    """

    def __init__(
        self,
        action_dim: int,
        observation_dim: int,
        schedule: DiscreteSchedule,
        *,
        sigma_data: float = 1.0,
        width: int = 256,
        depth: int = 3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.schedule, self.sigma_data = schedule, sigma_data
        self.body = EnsembleMLP(
            [action_dim, observation_dim, _TIME],
            action_dim,
            width=width,
            depth=depth,
            generator=generator,
        )
        self.time = EnsembleMLP([_TIME], _TIME, width=2 * _TIME, depth=1, generator=generator)

    def forward(
        self,
        x: Float[Tensor, "*batch dim"],
        log_sigma: Float[Tensor, "*batch"],
        context: Float[Tensor, "*batch observation_dim"],
    ) -> Float[Tensor, "*batch dim"]:
        r"""The output for scaled noisy actions.

        Arguments:
            x: Scaled noisy actions, with shape :math:`(*, d_a)`.
            log_sigma: Logarithms of their noise levels, in units of ``sigma_data``.
            context: Observations.
        """
        t = self.schedule.time(log_sigma.exp() * self.sigma_data)
        return self.body(x, context, self.embed(t)).squeeze(0)

    def embed(self, t: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch 16"]:
        """The embedding of times within [0, T]."""
        half = _TIME // 2
        rate = torch.exp(torch.arange(half, device=t.device) * (-math.log(1e4) / (half - 1)))
        angle = t.unsqueeze(-1) * rate.to(t.dtype)
        sinusoid = torch.cat([angle.sin(), angle.cos()], -1) / math.sqrt(_TIME)
        return self.time(sinusoid).squeeze(0)


@checked
class DiffusionPolicy(nn.Module):
    r"""Actions in :math:`[-1, 1]^{d_a}` given observations, by a chain of T denoising steps.

    Arguments:
        observation_dim: Length of an observation.
        action_dim: Length of an action.
        schedule: The T noise levels.
        prediction: What the network's output means; see :mod:`rsm_sampler.denoisers`.
        sigma_data: Scale of actions, for the preconditioning.
        start_scale: Factor on the noise from which a chain starts.
        chain: ``"ancestral"`` or ``"multistep"``.
        width: Units of a hidden layer.
        depth: Number of hidden layers.
        generator: Source of the initial weights, on the CPU.

    Example:
        >>> from rsm_sampler.schedules import Cosine
        >>> policy = DiffusionPolicy(3, 2, Cosine(20), width=32)
        >>> policy.sample(torch.randn(5, 3), 4).shape
        torch.Size([5, 4, 2])
    """

    sigmas: Tensor
    _times: Tensor

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        schedule: DiscreteSchedule,
        *,
        prediction: Prediction = "preconditioned",
        sigma_data: float = 0.5,
        start_scale: float = 1.0,
        chain: ChainName = "ancestral",
        width: int = 256,
        depth: int = 3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.observation_dim, self.action_dim = observation_dim, action_dim
        self.schedule, self.start_scale = schedule, start_scale
        network = PolicyNetwork(
            action_dim,
            observation_dim,
            schedule,
            sigma_data=1.0 if prediction == "noise" else sigma_data,
            width=width,
            depth=depth,
            generator=generator,
        )
        self.network = network
        self.denoiser = Denoiser(network, sigma_data, prediction)
        levels = schedule.sigmas()
        self.register_buffer("sigmas", levels.flip(0).float())  # level t at index t
        kind = Multistep if chain == "multistep" else Ancestral
        self._chain = kind(
            self.denoiser, levels, dim=action_dim, centred=False, start_scale=start_scale
        )
        self._flow = DDIM(self.denoiser, levels, dim=action_dim, centred=False)
        self._levels = self._chain.levels
        numbers = torch.stack(self.denoiser.coefficients(levels[:-1])).T.tolist()
        self._coefficients = dict(zip(levels[:-1].tolist(), numbers, strict=True))
        self.register_buffer("_times", torch.arange(schedule.num_steps, 0, -1.0), persistent=False)

    def sample(
        self,
        observation: Float[Tensor, "n observation_dim"],
        candidates: int = 1,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "n candidates action_dim"]:
        """Independent actions.

        Arguments:
            observation: Observations, (n, observation_dim).
            candidates: Actions of each.
            generator: Source of randomness, on the policy's device.

        Returns:
            The actions, (n, candidates, action_dim), within [-1, 1].
        """
        n, size = len(observation), max(1, CHUNK // candidates)
        if n > size and observation.device.type == "cpu":
            parts = observation.split(size)
            return torch.cat([self.sample(p, candidates, generator=generator) for p in parts])
        chain = self._chain.around(self.bind(observation, candidates))
        x = chain.sample(n * candidates, generator=generator)
        return x.view(n, candidates, self.action_dim)

    @torch.no_grad()
    def flow(
        self,
        observation: Float[Tensor, "n observation_dim"],
        starts: Float[Tensor, "m action_dim"],
    ) -> Float[Tensor, "n m action_dim"]:
        """The ends of chains without noise (DDIM), which all observations start alike.

        Arguments:
            observation: Observations, (n, observation_dim).
            starts: Standard normal noises, (m, action_dim).
        """
        n, m = len(observation), len(starts)
        flow = self._flow.around(self.bind(observation, m))
        x = (self._levels[0] * self.start_scale * starts).repeat(n, 1)
        for sigma_t, sigma_s in itertools.pairwise(self._levels):
            x = flow.step(x, sigma_t, sigma_s)
        return x.view(n, m, -1)

    def walk(
        self,
        observation: Float[Tensor, "n observation_dim"],
        noise: Float[Tensor, "steps n action_dim"],
        *,
        cut: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "n action_dim"]:
        """The ends of ancestral chains with given noises, a differentiable function of all.

        Arguments:
            observation: Observations, (n, observation_dim).
            noise: Standard normal noises, (T, n, action_dim): of the start and of all steps but
                the last, which has none.
            cut: What takes denoised actions to [-1, 1]; plain clamping if None.
        """
        body = self.network.body
        # As in _Bound, the shares of observations and times in the first layer are taken once.
        observed = -body.first(1, observation, bias=True)
        times = body.first(2, self.network.embed(self._times))[0]
        x = self._levels[0] * self.start_scale * noise[0]
        for i, (sigma_t, sigma_s) in enumerate(itertools.pairwise(self._levels)):
            keep, gain, shrink = self._coefficients[sigma_t]
            output = body.rest(observed - times[i] - body.first(0, shrink * x))[0]
            denoised = torch.add(keep * x, output, alpha=gain)
            denoised = denoised.clamp(-1.0, 1.0) if cut is None else cut(denoised)
            if sigma_s == 0:
                break
            ratio = sigma_s / sigma_t
            std = ratio * math.sqrt((sigma_t - sigma_s) * (sigma_t + sigma_s))
            x = torch.lerp(denoised, x, ratio**2).add(noise[i + 1], alpha=std)
        return denoised

    @torch.no_grad()
    def bind(
        self, observation: Float[Tensor, "n observation_dim"], candidates: int = 1
    ) -> Callable[[Tensor, float], Tensor]:
        """The cut denoiser for some observations, of points (n candidates, action_dim).

        Arguments:
            observation: Observations, (n, observation_dim).
            candidates: Points that share an observation, one after the other.
        """
        return _Bound(self, observation, candidates)


class _InwardCut(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clamp(-1.0, 1.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ANN401
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        (x,) = ctx.saved_tensors
        # A step against the gradient raises x where the gradient is negative.
        outward = ((x > 1) & (gradient < 0)) | ((x < -1) & (gradient > 0))
        return torch.where(outward, torch.zeros_like(gradient), gradient)


@checked
def inward_cut(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Values cut to [-1, 1], whose gradient passes where a step against it leads back inside.

    Arguments:
        x: Values of any shape.

    Example:
        >>> x = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
        >>> inward_cut(x).sum().backward()  # a step against it lowers x
        >>> x.grad
        tensor([0., 1., 1.])
    """
    cut: Tensor = _InwardCut.apply(x)
    return cut


class _Bound:
    """A denoiser whose observations and times have passed through the first layer."""

    by_number = True

    def __init__(self, policy: DiffusionPolicy, observation: Tensor, candidates: int) -> None:
        body = policy.network.body
        self.body, self.candidates = body, candidates
        self.prepared = None if body.plain else body.prepared()
        self.buffer: Tensor | None = None
        self.coefficients = policy._coefficients
        self.weight = body.weights[0][0, : policy.action_dim]
        # Minus the share of observation and bias, (n, width), and of the times, (T, width).
        self.observed = -body.first(1, observation, bias=True)[0]
        embedded = policy.network.embed(policy._times)
        times = body.first(2, embedded)[0]
        # Both together, (n, width) at each level; for many observations one level at a time.
        self.times = dict(zip(policy._coefficients, times.unbind(0), strict=True))
        few = len(observation) <= 16
        self.before = (
            dict(
                zip(
                    policy._coefficients,
                    (self.observed - times.unsqueeze(1)).unbind(0),
                    strict=True,
                )
            )
            if few
            else {}
        )

    def parameters(self) -> "list[Tensor]":
        return [self.weight]

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        keep, gain, shrink = self.coefficients[sigma]
        before = self.before.get(sigma)
        if before is None:
            before = self.observed - self.times[sigma]
        if self.candidates == 1:
            y = torch.addmm(before, x, self.weight, alpha=-shrink)
        elif self.body.plain:
            y = before.unsqueeze(1) - shrink * (x @ self.weight).view(
                len(before), self.candidates, -1
            )
        else:
            if self.buffer is None:
                self.buffer = x.new_empty(len(x), self.weight.shape[-1])
            torch.mm(x, self.weight, out=self.buffer)
            y = self.buffer.view(len(before), self.candidates, -1)
            torch.sub(before.unsqueeze(1), y, alpha=shrink, out=y)
        output = self.body.rest(y.view(1, len(x), -1), self.prepared)[0]
        x_0 = torch.add(keep * x, output, alpha=gain)
        return x_0.clamp(-1.0, 1.0) if self.body.plain else x_0.clamp_(-1.0, 1.0)
