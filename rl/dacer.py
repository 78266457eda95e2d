r"""DACER, diffusion actor-critic with entropy regulator: the chain as a reparameterised policy.

The action is a differentiable function of the state and of all noises of the reverse chain,
:math:`a_\theta(s, \epsilon_T, \dots, \epsilon_1)`, and the policy's loss is the critics' value of
it,

.. math:: \ell(\theta) = - \mathbb E\, \min_i Q_i\big(s,\;
          \mathrm{clip}(a_\theta(s, \epsilon) + \nu \kappa\, \eta, -1, 1)\big),
          \qquad \eta \sim \mathcal N(0, I),

back through all T steps. Nothing in it rewards width; the noise :math:`\nu\kappa\eta`, with which
the agent also acts, explores, and :math:`\kappa` follows Adam steps on :math:`\log \kappa` that
bring the entropy of noisy actions to ``kappa_entropy`` per dimension. That entropy is estimated
every ``kappa_period`` updates by Gaussian mixtures fitted to draws at some states
(:mod:`rl.mixtures`), all of them at once on the device that trains.

**Critics of returns** (``return_critic``). Critic i gives a normal law of the return,
:math:`\mathcal N(Q_i, \sigma_i^2)`. With :math:`j` the critic whose slow copy says less,
:math:`y = c_r r + \gamma^m (1 - d)\, \bar Q_j`, and :math:`y^z` the same with a draw of j's law
(cut at three deviations) for :math:`\bar Q_j`, its loss is

.. math:: - (\omega^2 + \varepsilon)\, \mathbb E \Big[
          Q\, \Big\lfloor \frac{y - Q}{\sigma^2 + \varepsilon} \Big\rfloor
          + \sigma\, \Big\lfloor \frac{(Q - \hat y)^2 - \sigma^2}{\sigma^3 + \varepsilon}
          \Big\rfloor \Big], \qquad
          \hat y = Q + \mathrm{clip}(y^z - Q, \pm 3 \omega),

no gradient going through what stands in :math:`\lfloor\,\rfloor`, with :math:`\omega` a running
mean of :math:`\sigma` and :math:`\varepsilon = 0.1`.

**Cut actions keep a way back.** The chain cuts its denoised action to the box at every step, and
beyond the box a clamp has no gradient: an action that has left it, at whatever state, could not
return. By default the gradient passes where a step along it leads back inside.

Evaluation is the same chain with fixed noises and without the added one, the best of M: the chain
without its noises would be another function, which nothing has trained.

Note:
    The presets ``"official"`` and ``"icml2025"`` follow the published codes: clamps as they are,
    20 steps, the bound by components (too large by up to log 3) as entropy, of actions cut to the
    box, and a step of :math:`\kappa` every 10,000 updates, of which runs of 200,000 updates make
    20. They estimate it by scikit-learn on the host, with the same formula. By default the entropy
    is that of actions before the last cut, half on points of the fit and half on others.

References:
    | Diffusion actor-critic with entropy regulator (Wang et al., 2024)
    | https://arxiv.org/abs/2405.15177
    | Distributional soft actor-critic with three refinements (Duan et al., 2023), for the critics
    | https://arxiv.org/abs/2310.05858
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rl.critics import Critic, ReturnCritic, best_candidate, frozen
from rl.diffusion_agent import PUBLISHED, DiffusionAgent, DiffusionConfig
from rl.mixtures import fit_mixtures
from rl.off_policy import NextAction
from rl.policies import inward_cut
from rl.replay import Batch, ReplayBuffer

__all__ = ["DACER", "DACERConfig"]

_EPSILON = 0.1  # of the loss of return critics


@dataclass(frozen=True, kw_only=True)
class DACERConfig(DiffusionConfig):
    """Configuration of :class:`DACER`.

    Attributes:
        policy_states: States of a policy step, the first of the batch.
        inward_gradient: Whether gradients pass cut actions where they lead back inside.
        return_critic: Whether critics give laws of the return; if not, values as in (28).
        entropy_states: States of an estimate of the entropy.
        entropy_draws: Actions at each of them.
        entropy_components: Components of the mixtures.
        held_out: Whether the entropy is the mean of the mixtures' cross entropies on the half of
            the draws that they are fitted to and on the other half, whose errors cancel to first
            order, before the last cut; if not, the bound by components of cut actions.
        kappa: Where the factor on the noise starts.
        kappa_entropy: The entropy per dimension that it is tuned to, in nats.
        kappa_lr: Adam's learning rate of log kappa; 0 to keep it.
        kappa_period: Updates between its steps.
    """

    num_steps: int = 5
    policy_states: int = 128
    inward_gradient: bool = True
    return_critic: bool = True
    entropy_states: int = 32
    entropy_draws: int = 200
    entropy_components: int = 3
    held_out: bool = True
    noise: float = 0.1
    kappa: float | None = 3.0
    kappa_lr: float = 0.03
    kappa_period: int = 100

    def __post_init__(self) -> None:
        """Refuse what cannot be meant; see the base class."""
        super().__post_init__()
        for name in ("entropy_states", "entropy_components"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 1 <= self.policy_states <= self.batch_size:
            raise ValueError(
                f"policy_states must be from 1 to batch_size {self.batch_size}, "
                f"got {self.policy_states}"
            )
        if self.entropy_draws < 2 * self.entropy_components:
            raise ValueError(
                "entropy_draws must be at least twice entropy_components "
                f"{self.entropy_components}, got {self.entropy_draws}"
            )
        if self.kappa is None:
            raise ValueError("kappa must be positive for DACER, got None")
        if not 0 <= self.kappa_lr < 1:
            raise ValueError(f"kappa_lr must be in [0, 1), got {self.kappa_lr}")
        if self.chain != "ancestral":
            raise ValueError(f"chain must be 'ancestral' for DACER, got {self.chain!r}")

    @classmethod
    def _presets(cls) -> dict[str, dict[str, Any]]:
        shared = ("reward_scale", "warmup_steps", "count_warmup", "target_period", "prediction")
        published = {
            **{name: PUBLISHED[name] for name in shared},
            "num_steps": 20,
            "policy_states": 256,
            "evaluation_candidates": 1,
            "inward_gradient": False,
            "entropy_states": 256,
            "entropy_draws": 200,
            "held_out": False,
            "kappa": 3.0,
            "kappa_period": 10_000,
        }
        return {
            "corrected": {},
            "official": {
                **published,
                "schedule": "vp",
                "critic_lr": 1e-4,
                "policy_lr": 1e-4,
                "policy_lr_final": 5e-5,
                "num_envs": 20,
                "updates_per_step": 0.05,
            },
            "icml2025": {
                **published,
                "schedule": "linear",
                "schedule_scale": 0.3,
                "start_scale": 0.5,
                "policy_lr_final": 3e-5,
                "noise": 0.15,
            },
        }


class DACER(DiffusionAgent):
    """The agent; see :mod:`rl.dacer` and :class:`~rl.off_policy.OffPolicyAgent`."""

    name = "dacer"
    config_type = DACERConfig
    stackable = True
    critic: Any
    target_critic: Any

    def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
        super().__init__(*arguments, **options)
        config: DACERConfig = self.config
        assert config.kappa is not None
        members = self.critic.members
        self._spread = torch.full((members, 1), -1.0, device=self.device)  # none measured yet
        self._log_kappa = torch.full((), config.kappa, device=self.device).log().requires_grad_()
        self.kappa_optimiser = torch.optim.Adam(
            [self._log_kappa],
            lr=config.kappa_lr,
            fused=True,
            capturable=self.device.type == "cuda",
        )
        self._set_noise()
        generator = torch.Generator().manual_seed(self.seed + 3)
        shape = (config.num_steps, config.evaluation_candidates, self.action_dim)
        self._path = torch.randn(shape, generator=generator).to(self.device)

    def critic_type(self) -> type[Critic]:
        """Critics of values, or of laws of the return."""
        return ReturnCritic if self.config.return_critic else Critic

    @property
    def kappa(self) -> float:
        """The factor on the noise."""
        return float(self._log_kappa.detach().exp())

    def before_update(self, replay: ReplayBuffer) -> None:
        """Nothing: the noise is set where it is tuned."""

    # ------------------------------------------------------------------ actions

    @torch.no_grad()
    def exploit(self, observation: Float[Tensor, "n obs"]) -> Float[Tensor, "n act"]:
        """The best end of chains with fixed noises."""
        policy = self.policy if self.average is None else self.average
        n, m = len(observation), self.config.evaluation_candidates
        ends = policy.walk(observation.repeat_interleave(m, 0), self._path.repeat(1, n, 1))
        return best_candidate(self.critic, observation, ends.view(n, m, -1))

    # ------------------------------------------------------------------ losses

    def critic_loss(self, batch: Batch, drawn: NextAction) -> tuple[Tensor, Tensor]:
        """That of the base class, or that of laws of the return."""
        config: DACERConfig = self.config
        if not config.return_critic:
            return super().critic_loss(batch, drawn)
        with torch.no_grad():
            means, stds = self.target_critic.law(batch.next_observation, drawn.action)
            lower = means.argmin(0, keepdim=True)
            future, width = means.gather(0, lower)[0], stds.gather(0, lower)[0]
            z = torch.randn(
                future.shape, dtype=future.dtype, device=self.device, generator=self.generator
            )
            alive = config.discount**batch.span * (1 - batch.terminated)
            reward = config.reward_scale * batch.reward
            target = reward + alive * future
            target_draw = target + alive * width * z.clamp(-3.0, 3.0)
        mean, std = self.critic.law(batch.observation, batch.action)
        with torch.no_grad():
            measured = std.mean(-1, keepdim=True).to(self._spread.dtype)
            running = torch.lerp(self._spread, measured, config.polyak)
            self._spread.copy_(torch.where(self._spread < 0, measured, running))
            spread = self._spread.to(mean.dtype)
            bounded = mean + (target_draw - mean).clamp(-3 * spread, 3 * spread)
            pull = (target - mean) / (std.square() + _EPSILON)
            excess = (mean - bounded).square() - std.square()
            widen = excess / (std**3 + _EPSILON)
            scale = spread.square() + _EPSILON
        return -(scale * (mean * pull + std * widen)).mean(-1).sum(), mean

    def policy_loss(self, batch: Batch, drawn: NextAction) -> tuple[Tensor, dict[str, Tensor]]:
        """Minus the value of the chain's noisy ends, differentiable through the chain."""
        config: DACERConfig = self.config
        observation = batch.observation[: config.policy_states]
        noise = torch.randn(
            (config.num_steps + 1, len(observation), self.action_dim),
            dtype=observation.dtype,
            device=self.device,
            generator=self.generator,
        )
        cut = inward_cut if config.inward_gradient else _plain_cut
        end = self.policy.walk(observation, noise[:-1], cut=cut)
        action = cut(end + self._noise * noise[-1])
        with frozen(self.critic):
            value = self.critic.minimum(observation, action)
        return -value.mean(), {"kappa": self._kappa.clone()}

    # ------------------------------------------------------------------ the noise

    def after_update(self, replay: ReplayBuffer) -> dict[str, Tensor]:
        """Where it is due a step of kappa, and the entropy behind it."""
        if self.config.kappa_lr > 0 and self.updates % self.config.kappa_period == 0:
            return {"entropy_per_dim": self._tune(replay)}
        return {}

    def _tune(self, replay: ReplayBuffer) -> Tensor:
        """A step of kappa towards the wanted entropy; the entropy per dimension."""
        config: DACERConfig = self.config
        with torch.no_grad():
            places = replay.places(config.entropy_states, generator=self.generator)
            observation = self._standardised(replay.at(places).observation)
            entropy = self._entropy(observation) / self.action_dim
            self._log_kappa.grad = (entropy - config.kappa_entropy).to(self._log_kappa)
        self.kappa_optimiser.step()
        self._set_noise()
        return entropy

    def _entropy(self, observation: Tensor) -> Tensor:
        """The entropy of noisy actions, averaged over states."""
        config: DACERConfig = self.config
        draws = self.policy.sample(observation, config.entropy_draws, generator=self.generator)
        noise = torch.randn(
            draws.shape, dtype=draws.dtype, device=self.device, generator=self.generator
        )
        draws = draws + self._noise * noise
        k = config.entropy_components
        if not config.held_out:
            mixtures = fit_mixtures(draws.clamp(-1.0, 1.0), k, generator=self.generator)
            return mixtures.component_entropy().mean()
        fitted, other = draws.chunk(2, 1)
        mixtures = fit_mixtures(fitted, k, ridge=1e-4, generator=self.generator)
        return 0.5 * (mixtures.cross_entropy(fitted) + mixtures.cross_entropy(other)).mean()

    @torch.no_grad()
    def _set_noise(self) -> None:
        self._kappa.copy_(self._log_kappa.exp())
        self._noise.copy_(self.config.noise * self._kappa)

    # ------------------------------------------------------------------ saving

    def extra_state(self) -> dict[str, Any]:
        """Kappa, the running deviations of the critics, and the noises of evaluation."""
        return {
            **super().extra_state(),
            "log_kappa": self._log_kappa.detach(),
            "spread": self._spread,
            "path": self._path,
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back :meth:`extra_state`."""
        super().load_extra_state(state)
        with torch.no_grad():
            self._log_kappa.copy_(state["log_kappa"])
        self._spread.copy_(state["spread"])
        self._path = state["path"].to(self.device)
        self._set_noise()

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        return [*super()._optimisers(), self.kappa_optimiser]


def _plain_cut(x: Tensor) -> Tensor:
    return x.clamp(-1.0, 1.0)
