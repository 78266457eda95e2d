r"""QSM, Q-score matching: the score of the policy is the action gradient of the critic.

The policy wanted is the maximum-entropy one, :math:`\pi(a | s) \propto e^{Q(s, a)/\lambda}`, whose
score is :math:`\nabla_a Q(s, a)/\lambda`. A diffusion model needs the score of the *noised* law,
and that is not the gradient at the noisy action but its mean over the clean actions behind it,

.. math:: \nabla_{x_t} \log p_t(x_t | s)
          = \mathbb E\big[ \tfrac1\lambda \nabla_a Q(s, a) \,\big|\, x_t, s \big] .

By default the regression is on this mean, by the core's
:func:`~rsm_sampler.estimators.posterior_estimate` from K clean candidates about the noised action
of the replay, each with its gradient. At low noise the candidates coincide and the target is the
gradient itself, as in the paper; at high noise, where a gradient says little about the mean, the
``"mixed"`` target takes their values instead, in the share that makes its variance least.

**The box.** Integration by parts, behind the identity above, leaves out what a hard edge of the
box of actions adds. So the law is continued beyond the edges by soft walls,

.. math:: E(a | s) = -\frac{Q(s, \bar a)}{\lambda} + \frac{\|a - \bar a\|^2}{2 b^2}, \qquad
          \bar a = \mathrm{clip}(a, -1, 1),

of width b, within which the gradient is exact; the chain cuts actions to the box as always. The
candidates come from the reverse kernel times a broad normal law, so that they stay near the box at
every noise level.

The temperature is tuned by the policy's entropy (:mod:`rl.entropy`), as SDAC's is, with the same
floor ``min_ess`` under what K candidates can tell.

Note:
    Deviations of the presets from the equations are those of the published codes. ``"official"``
    regresses the predicted noise on :math:`-\tfrac1\lambda \nabla_a \tfrac12 (Q_1 + Q_2)` *at the
    noisy action* with :math:`1/\lambda = 50`: the score of the clean law in the place of the
    noised one, without its factor :math:`\sqrt{1 - \bar\alpha_t}`. ``"icml2025"`` has a network
    without time, :math:`\psi(s, a) \to \nabla_a Q_{\min}(s, a)` at the actions of the replay with
    :math:`\lambda = 1`, and samples by 20 Langevin steps. The learned Fourier features, the cosine
    decay of the learning rate and the ReLU of these codes are not reproduced.

References:
    | Learning a diffusion model policy from rewards via Q-score matching (Psenka et al., 2024)
    | https://arxiv.org/abs/2312.11752
    | Efficient Online Reinforcement Learning for Diffusion Policy (Ma et al., 2025), comparison
    | https://arxiv.org/abs/2502.00361
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rl.critics import frozen
from rl.diffusion_agent import PUBLISHED, DiffusionAgent, DiffusionConfig
from rl.entropy import PolicyEntropy, missing_entropy
from rl.off_policy import NextAction
from rl.replay import Batch
from rsm_sampler.checked import checked
from rsm_sampler.ensemble import EnsembleMLP
from rsm_sampler.estimators import PosteriorEstimate, TargetForm, posterior_estimate
from rsm_sampler.kernels import GaussianReferenceKernel
from rsm_sampler.losses import estimate_loss, noise_weight
from rsm_sampler.target.gradients import value_and_gradient
from rsm_sampler.transitions import forward_kernel, variance_preserving

__all__ = ["QSM", "LangevinPolicy", "QSMConfig"]

ScoreName = Literal["noised", "noisy-action", "clean"]
TemperatureRule = Literal["entropy", "fixed"]


@dataclass(frozen=True, kw_only=True)
class QSMConfig(DiffusionConfig):
    """Configuration of :class:`QSM`.

    Attributes:
        score: What the network is regressed on: the score of the ``"noised"`` law; the gradient
            at the ``"noisy-action"``, as in the first published code; the gradient at ``"clean"``
            actions without any noise, as in the comparison of 2025, with Langevin sampling.
        num_draws: Clean candidates K of each noisy action, for the noised score.
        policy_states: States of a policy step, the first of the batch.
        target: ``"mixed"``, or ``"gradient"`` for gradients at every noise level.
        wall: Width b of the soft walls, in units of actions.
        reach: Standard deviation of the normal law about 0 that keeps candidates near the box.
        temperature: Lambda at the start, in units of scaled reward.
        temperature_rule: ``"entropy"`` tunes it, ``"fixed"`` does not.
        target_entropy: Entropy per dimension that is tuned for, in nats; as in
            :class:`~rl.sdac.SDACConfig`.
        temperature_lr: Rate of log lambda.
        min_ess: Effective number of candidates, averaged over the batch, below which lambda is
            raised however much entropy there is; at most half of K counts.
    """

    num_steps: int = 10
    score: ScoreName = "noised"
    num_draws: int = 16
    policy_states: int = 64
    target: TargetForm = "mixed"
    wall: float = 0.1
    reach: float = 0.8
    temperature: float = 1.0
    temperature_rule: TemperatureRule = "entropy"
    target_entropy: float = -0.9
    temperature_lr: float = 3e-3
    min_ess: float = 4.0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant; see the base class."""
        super().__post_init__()
        if self.num_draws < 1:
            raise ValueError(f"num_draws must be at least 1, got {self.num_draws}")
        if not 1 <= self.policy_states <= self.batch_size:
            raise ValueError(
                f"policy_states must be from 1 to batch_size {self.batch_size}, "
                f"got {self.policy_states}"
            )
        if self.persistence > 0 and self.score == "clean":
            raise ValueError(
                f"persistence must be 0 for the score 'clean', whose steps are Langevin's, got "
                f"{self.persistence}"
            )
        for name in ("wall", "reach", "temperature", "min_ess"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.temperature_lr < 1:
            raise ValueError(f"temperature_lr must be in [0, 1), got {self.temperature_lr}")
        for name, allowed in (
            ("score", ScoreName),
            ("target", TargetForm),
            ("temperature_rule", TemperatureRule),
        ):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"{name} must be one of {get_args(allowed)}, got {getattr(self, name)!r}"
                )
        if self.score != "noised" and self.temperature_rule != "fixed":
            raise ValueError(
                "temperature_rule must be 'fixed' unless score is 'noised', "
                f"got {self.temperature_rule!r}"
            )

    @classmethod
    def _presets(cls) -> dict[str, dict[str, Any]]:
        return {
            "corrected": {},
            "official": {
                "score": "noisy-action",
                "prediction": "noise",
                "num_steps": 5,
                "schedule": "vp",
                "temperature": 0.02,
                "temperature_rule": "fixed",
                "noise": 0.1,
                "evaluation_candidates": 1,
                "policy_states": 256,
                "policy_period": 1,
                "num_envs": 1,
                "updates_per_step": 1.0,
            },
            "icml2025": {
                **{k: v for k, v in PUBLISHED.items() if k not in ("noise", "kappa")},
                "score": "clean",
                "num_steps": 20,
                "reward_scale": 1.0,
                "start_scale": 1.0,
                "temperature_rule": "fixed",
                "policy_states": 256,
            },
        }


