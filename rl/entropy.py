r"""The entropy of a diffusion policy, from its own denoising error.

Along :math:`x_\sigma = a + \sigma \epsilon`, de Bruijn's identity reads

.. math:: H(x_{\sigma_1}) = \tfrac{d_a}{2} \log (2 \pi e\, \sigma_1^2)
          + \int_{\sigma_1}^{\infty}
          \frac{\mathbb E\, \| a - D(x_\sigma, \sigma) \|^2}{\sigma^2}\, d \log \sigma,

taken over the T levels of the policy with actions that it drew. It is the entropy of actions with
noise of the lowest level, which is 0.09 for a cosine schedule of 20 steps, but 0.17 for 10 and
0.34 for 5: wider than the actions may be. So the noise is taken off again, as it would be from
normal actions, whose entropy powers add:

.. math:: e^{2 H(a) / d_a} \le e^{2 H(x_{\sigma_1}) / d_a} - 2 \pi e\, \sigma_1^2 .

Averaged over states, the right-hand side is never too small, but for the integral's trapezoids
and a random error: neither other laws (entropy power inequality) nor a denoiser that is not exact
make it so.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rsm_sampler.checked import checked
from rsm_sampler.transitions import forward_kernel

__all__ = ["PolicyEntropy", "missing_entropy"]


_LEAST = 1e-4  # entropy power that is told from none, in units of the noise's


@checked
class PolicyEntropy:
    """Entropy per dimension of a policy's actions, in nats, by one call of its denoiser.

    Arguments:
        sigmas: The policy's noise levels, rising, positive, (T).
        batch_size: Actions of a call.
    """

    def __init__(self, sigmas: Float[Tensor, " levels"], batch_size: int) -> None:
        # The integral over log sigma by trapezoids, and the levels of a batch by strata of what
        # they are likely to contribute: an action in the box is known to 1/sqrt(3) at least.
        sigma = sigmas.double()
        width = torch.zeros_like(sigma)
        gap = sigma.log().diff()
        width[1:] += 0.5 * gap
        width[:-1] += 0.5 * gap
        likely = 1 / (1 + 3 * sigma.square())
        total = (width * likely).sum()
        middle = (torch.arange(batch_size, device=sigma.device) + 0.5) / batch_size
        t = torch.searchsorted((width * likely).cumsum(0), middle * total)
        t = t.clamp(max=len(sigma) - 1)
        self._sigma = sigma[t].float()
        self._weight = (total / likely[t] / batch_size).float()
        self._offset = 0.5 * math.log(2 * math.pi * math.e) + math.log(float(sigma[0]))

    @torch.no_grad()
    def __call__(
        self,
        denoiser: nn.Module,
        action: Float[Tensor, "n act"],
        observation: Float[Tensor, "n obs"],
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The entropy, a tensor without axes.

        Arguments:
            denoiser: The policy's denoiser.
            action: Actions that the policy drew; they are cut to [-1, 1].
            observation: Where it drew them.
            generator: Source of randomness, on their device.
        """
        clean = action.clamp(-1.0, 1.0)
        x_t = forward_kernel(clean, self._sigma, generator=generator)
        denoised = denoiser(x_t, self._sigma, observation).clamp(-1.0, 1.0)
        error = (denoised - clean).square().sum(-1) / self._sigma.square()
        # In units of the noise's entropy power, which is what there is without an error.
        power = torch.expm1(2 * (self._weight * error).sum() / action.shape[-1])
        return self._offset + 0.5 * power.clamp(min=_LEAST).log()


@checked
def missing_entropy(entropy: Tensor, target: float, ess: Tensor, floor: float) -> Tensor:
    r"""What a step of the logarithm of a temperature is proportional to, within 1.

    .. math:: \max\big(H_{\rm target} - H,\; \log (K_{\min} / K_{\rm eff})\big)

    The second is positive where the candidates do not suffice for the temperature.

    Arguments:
        entropy: Entropy H per dimension, in nats, without axes.
        target: The entropy that is tuned for.
        ess: Effective number of candidates, without axes.
        floor: What it should be at least.

    Example:
        >>> missing_entropy(torch.tensor(0.5), -0.5, torch.tensor(8.0), 4.0)
        tensor(-0.6931)
    """
    return torch.stack([target - entropy, (floor / ess).log()]).amax().clamp(-1.0, 1.0)
