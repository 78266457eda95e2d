r"""SDAC, soft diffusion actor-critic: sample :math:`e^{Q/\lambda}` by reverse sampling.

The policy is the maximum-entropy one (5) on the box of actions,

.. math:: \pi(a | s) \propto e^{Q(s, a) / \lambda}\, \mathbf 1_{[-1, 1]^{d_a}}(a),

an energy :math:`E(a | s) = -Q(s, a)/\lambda` in the core's terms, and its loss is the core's
:func:`~rsm_sampler.losses.reverse_sampling_loss` (14). For each state of a batch

1. a noisy action :math:`a_t \sim h_t` at a random step t: by default the noised action of the
   replay, which needs no chain;
2. K clean candidates around it from the reverse kernel *truncated to the box*, weighted by
   :math:`\mathrm{softmax}_k\, Q(s, \tilde a_k) / \lambda`;
3. one call of the network, regressed on their weighted mean.

**Temperature.** By default :math:`\lambda` (in units of scaled reward) is tuned so that the policy
keeps an entropy of ``target_entropy`` nats per dimension, measured by its own denoising error
(:mod:`rl.entropy`) on the actions that the critic's target has drawn anyway, averaged over states.
A step moves :math:`\log \lambda` by ``temperature_lr`` times the missing entropy per dimension,
within 1.

K candidates cannot make a policy sharper than they can tell: with the best of 32 uniform draws in
six dimensions alone it keeps an entropy of 0.4 per dimension, whatever the temperature. So lambda
is kept where the weights are worth a number of candidates (``min_ess``) at least; without this
floor it would run away to 0. In one dimension or two the candidates themselves tell when there is
too little entropy. Where K uniform draws are worth more than

.. math:: K_{\min} = K\, e^{d_a (H - \log 2)}

of a law, it has more entropy than H per dimension: its Kullback-Leibler divergence from the
uniform law, :math:`d_a \log 2` less its entropy, is at most that of Renyi's second order, which is
:math:`\log (K / K_{\rm eff})` for many draws. With few steps the denoising error sees more entropy
than there is, and lambda would fall until one candidate counts; so by default the floor is
:math:`K_{\min}` for the target entropy, and 2 where that is less. For a sharper policy a share of
the candidates is drawn about the action that :math:`a_t` is a noised version of
(``anchor_share``), or they all walk (``anneal_stages``).

Note:
    Deviations of the preset ``"official"`` from the equations are those of the published code: the
    kernel is not truncated but its candidates are cut for Q alone, :math:`h_t` noises a fresh
    best-of-32 action, :math:`\lambda = \kappa / 5` follows the tuned noise, and target actions
    leave the box. Its K network calls on equal inputs are one call here, with the same gradient.

References:
    | Efficient Online Reinforcement Learning for Diffusion Policy (Ma et al., 2025), algorithm 2
    | https://arxiv.org/abs/2502.00361
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rl.diffusion_agent import PUBLISHED, DiffusionAgent, DiffusionConfig
from rl.entropy import PolicyEntropy, missing_entropy
from rl.off_policy import NextAction
from rl.replay import Batch, ReplayBuffer
from rsm_sampler.annealing import annealed_estimate
from rsm_sampler.box_kernel import AnchoredKernel, TruncatedReverseKernel
from rsm_sampler.estimators import posterior_estimate
from rsm_sampler.kernels import Kernel, ReverseKernel
from rsm_sampler.losses import estimate_loss, noise_weight
from rsm_sampler.proposals import UniformProposal
from rsm_sampler.transitions import forward_kernel

__all__ = ["SDAC", "SDACConfig"]

ProposalName = Literal["replay", "next", "uniform", "policy", "noised-policy"]
TemperatureRule = Literal["entropy", "fixed", "kappa"]


@dataclass(frozen=True, kw_only=True)
class SDACConfig(DiffusionConfig):
    """Configuration of :class:`SDAC`.

    Attributes:
        num_draws: Candidates K of each noisy action.
        policy_states: States of a policy step, the first of the batch.
        truncated: Whether candidates come from the kernel within the box.
        anneal_stages: Stages of sequential Monte Carlo that lead the candidates towards the
            posterior, for temperatures so low that K independent candidates miss it
            (``q_weight_ess`` near 1/K).
        anneal_moves: Steps of each candidate in a stage; each costs as many critic values again.
        anchor_share: Share of the candidates that are drawn about the clean action of h_t; see
            :class:`~rsm_sampler.box_kernel.AnchoredKernel`.
        proposal: h_t: the noised ``"replay"`` action; the noised action of the critic's target,
            at the ``"next"`` states; ``"uniform"`` on the box; the last ``"policy"``'s action as
            it is, or noised.
        temperature: Lambda at the start, in units of scaled reward.
        temperature_rule: ``"entropy"`` tunes it, ``"fixed"`` does not, ``"kappa"`` ties it to the
            tuned noise as kappa / kappa_0.
        target_entropy: Entropy per dimension that is tuned for, in nats; the uniform law on
            [-1, 1] has 0.69, a normal one of standard deviation 0.1 has -0.88.
        temperature_lr: Rate of log lambda.
        min_ess: Effective number of candidates, averaged over the batch, below which lambda is
            raised however much entropy there is; at most half of K counts. None: what a law of
            the target entropy is worth, and at least 2.
        soft_target: Whether the target subtracts lambda times the log-probability of its action,
            estimated by the density of the exploration noise. Off, because that is the same number
            for every state: a bonus or penalty for staying alive and nothing else.
        critic_layer_norm: As in the base class; on by default.
    """

    num_draws: int = 64
    policy_states: int = 128
    truncated: bool = True
    anneal_stages: int = 0
    anneal_moves: int = 1
    anchor_share: float = 0.0
    proposal: ProposalName = "replay"
    temperature: float = 1.0
    temperature_rule: TemperatureRule = "entropy"
    target_entropy: float = -0.9
    temperature_lr: float = 3e-3
    min_ess: float | None = None
    soft_target: bool = False
    critic_layer_norm: bool = True

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
        if self.anneal_stages < 0 or (self.anneal_stages > 0 and not self.truncated):
            raise ValueError(
                "anneal_stages must be at least 0, and 0 without truncated, "
                f"got {self.anneal_stages}"
            )
        if self.anneal_moves < 1:
            raise ValueError(f"anneal_moves must be at least 1, got {self.anneal_moves}")
        if self.anneal_stages > 0 and self.num_draws < 4:
            raise ValueError(
                f"num_draws must be at least 4 with anneal_stages, got {self.num_draws}"
            )
        if not 0 <= self.anchor_share < 1 or (
            self.anchor_share > 0
            and (not self.truncated or self.anneal_stages > 0 or self.proposal == "uniform")
        ):
            raise ValueError(
                "anchor_share must be in [0, 1), and 0 with the proposal 'uniform', with "
                f"anneal_stages or without truncated, got {self.anchor_share}"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not 0 <= self.temperature_lr < 1:
            raise ValueError(f"temperature_lr must be in [0, 1), got {self.temperature_lr}")
        if self.min_ess is not None and not 0 < self.min_ess < math.inf:
            raise ValueError(f"min_ess must be positive and finite, got {self.min_ess}")
        for name, allowed in (("proposal", ProposalName), ("temperature_rule", TemperatureRule)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"{name} must be one of {get_args(allowed)}, got {getattr(self, name)!r}"
                )
        if self.temperature_rule == "kappa" and self.kappa is None:
            raise ValueError("kappa must be given for temperature_rule 'kappa', got None")
        if self.soft_target and not self.noise > 0:
            raise ValueError(f"noise must be positive for soft_target, got {self.noise}")

    @classmethod
    def _presets(cls) -> dict[str, dict[str, Any]]:
        official = {
            **PUBLISHED,
            "policy_states": 256,
            "truncated": False,
            "proposal": "noised-policy",
            "temperature": 1.0,
            "temperature_rule": "kappa",
        }
        return {
            "corrected": {},
            "official": {**official, "schedule": "linear", "schedule_scale": 0.8},
            "icml2025": {**official, "kappa_entropy": -1.5},
        }


class SDAC(DiffusionAgent):
    """The agent; see :mod:`rl.sdac` and :class:`~rl.off_policy.OffPolicyAgent`."""

    name = "sdac"
    config_type = SDACConfig
    stackable = True

    def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
        super().__init__(*arguments, **options)
        config: SDACConfig = self.config
        self._log_temperature = torch.full(
            (), math.log(config.temperature), dtype=torch.float64, device=self.device
        )
        self._kernel: ReverseKernel | TruncatedReverseKernel = (
            TruncatedReverseKernel(-1.0, 1.0) if config.truncated else ReverseKernel()
        )
        self._ess = torch.full((), float(config.num_draws), device=self.device)
        one = torch.ones(self.action_dim, device=self.device)
        self._box = UniformProposal(-one, one, coordinates="variance_preserving")
        self._entropy = PolicyEntropy(self.policy.sigmas[1:], config.batch_size)
        floor = config.min_ess
        if floor is None:
            missing = max(0.0, math.log(2) - config.target_entropy)  # of the uniform law's
            floor = max(2.0, config.num_draws * math.exp(-self.action_dim * missing))
        self._floor = min(floor, config.num_draws / 2)

    @property
    def temperature(self) -> float:
        """Lambda, in units of scaled reward."""
        return float(self._log_temperature.exp())

    def before_update(self, replay: ReplayBuffer) -> None:
        """Exploration noise, and the temperature that is tied to it."""
        super().before_update(replay)
        config = self.config
        if config.temperature_rule == "kappa":
            self._log_temperature.fill_(math.log(config.temperature * self.kappa / config.kappa))

    def next_action(self, batch: Batch, with_policy: bool) -> NextAction:
        """As the base class, with the entropy of the noise where a soft target is wanted."""
        drawn = super().next_action(batch, with_policy)
        if not self.config.soft_target:
            return drawn
        log_prob = -0.5 - 0.5 * math.log(2 * math.pi) - self._noise.log()
        cost = (self._log_temperature.exp() * self.action_dim * log_prob).float()
        return drawn._replace(entropy_cost=cost)

    def policy_loss(self, batch: Batch, drawn: NextAction) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (14) on the batch's states."""
        config: SDACConfig = self.config
        n = config.policy_states
        if config.proposal == "next":
            observation, clean = self._states(batch)[:n], drawn.action[:n].clamp(-1.0, 1.0)
        else:
            observation, clean = batch.observation[:n], batch.action[:n]
        t, sigma = self._levels_of(n)
        x_t, clean = self._noisy_action(observation, clean, sigma)
        kernel: Kernel = self._kernel
        if config.anchor_share > 0:
            kernel = AnchoredKernel(clean, -1.0, 1.0, share=config.anchor_share)
        inverse = self._log_temperature.neg().exp().float()

        bounds: list[Tensor] = []

        def energy(candidates: Tensor) -> Tensor:
            if not bounds:
                bounds.append((candidates.abs().amax(-1) > 0.999).float().mean())
            inside = candidates if config.truncated else candidates.clamp(-1.0, 1.0)
            return -inverse * self.critic.minimum(observation.unsqueeze(1), inside)

        if config.anneal_stages > 0:
            estimate = annealed_estimate(
                energy,
                x_t,
                sigma,
                self._kernel,
                config.num_draws,
                stages=config.anneal_stages,
                moves=config.anneal_moves,
                generator=self.generator,
            )
        else:
            estimate = posterior_estimate(
                energy, x_t, sigma, kernel, config.num_draws, generator=self.generator
            )
        weight = noise_weight if config.prediction == "noise" else None
        loss = estimate_loss(
            self.policy.denoiser,
            x_t,
            sigma,
            estimate,
            context=observation,
            loss_weight=weight,
        )
        assert estimate.entropy is not None
        self._ess = estimate.ess.mean()
        metrics = {"q_weight_ess": self._ess / config.num_draws}
        metrics["draws_at_bounds"] = bounds[0]
        metrics |= self._by_level("q_weight_ess", t, estimate.ess / config.num_draws)
        return loss.mean(), metrics | self._by_level("weight_entropy", t, estimate.entropy)

    @torch.no_grad()
    def after_policy_step(self, batch: Batch, drawn: NextAction) -> dict[str, Tensor]:
        """The policy's entropy, and a step of the temperature."""
        config: SDACConfig = self.config
        entropy = self._entropy(
            self.policy.denoiser, drawn.of_policy, self._states(batch), generator=self.generator
        )
        if config.temperature_rule == "entropy":
            missing = missing_entropy(entropy, config.target_entropy, self._ess, self._floor)
            self._log_temperature += config.temperature_lr * missing
        return {"entropy_per_dim": entropy, "temperature": self._log_temperature.exp()}

    def extra_state(self) -> dict[str, Any]:
        """The temperature."""
        return {**super().extra_state(), "log_temperature": self._log_temperature}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back the temperature."""
        super().load_extra_state(state)
        self._log_temperature.copy_(state["log_temperature"])

    def _noisy_action(
        self, observation: Tensor, clean: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A draw of h_t for each state, and the clean action behind it."""
        proposal = self.config.proposal
        if proposal == "uniform":
            return self._box.draw(len(sigma), sigma, generator=self.generator), clean
        if proposal in ("policy", "noised-policy"):
            m = self.config.target_candidates
            clean = self._best_of(self.policy, observation, m, self.generator)
            clean = self._perturbed(clean, self.generator)
        if proposal == "policy":
            return clean * torch.hypot(sigma, torch.ones_like(sigma)).unsqueeze(-1), clean
        return forward_kernel(clean, sigma, generator=self.generator), clean

    def _by_level(self, name: str, t: Tensor, value: Tensor) -> dict[str, Tensor]:
        """Means of a number at low, middle and high noise."""
        third = ((t - 1) * 3) // self.config.num_steps
        found = {}
        for i, part in enumerate(("low", "middle", "high")):
            inside = (third == i).to(value.dtype)
            found[f"{name}/{part}"] = (value * inside).sum() / inside.sum().clamp(min=1)
        return found