@checked
class LangevinPolicy(nn.Module):
    r"""Actions by T Langevin steps with one score for all of them.

    .. math:: a \leftarrow \mathrm{clip}\big(a + \tfrac{\delta_k}{2}\, \psi(s, a)
              + \sqrt{\delta_k}\, z,\, -1,\, 1\big), \qquad \delta_k = 1 - k/T,

    from a standard normal draw, for k = 0, ..., T - 1.

    Arguments:
        observation_dim: Length of an observation.
        action_dim: Length of an action.
        num_steps: Steps T.
        width: Units of a hidden layer.
        depth: Number of hidden layers.
        generator: Source of the initial weights, on the CPU.

    Example:
        >>> policy = LangevinPolicy(3, 2, 20, width=32)
        >>> policy.sample(torch.randn(5, 3), 4).shape
        torch.Size([5, 4, 2])
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        num_steps: int,
        *,
        width: int = 256,
        depth: int = 3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.action_dim, self.num_steps = action_dim, num_steps
        self.network = EnsembleMLP(
            [observation_dim, action_dim],
            action_dim,
            width=width,
            depth=depth,
            generator=generator,
        )

    def score(
        self, observation: Float[Tensor, "*#batch obs"], action: Float[Tensor, "*batch act"]
    ) -> Float[Tensor, "*batch act"]:
        """The network, psi; the batch shapes broadcast."""
        return self.network(observation, action)[0]

    @torch.no_grad()
    def sample(
        self,
        observation: Float[Tensor, "n obs"],
        candidates: int = 1,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "n candidates act"]:
        """Independent actions within [-1, 1]; see :meth:`~rl.policies.DiffusionPolicy.sample`."""
        first = self.network.weights[0]
        shape = (len(observation), candidates, self.action_dim)
        noises = torch.randn(
            (self.num_steps + 1, *shape),
            dtype=first.dtype,
            device=first.device,
            generator=generator,
        )
        return self._walk(observation, noises)

    @torch.no_grad()
    def flow(
        self, observation: Float[Tensor, "n obs"], starts: Float[Tensor, "m act"]
    ) -> Float[Tensor, "n m act"]:
        """Actions by one sequence of noises for all observations, from given starts."""
        steps = torch.Generator(starts.device).manual_seed(0)
        shape = (self.num_steps, 1, *starts.shape)
        noises = torch.randn(shape, dtype=starts.dtype, device=starts.device, generator=steps)
        noises = torch.cat([starts.view(1, 1, *starts.shape), noises])
        return self._walk(observation, noises.expand(-1, len(observation), -1, -1))

    def _walk(self, observation: Tensor, noises: Tensor) -> Tensor:
        observation, x = observation.unsqueeze(1), noises[0].clamp(-1.0, 1.0)
        for k in range(self.num_steps):
            delta = 1 - k / self.num_steps
            x = x + 0.5 * delta * self.score(observation, x) + math.sqrt(delta) * noises[k + 1]
            x = x.clamp(-1.0, 1.0)
        return x


class QSM(DiffusionAgent):
    """The agent; see :mod:`rl.qsm` and :class:`~rl.off_policy.OffPolicyAgent`."""

    name = "qsm"
    config_type = QSMConfig
    stackable = True
    policy: Any

    def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
        super().__init__(*arguments, **options)
        config: QSMConfig = self.config
        self._log_temperature = torch.full(
            (), math.log(config.temperature), dtype=torch.float64, device=self.device
        )
        self._ess = torch.full((), float(config.num_draws), device=self.device)
        self._kernel = GaussianReferenceKernel(0.0, config.reach)
        if config.score == "noised":
            self._entropy = PolicyEntropy(self.policy.sigmas[1:], config.batch_size)

    def make_policy(self, generator: torch.Generator) -> nn.Module:
        """A diffusion policy, or one of Langevin steps."""
        config: QSMConfig = self.config
        if config.score != "clean":
            return super().make_policy(generator)
        return LangevinPolicy(
            self.observation_dim,
            self.action_dim,
            config.num_steps,
            width=config.width,
            depth=config.depth,
            generator=generator,
        )

    @property
    def temperature(self) -> float:
        """Lambda, in units of scaled reward."""
        return float(self._log_temperature.exp())

    def policy_loss(self, batch: Batch, drawn: NextAction) -> tuple[Tensor, dict[str, Tensor]]:
        """The regression on gradients of the critics, at the batch's states."""
        config: QSMConfig = self.config
        n = config.policy_states
        observation, clean = batch.observation[:n], batch.action[:n]
        if config.score == "clean":
            gradient = self._gradient(observation, clean)
            error = (self.policy.score(observation, clean) - gradient).square().sum(-1)
            return error.mean(), {"action_gradient": gradient.norm(dim=-1).mean()}
        _, sigma = self._levels_of(n)
        x_t = forward_kernel(clean, sigma, generator=self.generator)
        if config.score == "noised":
            estimate = self._estimate(observation, x_t, sigma)
            self._ess = estimate.ess.mean()
            metrics = {"q_weight_ess": self._ess / config.num_draws}
        else:
            gradient = self._gradient(observation, variance_preserving(x_t, sigma))
            # The noise wanted is minus the gradient: what is denoised lies sigma along it.
            one = torch.ones_like(sigma)
            estimate = PosteriorEstimate(x_t + sigma.unsqueeze(-1) * gradient, one, one)
            metrics = {"action_gradient": gradient.norm(dim=-1).mean()}
        weight = noise_weight if config.prediction == "noise" else None
        loss = estimate_loss(
            self.policy.denoiser, x_t, sigma, estimate, context=observation, loss_weight=weight
        )
        return loss.mean(), metrics

    def _estimate(self, observation: Tensor, x_t: Tensor, sigma: Tensor) -> PosteriorEstimate:
        """The clean actions behind noisy ones, from gradients and values."""
        config: QSMConfig = self.config
        inverse = self._log_temperature.neg().exp()

        def energy(candidates: Tensor) -> Tensor:
            inside = candidates.clamp(-1.0, 1.0)
            value = self.critic.minimum(observation.unsqueeze(1), inside)
            beyond = (candidates - inside).square().sum(-1)
            return beyond / (2 * config.wall**2) - inverse.to(value.dtype) * value

        with frozen(self.critic):
            return posterior_estimate(
                energy,
                x_t,
                sigma,
                self._kernel,
                config.num_draws,
                target=config.target,
                generator=self.generator,
            )

    def _gradient(self, observation: Tensor, action: Tensor) -> Tensor:
        """Gradients of value over temperature, of the members' mean or of the smallest one."""

        def value(action: Tensor) -> Tensor:
            values = self.critic.values(observation, action)
            return values.amin(0) if self.config.score == "clean" else values.mean(0)

        with frozen(self.critic):
            _, gradient = value_and_gradient(value, action)
        return self._log_temperature.neg().exp().to(gradient.dtype) * gradient

    @torch.no_grad()
    def after_policy_step(self, batch: Batch, drawn: NextAction) -> dict[str, Tensor]:
        """The policy's entropy, and a step of the temperature."""
        config: QSMConfig = self.config
        if config.score != "noised":
            return {}
        entropy = self._entropy(
            self.policy.denoiser, drawn.of_policy, self._states(batch), generator=self.generator
        )
        if config.temperature_rule == "entropy":
            floor = min(config.min_ess, config.num_draws / 2)
            missing = missing_entropy(entropy, config.target_entropy, self._ess, floor)
            self._log_temperature += config.temperature_lr * missing
        return {"entropy_per_dim": entropy, "temperature": self._log_temperature.exp()}

    def extra_state(self) -> dict[str, Any]:
        """The temperature."""
        return {**super().extra_state(), "log_temperature": self._log_temperature}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back the temperature."""
        super().load_extra_state(state)
        self._log_temperature.copy_(state["log_temperature"])
